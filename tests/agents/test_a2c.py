"""A2C: one step on the policy gradient, the value loss and the entropy bonus, written out."""

from __future__ import annotations

import pytest
import torch

from rlhf_env.agents.a2c import A2C, A2CConfig
from rlhf_env.errors import ConfigError
from tests.agents.gradients import STILL, assert_gradient_is_that_of, float64_policy, read, sampled


def test_an_update_is_the_method_written_out():
    """δ and A in loops; advantages are not whitened, values are not clipped, the entropy coefficient is half-way."""
    rollout, gamma, lam = sampled(), 0.9, 0.7
    policy, written = float64_policy(), float64_policy()
    config = A2CConfig(
        **STILL, batch_size=6, gamma=gamma, lam=lam, value_coef=0.3, entropy_coef=0.2, final_entropy_coef=0.4
    )
    metrics = A2C(policy, config).update(rollout, progress=0.5)
    losses = []
    for i, (logp, entropy, values) in enumerate(read(written, rollout)):
        n = len(logp)
        r, v = rollout.reward[i, :n].tolist(), [*rollout.values[i, :n].tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            advantage = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n))
            error = values[t] - (advantage + v[t])
            losses.append(-advantage * logp[t] + 0.3 * 0.5 * error**2 - 0.3 * entropy[t])
    assert_gradient_is_that_of(torch.stack(losses).mean(), written, policy)
    assert metrics["gradient_norm"] > 0 and metrics["explained_variance"] < 1


@pytest.mark.parametrize("settings", [{"gamma": 1.1}, {"lam": -0.1}, {"value_coef": -1.0}, {"entropy_coef": -1.0}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=f"A2C needs {next(iter(settings))}"):
        A2CConfig(**settings)
