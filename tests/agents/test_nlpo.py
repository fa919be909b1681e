"""NLPO: nothing is written outside the nucleus of a mask that follows the policy now and then."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from rlhf_env.agents.nlpo import NLPO, NLPOConfig
from rlhf_env.errors import ConfigError
from rlhf_env.training.collect import collect
from rlhf_env.training.loop import train
from tests.builders import make_envs, random_model


def restricted(dtype: str = "float64", **settings) -> NLPO:
    """An agent whose mask is not its policy: each has weights of its own."""
    agent = NLPO(random_model(dtype=dtype, seed=1), NLPOConfig(learning_rate=1e-2, batch_size=8, **settings), seed=3)
    agent.policy.mask.load_state_dict(random_model(dtype=dtype, seed=2).state_dict())
    return agent


def nuclei(agent: NLPO, rollout, top_p: float) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """For every token of every row: the policy's own log-probabilities [V], and what the mask leaves, by sorting."""
    found = []
    for i, n in enumerate(rollout.lengths.tolist()):
        ids, row = rollout.prompt_ids[i][rollout.prompt_mask[i]].tolist(), []
        for token in rollout.response_ids[i, :n].tolist():
            own, mask = (
                (m.model(torch.tensor([ids])).logits[0, -1] / rollout.law.temperature).log_softmax(-1)
                for m in (agent.policy.own, agent.policy.mask)
            )
            order, total, kept = mask.argsort(descending=True).tolist(), 0.0, torch.zeros(len(mask), dtype=torch.bool)
            for likeliest in order:
                if total < top_p:
                    kept[likeliest] = True
                total += float(mask[likeliest].detach().exp())
            row.append((own.detach(), kept))
            ids.append(token)
        found.append(row)
    return found


def test_no_token_is_written_outside_the_masks_nucleus_and_log_probabilities_say_so():
    agent = restricted(mask_top_p=0.6)
    envs = make_envs(4, reference=random_model(dtype="float64"), temperature=0.8)
    rollout = collect(agent.policy, envs, episodes=24, seed=1)
    left_out = 0
    with torch.no_grad():
        again, _, _ = agent.policy.evaluate(rollout)
    for i, row in enumerate(nuclei(agent, rollout, 0.6)):
        for t, (own, kept) in enumerate(row):
            token = rollout.response_ids[i, t]
            assert kept[token]
            renormalised = own[token] - own[kept].logsumexp(0)
            assert float(rollout.logp[i, t]) == pytest.approx(float(renormalised), abs=1e-9)
            assert float(again[i, t]) == pytest.approx(float(renormalised), abs=1e-9)
            left_out += int((~kept).sum())
    assert left_out > 100, "the mask must bind to be tested"


def test_rounding_forbids_no_token_that_was_sampled():
    """A token may be written where those likelier do not reach p; it stays allowed while they do by 1e-5 at most."""
    agent = restricted("float32")
    with torch.no_grad():
        first = agent.policy.mask.model(torch.tensor([[0, 1, 2]])).logits[0, -1].softmax(-1)  # after the prompt abc
    likeliest = first.sort(descending=True)
    border = float(likeliest.values[:2].sum())  # at which the third comes in
    agent.policy.top_p = border + 2e-6
    rollout = collect(agent.policy, make_envs(8, prompts=["abc"]), episodes=64, seed=1)
    third = rollout.response_ids[:, 0] == likeliest.indices[2]
    assert third.any()
    for top_p, allowed in ((border - 2e-6, True), (border - 1e-3, False)):
        agent.policy.top_p = top_p
        logp, _, entropy = agent.policy.evaluate(rollout[third])
        assert torch.isfinite(logp[:, 0]).all() == allowed
        assert torch.isfinite(entropy[:, 0]).all()


def test_the_mask_follows_every_so_many_updates_and_learns_nothing_itself():
    agent: Any = NLPO(random_model(seed=1), NLPOConfig(learning_rate=1e-2, batch_size=8, mask_every=2), seed=3)
    assert not any(p.requires_grad for p in agent.policy.mask.parameters())
    as_it_began = {key: value.clone() for key, value in agent.policy.own.state_dict().items()}

    def equal(model, state) -> bool:
        return all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    states = [as_it_began]
    for update, _ in enumerate(train(agent, make_envs(4), updates=5, seed=1), start=1):
        states.append({key: value.clone() for key, value in agent.policy.own.state_dict().items()})
        assert not equal(agent.policy.own, states[update - 1])
        assert equal(agent.policy.mask, states[update - update % 2])


def test_a_mask_that_leaves_all_is_no_mask():
    agent, envs = restricted(mask_top_p=1.0), make_envs(4, reference=random_model(dtype="float64"))
    masked, plain = (collect(policy, envs, episodes=8, seed=1) for policy in (agent.policy, agent.policy.own))
    assert torch.equal(masked.response_ids, plain.response_ids)
    torch.testing.assert_close(masked.logp, plain.logp)


def test_an_environment_that_truncates_has_a_mask_already():
    agent = restricted("float32")
    with pytest.raises(ConfigError, match="leave out the environment's top_k and top_p"):
        collect(agent.policy, make_envs(4, top_k=3), episodes=4)
    rollout = collect(agent.policy.own, make_envs(4, top_k=3), episodes=4)
    with pytest.raises(ConfigError, match="leave out the environment's top_k and top_p"):
        agent.policy.evaluate(rollout)


@pytest.mark.parametrize("settings", [{"mask_top_p": -0.1}, {"mask_top_p": 1.1}, {"mask_every": 0}, {"lam": 2.0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError, match="needs"):
        NLPOConfig(**settings)


def test_the_values_are_the_policys():
    agent = restricted()
    torch.nn.init.normal_(agent.policy.own.value_head.weight)
    rollout = collect(agent.policy, make_envs(4, reference=random_model(dtype="float64")), episodes=6)
    plain = dataclasses.replace(rollout, values=agent.policy.own.evaluate(rollout)[1].detach())
    m = rollout.response_mask
    torch.testing.assert_close(rollout.values[m], plain.values[m], atol=1e-9, rtol=0)


def test_demonstrations_and_a_mask_do_not_go_together():
    with pytest.raises(ConfigError, match="NLPO has no ptx"):
        NLPOConfig(ptx="texts.jsonl")


def test_a_model_in_half_precision_keeps_what_it_sampled():
    """The cache's nucleus and the teacher-forced one differ by more there: at learning rate 0, sampled is allowed."""
    policy = random_model(dtype="bfloat16", seed=1)
    agent = NLPO(policy, NLPOConfig(learning_rate=0.0, batch_size=64, epochs=1, mask_top_p=0.8))
    rollout = collect(agent.policy, make_envs(16, reference=None, beta=0.0), episodes=64)
    assert torch.isfinite(agent.policy.evaluate(rollout)[0][rollout.response_mask]).all()
