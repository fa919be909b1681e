"""The training loop moves on: other prompts and other random numbers in every update."""

from __future__ import annotations

import pytest

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
