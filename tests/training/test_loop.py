"""The training loop moves on: other prompts and other random numbers in every update."""

from __future__ import annotations

import pytest

from rlhf_env.agents.grpo import GRPO, GRPOConfig
from rlhf_env.envs.beta import AdaptiveBeta
from rlhf_env.errors import ConfigError
from rlhf_env.training.loop import train
from rlhf_env.types import Rollout
from tests.builders import make_envs, random_model


class Idle:
    """An agent that learns nothing and remembers what it was given."""

    batch_size = 2

    def __init__(self) -> None:
        self.policy, self.seen = random_model(seed=1), []

    def update(self, rollout: Rollout, progress: float = 0.0) -> dict[str, float]:
        for i in range(len(rollout)):
            episode = rollout[i]
            prompt, response = episode.prompt_ids[episode.prompt_mask], episode.response_ids[episode.response_mask]
            self.seen.append((tuple(prompt.tolist()), tuple(response.tolist())))
        return {"progress": progress}


def test_every_prompt_is_seen_before_any_comes_again_and_is_answered_anew():
    agent = Idle()
    rows = list(train(agent, make_envs(3, temperature=3.0), updates=20))  # type: ignore[arg-type]
    epochs = [agent.seen[i : i + 4] for i in range(0, 40, 4)]
    assert all(len({prompt for prompt, _ in epoch}) == 4 for epoch in epochs)
    assert all(len({r for p, r in agent.seen if p == prompt}) > 5 for prompt, _ in epochs[0])
    assert [row["progress"] for row in rows[:3]] == [0.0, 0.05, 0.1]
    assert rows[-1]["episodes"] == 40 and rows[-1]["tokens"] == sum(len(r) for _, r in agent.seen)


@pytest.mark.parametrize(("budget", "updates"), [({"episodes": 5}, 3), ({"updates": 2}, 2), ({"tokens": 1}, 1)])
def test_a_budget_ends_with_the_update_that_reaches_it(budget, updates):
    assert len(list(train(Idle(), make_envs(3), **budget))) == updates  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [{}, {"episodes": 5, "updates": 2}])
def test_there_is_one_budget(budget):
    with pytest.raises(ConfigError, match="exactly one budget"):
        next(train(Idle(), make_envs(3), **budget))  # type: ignore[arg-type]


class AlsoAsksTheReference(Idle):
    """An agent that wants to see what the reference says, too."""

    def rollouts(self, sample):
        return sample(self.policy), sample("reference")

    def update(self, rollout: Rollout, theirs: Rollout, progress: float = 0.0) -> dict[str, float]:
        return {"their_kl": float(theirs.kl.mean())}


def test_beta_is_steered_by_the_policys_kl_and_not_by_the_references_own():
    """The policy is nats away from a target of 0.1, so β must rise, though the reference's KL to itself is 0."""
    beta = AdaptiveBeta(initial=0.3, target=0.1, horizon=100)
    rows = list(train(AlsoAsksTheReference(), make_envs(3, beta=beta), updates=10))  # type: ignore[arg-type]
    assert rows[-1]["kl"] > 0.5 and abs(rows[-1]["their_kl"]) < 1e-4
    assert rows[-1]["beta"] > rows[0]["beta"]
    assert rows[-1]["queries"] == 2 * rows[-1]["episodes"]


@pytest.mark.parametrize(("settings", "kl_mode"), [({"kl": "k3"}, "off"), ({}, "reference")])
def test_rewards_of_another_kind_than_the_agent_learns_from_are_refused(settings, kl_mode):
    agent = GRPO(random_model(seed=1), GRPOConfig(batch_size=8, group_size=4, **settings))
    with pytest.raises(ConfigError, match=f"GRPO learns from rewards of kl_mode='reward', and .* is '{kl_mode}'"):
        next(train(agent, make_envs(4, kl_mode=kl_mode), updates=1))
