"""What holds for every online agent: padding reaches nothing, memory changes nothing, and bits repeat."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from rlhf_env.errors import ConfigError, NonFiniteError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.records.checkpoint import flatten_state, unflatten_state
from rlhf_env.training.agents import AGENTS, agent_class, agent_config
from rlhf_env.training.loop import next_rollouts, train
from tests.builders import make_envs, random_model

OFFLINE = {"dpo", "ipo", "kto", "ilql"}
ONLINE = [name for name in AGENTS if name not in OFFLINE]
LEARNING = [name for name in ONLINE if name != "best_of_n"]

SMALL: dict[str, dict[str, Any]] = {
    "best_of_n": {"n": 2, "draws": 4, "prompts": 2},
    "bon_distillation": {"n": 2, "draws": 4, "group_size": 2},
    "grpo": {"group_size": 4},
    "nlpo": {"mask_every": 2},
    "online_dpo": {"group_size": 2},
    "rejection_sampling": {"group_size": 2},
    "rloo": {"group_size": 2},
}
RATE = 1e-3


def make(name: str, policy: Any = None, **settings: Any) -> Any:
    """The agent of this name in small, with a random policy."""
    cls = agent_class(name)
    usual = {} if name == "best_of_n" else {"learning_rate": RATE, "batch_size": 8}
    policy = random_model(seed=1) if policy is None else policy
    return cls(policy, agent_config(cls, usual | SMALL.get(name, {}) | settings), seed=3)


def envs_for(agent: Any, **kwargs: Any) -> Any:
    return make_envs(4, kl_mode=getattr(agent, "kl_mode", "reward"), **kwargs)


def weights(agent: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in agent.policy.parameters()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def without_times(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if not name.startswith("seconds")}


@pytest.mark.parametrize("name", ONLINE)
def test_it_trains_and_says_what_it_does(name):
    agent = make(name)
    before = weights(agent)
    rows = list(train(agent, envs_for(agent), updates=3, seed=1))
    assert [row["update"] for row in rows] == [1, 2, 3]
    assert equal(before, weights(agent)) == (name == "best_of_n")
    for row in rows:
        assert all(isinstance(value, (int, float)) for value in row.values())
        assert row["queries"] >= row["episodes"] and row["tokens"] > 0
    assert rows[-1].get("learning_rate", RATE / 3) == pytest.approx(RATE / 3)


@pytest.mark.parametrize("name", LEARNING)
def test_with_learning_rate_zero_nothing_moves(name):
    agent = make(name, learning_rate=0.0)
    before = weights(agent)
    for row in train(agent, envs_for(agent, temperature=0.7, banned_tokens=(8, 10), min_new_tokens=2), updates=2):
        if "approx_kl" in row:  # the first ratio is 1, and every other one too
            assert row["max_ratio_error"] < 1e-4 and row["approx_kl"] < 1e-8 and row["clip_fraction"] == 0
    assert equal(before, weights(agent))


@pytest.mark.parametrize("poison", [1e6, float("nan")])
@pytest.mark.parametrize("name", LEARNING)
def test_what_stands_in_the_padding_reaches_nothing(name, poison):
    results = []
    for spoil in (False, True):
        agent = make(name)
        rollouts = next_rollouts(agent, envs_for(agent), seed=1, start=0)
        assert any((~rollout.response_mask).any() for rollout in rollouts)
        if spoil:
            rollouts = tuple(
                dataclasses.replace(
                    rollout,
                    **{
                        field: getattr(rollout, field).masked_fill(~rollout.response_mask, poison)
                        for field in ("logp", "ref_logp", "values", "reward")
                    },
                )
                for rollout in rollouts
            )
        results.append((agent.update(*rollouts), weights(agent)))
    (clean_metrics, clean), (metrics, spoilt) = results
    assert equal(clean, spoilt) and clean_metrics == metrics


@pytest.mark.parametrize("name", sorted({*LEARNING} - {"bon_distillation", "online_dpo", "soft_q"}))
def test_where_kl_costs_nothing_the_reference_does_not_matter(name):
    """To the bit; the others are defined by their reference, or by β."""
    found = []
    for reference in (random_model(), random_model(seed=5), None):
        agent = make(name)
        rows = list(train(agent, envs_for(agent, beta=0.0, reference=reference), updates=2, seed=1))
        found.append(([row["return"] for row in rows], weights(agent)))
    for returns, after in found[1:]:
        assert returns == found[0][0] and equal(after, found[0][1])


@pytest.mark.parametrize("name", LEARNING)
def test_parts_of_a_batch_add_up_to_the_batch(name):
    """Gradient accumulation over episodes of unequal lengths: 1 × 8, 3 × 3 and 8 × 1 are the same step."""
    found = []
    for size in (0, 3, 1):
        agent = make(name, random_model(dtype="float64", seed=1), micro_batch_size=size)
        envs = envs_for(agent, reference=random_model(dtype="float64"))
        rollouts = next_rollouts(agent, envs, seed=1, start=0)
        assert len(rollouts[0].lengths.unique()) > 1
        agent.update(*rollouts)
        found.append(weights(agent))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=0)


PASSES: dict[str, dict[str, Any]] = {  # several over each batch
    "ppo": {},
    "ppo, its critic": {"value_network": "separate"},
    "grpo": {"epochs": 3},
    "rejection_sampling": {"epochs": 3},
    "soft_q": {"epochs": 3, "replay": 1},
}


@pytest.mark.parametrize("name", PASSES)
def test_frozen_layers_read_once_an_update_teach_the_same(name, monkeypatch):
    found, begun = [], []
    begin = CausalLM.begin
    for method in (lambda self, rollout: begun.append(len(rollout)) or begin(self, rollout), lambda *_: None):
        monkeypatch.setattr(CausalLM, "begin", method)
        policy = random_model(dtype="float64", seed=1).freeze_layers(1)
        agent = make(name.split(",")[0], policy, **PASSES[name])
        envs = envs_for(agent, reference=random_model(dtype="float64"))
        agent.update(*next_rollouts(agent, envs, seed=1, start=0))
        found.append(weights(agent))
    assert begun == {"ppo, its critic": [8, 8], "rejection_sampling": [4]}.get(name, [8])
    assert not equal(found[0], [p.detach() for p in random_model(dtype="float64", seed=1).parameters()])
    for once, every_time in zip(*found, strict=True):
        torch.testing.assert_close(once, every_time, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", LEARNING)
def test_state_and_weights_are_all_that_goes_on(name):
    """Four updates are two, a new agent that is given what the first one has, and two more: to the bit."""
    straight = make(name)
    rows = [without_times(row) for row in train(straight, envs_for(straight), updates=4, seed=2)]

    first = make(name)
    envs = envs_for(first)
    spent = None
    for row in train(first, envs, updates=4, seed=2):
        spent = row
        if row["update"] == 2:
            break
    tensors, tree = flatten_state(first.state_dict())
    trained: CausalLM = first.policy.own if name == "nlpo" else first.policy
    saved = {key: value.clone() for key, value in trained.state_dict().items()}
    tensors = {key: value.clone() for key, value in tensors.items()}

    policy = random_model(seed=1)
    second = make(name, policy)
    policy.load_state_dict(saved)
    second.load_state_dict(unflatten_state(tensors, tree))
    from rlhf_env.training.loop import Spent

    done = Spent(**{unit: spent[key] for unit, key in SPENT.items()})
    rest = [without_times(row) for row in train(second, envs, updates=4, seed=2, spent=done)]
    assert rows[2:] == rest
    assert equal(weights(straight), weights(second))


SPENT = {"updates": "update", "episodes": "episodes", "tokens": "tokens", "queries": "queries"}


@pytest.mark.parametrize("name", LEARNING)
def test_a_log_probability_that_breaks_is_refused_by_name(name):
    agent = make(name)
    rollouts = next_rollouts(agent, envs_for(agent), seed=1, start=0)
    with torch.no_grad():
        for p in agent.policy.parameters():
            p.fill_(torch.inf)
    before = weights(agent)
    with pytest.raises(NonFiniteError, match=r"episodes? \d+.* of the batch"):
        agent.update(*rollouts)
    assert equal(before, weights(agent))


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("field", ["reward", "score"])
def test_a_rollout_that_is_not_finite_is_refused_by_name(name, field):
    agent = make(name)
    rollout, *others = next_rollouts(agent, envs_for(agent), seed=1, start=0)
    broken = getattr(rollout, field).clone()
    broken[3] = torch.nan
    before = weights(agent)
    with pytest.raises(NonFiniteError, match=f"{field} of episode 3 of the batch"):
        agent.update(dataclasses.replace(rollout, **{field: broken}), *others)
    assert equal(before, weights(agent))


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize("settings", [{"learning_rate": -1.0}, {"batch_size": 0}, {"micro_batch_size": -1}])
def test_impossible_settings_are_refused(name, settings):
    with pytest.raises(ConfigError, match=r"needs|groups"):
        make(name, **settings)


@pytest.mark.parametrize("name", ["rloo", "grpo", "rejection_sampling", "bon_distillation", "online_dpo"])
def test_groups_must_fit_the_batch_and_the_environment(name):
    with pytest.raises(ConfigError, match="multiple"):
        make(name, batch_size=9)
    agent = make(name)
    with pytest.raises(ConfigError, match="the environment's group_size is 3 and the agent's"):
        next_rollouts(agent, envs_for(agent, group_size=3), seed=0, start=0)


@pytest.mark.parametrize("name", ["rloo", "remax", "bon_distillation"])
def test_who_is_compared_answers_the_same_prompts(name):
    agent = make(name)
    rollouts = next_rollouts(agent, envs_for(agent), seed=1, start=8)
    own, size = rollouts[0], getattr(agent, "group_size", 1)
    asked = [row[m].tolist() for row, m in zip(own.prompt_ids, own.prompt_mask, strict=True)]
    assert all(asked[i] == asked[i - i % size] for i in range(len(asked)))
    for other in rollouts[1:]:
        theirs = [row[m].tolist() for row, m in zip(other.prompt_ids, other.prompt_mask, strict=True)]
        ratio = len(theirs) * size // len(asked)  # of the other's answers to each prompt
        assert [theirs[i * ratio] for i in range(len(asked) // size)] == asked[::size]
