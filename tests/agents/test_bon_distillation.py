"""Best-of-n distillation: whom it imitates, whom it counts as beaten, and its metrics by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from rlhf_env.agents.bon_distillation import BonDistillation, BonDistillationConfig
from rlhf_env.errors import ConfigError
from rlhf_env.training.loop import next_rollouts
from tests.agents.gradients import STILL, assert_gradient_is_that_of, float64_policy, read, sampled
from tests.builders import make_envs, random_model


def test_an_update_is_the_method_written_out():
    """Two prompts; two own responses and four of the reference to each, of which the best of each two are imitated."""
    own, theirs = sampled(4, group_size=2), sampled(8, group_size=4)
    worth = [0.5, 2.5, -1.0, 7.0]
    penalty = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    own = dataclasses.replace(own, score=torch.tensor(worth, dtype=torch.float64) + penalty, penalty=penalty)
    scores = [0.0, 1.0, 2.0, 3.0, 9.0, 8.0, -2.0, -1.0]
    theirs = dataclasses.replace(theirs, score=torch.tensor(scores, dtype=torch.float64))
    policy, written = float64_policy(), float64_policy()
    config = BonDistillationConfig(**STILL, n=2, draws=4, batch_size=4, group_size=2, forward_weight=0.3)
    metrics = BonDistillation(policy, config).update(own, theirs)

    shares = [2 / 6, 4 / 6, 3 / 6, 3 / 6]  # (1 + wins)/(2 + 4) of wins 1, 3, 2, 2
    lengths = own.lengths.tolist()
    kl = [float((own.logp - own.ref_logp)[i, :n].sum()) for i, n in enumerate(lengths)]
    returns = [(2 - 1) * math.log(share) - each for share, each in zip(shares, kl, strict=True)]
    rows, good = read(written, own), read(written, theirs)
    backward = torch.stack([-(returns[i] - returns[i ^ 1]) * rows[i][0].sum() for i in range(4)]).mean()
    forward = -torch.stack([good[i][0].sum() for i in (1, 3, 4, 7)]).mean()
    assert_gradient_is_that_of((0.7 * backward + 0.3 * forward) / own.response_ids.shape[1], written, policy, 1e-6)
    assert metrics["win_share"] == pytest.approx(0.5)
    assert metrics["imitation_nll"] == pytest.approx(forward.item())
    assert metrics["best_score"] == (1 + 3 + 9 - 1) / 4


def test_it_draws_from_the_reference_and_not_from_itself():
    reference, policy = random_model(), random_model(seed=1)
    agent: Any = BonDistillation(policy, BonDistillationConfig(n=2, draws=4, batch_size=4, group_size=2))
    own, theirs = next_rollouts(agent, make_envs(4, reference=reference), seed=1, start=4)
    assert (len(own), len(theirs)) == (4, 8)
    assert float(theirs.kl.abs().max()) < 1e-4 < float(own.kl.abs().max())


@pytest.mark.parametrize("settings", [{"n": 1}, {"n": 4, "draws": 6}, {"n": 4, "draws": 2}, {"forward_weight": 1.1}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=r"needs|multiple of n"):
        BonDistillationConfig(**settings)
