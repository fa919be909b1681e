"""PPO's options: a value network of its own, its warm-up, demonstrations, updates that stop early, schedules."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_env.agents.ppo import PPO, PPOConfig
from rlhf_env.errors import ConfigError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.sft import EncodedDemonstration, read_demonstrations
from rlhf_env.types import Rollout
from tests.agents.gradients import (
    STILL,
    assert_gradient_is_that_of,
    flat,
    float64_policy,
    gradient_of,
    read,
    sampled,
)
from tests.builders import make_envs, random_model
from tests.tiny_files import write_rows

ONE_STEP: dict[str, Any] = {**STILL, "batch_size": 6, "epochs": 1, "minibatches": 1}


def with_critic(**settings: Any) -> PPO:
    """An agent whose value network says something else than the policy's head."""
    agent = PPO(float64_policy(), PPOConfig(value_network="separate", **settings), seed=3)
    agent.critic.load_state_dict(float64_policy(seed=4).state_dict())  # type: ignore[attr-defined]
    return agent


def weights(model: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def gradient(model: Any) -> torch.Tensor:
    parameters = list(model.parameters())
    return flat([p.grad for p in parameters], parameters)


def test_the_defaults_are_those_that_the_details_page_names():
    c = PPOConfig()
    assert (c.gamma, c.lam) == (1.0, 0.95)
    assert (c.clip, c.value_clip, c.value_coef, c.entropy_coef) == (0.2, 0.2, 0.1, 0.0)
    assert (c.epochs, c.minibatches, c.batch_size) == (4, 4, 128)
    assert (c.learning_rate, c.anneal, c.adam_eps, c.max_grad_norm) == (1e-5, True, 1e-5, 1.0)
    assert (c.value_network, c.critic_warmup, c.max_update_kl, c.ptx) == ("shared", 0, None, None)


# --- a value network of its own ---------------------------------------------------------------------


def test_a_value_network_of_its_own_learns_the_returns_and_nothing_else():
    """½ mean (V − R)² at the first step, where V is the old value: R from its own values, by a double sum."""
    rollout, written = sampled(), float64_policy(seed=4)
    agent = with_critic(**ONE_STEP, value_coef=0.3, gamma=0.9, lam=0.7, entropy_coef=0.2)
    metrics = agent.update(rollout)
    errors = []
    for i, (_, _, values) in enumerate(read(written, rollout)):
        v = [*values.tolist(), 0.0]
        delta = [rollout.reward[i, t].item() + 0.9 * v[t + 1] - v[t] for t in range(len(values))]
        for t in range(len(values)):
            target = v[t] + sum(0.63 ** (k - t) * delta[k] for k in range(t, len(values)))
            errors.append((values[t] - target) ** 2)
    loss = torch.stack(errors).mean() / 2
    assert metrics["value_loss"] == pytest.approx(loss.item())
    assert_gradient_is_that_of(0.3 * loss, written, agent.critic)  # type: ignore[arg-type]


def test_the_policy_feels_the_value_networks_advantages_and_not_its_loss():
    """Its gradient is that of a policy which is told these values, whatever the weight of the value loss."""
    rollout, critic = sampled(), float64_policy(seed=4)
    with torch.no_grad():
        told = dataclasses.replace(rollout, values=critic.evaluate(rollout)[1])
    shared = PPO(float64_policy(), PPOConfig(**ONE_STEP, value_coef=0.0))
    shared.update(told)
    for value_coef in (0.0, 0.3):
        agent = with_critic(**ONE_STEP, value_coef=value_coef)
        agent.update(rollout)
        torch.testing.assert_close(gradient(agent.policy), gradient(shared.policy), atol=1e-10, rtol=1e-8)
        assert (gradient(agent.critic).norm() > 0) == (value_coef > 0)
    assert all(p.grad is None for p in agent.policy.value_head.parameters())  # type: ignore[attr-defined]


def test_what_the_policys_own_head_said_is_not_used():
    results = []
    for values in (0.0, 1e3, float("nan")):
        rollout = sampled()
        agent = with_critic(learning_rate=1e-2, batch_size=6, minibatches=2)
        metrics = agent.update(dataclasses.replace(rollout, values=torch.full_like(rollout.values, values)))
        results.append((metrics, weights(agent.policy), weights(agent.critic)))
    for metrics, policy, critic in results[1:]:
        assert metrics == results[0][0] and equal(policy, results[0][1]) and equal(critic, results[0][2])


def test_resumed_the_value_network_is_what_it_was():
    rollouts = [sampled(), sampled()[[5, 4, 3, 2, 1, 0]]]
    straight = with_critic(learning_rate=1e-2, batch_size=6)
    rows = [straight.update(rollout, k / 2) for k, rollout in enumerate(rollouts)]
    first = with_critic(learning_rate=1e-2, batch_size=6)
    again = [first.update(rollouts[0], 0.0)]
    second = PPO(float64_policy(), first.config, seed=3)  # its critic is a copy of its policy, until the state is back
    second.policy.load_state_dict(first.policy.state_dict())  # type: ignore[attr-defined]
    second.load_state_dict(first.state_dict())
    again.append(second.update(rollouts[1], 0.5))
    assert again == rows
    assert equal(weights(straight.policy), weights(second.policy))
    assert equal(weights(straight.critic), weights(second.critic))


def test_a_shared_value_network_is_the_policy_and_is_saved_with_it():
    agent = PPO(float64_policy(), PPOConfig(batch_size=6))
    assert agent.critic is agent.policy and agent.state_dict()["critic"] is None


# --- warming it up ----------------------------------------------------------------------------------


def test_while_the_value_network_warms_up_the_policy_stands_still():
    """Bitwise, for two updates; then it moves, and Adam has nothing to remember of before."""
    agent, rollout = with_critic(learning_rate=1e-2, batch_size=6, critic_warmup=2, entropy_coef=0.1), sampled()
    as_it_was = weights(agent.policy)
    for update in range(4):
        critic = weights(agent.critic)
        metrics = agent.update(rollout)
        assert not equal(critic, weights(agent.critic))
        assert equal(as_it_was, weights(agent.policy)) == (update < 2)
        assert metrics["entropy"] > 0 and "policy_loss" in metrics  # measured all the same
        if update < 2:
            assert metrics["max_ratio_error"] < 1e-9


def test_a_resumed_run_does_not_warm_up_again():
    agent, rollout = with_critic(learning_rate=1e-2, batch_size=6, critic_warmup=1), sampled()
    agent.update(rollout)
    second = with_critic(learning_rate=1e-2, batch_size=6, critic_warmup=1)
    second.load_state_dict(agent.state_dict())
    before = weights(second.policy)
    second.update(rollout)
    assert not equal(before, weights(second.policy))


def test_a_shared_network_warms_up_on_the_value_loss_alone():
    rollout, policy, written = sampled(), float64_policy(), float64_policy()
    PPO(policy, PPOConfig(**ONE_STEP, critic_warmup=1, value_coef=0.3, lam=1.0, entropy_coef=0.5)).update(rollout)
    errors = []
    for i, (_, _, values) in enumerate(read(written, rollout)):
        rewards = rollout.reward[i, : len(values)].tolist()
        errors += [(value - sum(rewards[t:])) ** 2 for t, value in enumerate(values)]
    assert_gradient_is_that_of(0.3 * torch.stack(errors).mean() / 2, written, policy)


# --- demonstrations ---------------------------------------------------------------------------------


def demonstrations(folder: Path, *texts: str) -> str:
    return write_rows(folder / "demonstrations.jsonl", *({"prompt": t[:2], "response": t[2:]} for t in texts))


def nll(policy: CausalLM, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Σ −log π of the response's tokens, at temperature 1: demonstrations are no samples."""
    logits = policy.model(torch.tensor([prompt + response])).logits[0]  # type: ignore[operator]
    log_probs = logits.log_softmax(-1)
    return -torch.stack([log_probs[len(prompt) - 1 + t, token] for t, token in enumerate(response)]).sum()


@pytest.mark.parametrize("warmup", [0, 1])
def test_demonstrations_add_their_likelihood(warmup, tmp_path):
    """One demonstration in the file, so every episode brings this one: `abcde` and EOS, of which `cde` is the response.

    While the critic warms up it waits.
    """
    file, rollout = demonstrations(tmp_path, "abcde"), sampled()
    plain, ptx = (
        PPO(float64_policy(), PPOConfig(**ONE_STEP, critic_warmup=warmup, ptx=which, ptx_coef=0.4))
        for which in (None, file)
    )
    without, metrics = plain.update(rollout), ptx.update(rollout)
    written = float64_policy()
    loss = nll(written, [0, 1], [2, 3, 4, 9]) / 4
    added = gradient(ptx.policy) - gradient(plain.policy)
    coefficient = 0.0 if warmup else 0.4
    torch.testing.assert_close(added, coefficient * gradient_of(loss, written), atol=1e-9, rtol=1e-7)
    assert metrics.get("ptx_loss") == (None if warmup else pytest.approx(loss.item()))
    assert "ptx_loss" not in without
    assert all(metrics[name] == pytest.approx(without[name]) for name in ("policy_loss", "value_loss", "entropy"))


def test_each_episode_brings_a_demonstration_along_drawn_anew_in_every_update(tmp_path, monkeypatch):
    """Drawn for the episode, so that it is the same in each pass; another seed draws others."""
    texts = ["abcde", "bahgf", "cdefa", "gfedc", "hhgge", "efabc"]
    file, rollout = demonstrations(tmp_path, *texts), sampled()

    def drawn(seed: int) -> list[list[list[int]]]:
        seen: list[list[EncodedDemonstration]] = []

        def record(policy: Any, rows: list[EncodedDemonstration]) -> torch.Tensor:
            seen.append(rows)
            return torch.zeros((), dtype=torch.float64)

        monkeypatch.setattr("rlhf_env.agents.ppo.demonstration_loss", record)
        agent = PPO(random_model(dtype="float64", seed=1), PPOConfig(batch_size=6, minibatches=3, ptx=file), seed=seed)
        updates = []
        for _ in range(2):
            seen.clear()
            agent.update(rollout)
            assert [len(rows) for rows in seen] == [2] * 12
            passes = [sorted(row.ids for rows in seen[k : k + 3] for row in rows) for k in range(0, 12, 3)]
            assert all(each == passes[0] for each in passes)
            updates.append([list(ids) for ids in passes[0]])
        return updates

    first, second = drawn(seed=1)
    assert first != second
    assert drawn(seed=1) == [first, second]
    assert drawn(seed=2) != [first, second]


# --- updates that stop early ------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "steps"), [(None, 8), (1e3, 8), (1e-9, 2)])
def test_an_update_stops_once_the_policy_has_moved_too_far(limit, steps):
    """After the first pass already, whose second step sees the ratios that the first has left."""
    config = PPOConfig(learning_rate=1e-2, batch_size=6, epochs=4, minibatches=2, max_update_kl=limit)
    assert PPO(float64_policy(), config).update(sampled())["gradient_steps"] == steps


def test_a_policy_that_does_not_move_is_not_stopped():
    config = PPOConfig(learning_rate=0.0, batch_size=6, epochs=3, minibatches=2, max_update_kl=1e-9)
    assert PPO(float64_policy(), config).update(sampled())["gradient_steps"] == 6


# --- schedules --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("progress", "coefficient"), [(0.0, 0.4), (0.5, 0.25), (1.0, 0.1)])
def test_the_entropy_bonus_goes_in_a_straight_line(progress, coefficient):
    rollout: Rollout = sampled()
    scheduled, constant = (
        PPO(float64_policy(), PPOConfig(**ONE_STEP, entropy_coef=start, final_entropy_coef=end))
        for start, end in ((0.4, 0.1), (coefficient, None))
    )
    metrics = scheduled.update(rollout, progress)
    assert metrics["entropy_coef"] == pytest.approx(coefficient)
    constant.update(rollout, progress)
    torch.testing.assert_close(gradient(scheduled.policy), gradient(constant.policy), atol=1e-12, rtol=1e-9)


def test_demonstrations_are_encoded_as_the_environment_encodes_prompts(tmp_path):
    """Through the tokenizer's chat template, where it has one: an instruct model is not to learn another format."""
    policy = random_model()
    policy.tokenizer = copy.deepcopy(policy.tokenizer)
    policy.tokenizer.chat_template = "{% for m in messages %}h{{ m.content }}g{% endfor %}"
    (row,) = read_demonstrations(demonstrations(tmp_path, "abcde"), policy)
    asked = make_envs(tokenizer=policy.tokenizer, reference=policy, prompts=["ab"]).task.prompt_ids[0]
    assert row.ids[: row.learned_from] == asked and len(asked) > 2


@pytest.mark.parametrize(
    "settings",
    [{"learning_rate": float("nan")}, {"max_grad_norm": -1.0}, {"value_coef": -1.0}, {"value_clip": -0.1},
     {"entropy_coef": float("nan")}, {"final_entropy_coef": -5.0}, {"max_update_kl": -1.0}, {"adam_eps": 0.0}],
)  # fmt: skip
def test_settings_that_would_turn_learning_round_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        PPO(random_model(), PPOConfig(**settings))
