"""The mathematics against numbers worked by hand, brute force, and exact sums over small distributions."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_env import functional
from rlhf_env.functional import (
    adaptive_beta_factor,
    best_of_n,
    best_of_n_kl_bound,
    bradley_terry_loss,
    clipped_value_loss,
    conservative_loss,
    dpo_loss,
    entropy,
    expectile_loss,
    explained_variance,
    gae,
    gather_logp,
    group_advantages,
    implicit_reward,
    inverse_cdf_sample,
    ipo_loss,
    kl_full,
    kl_k1,
    kl_k2,
    kl_k3,
    kto_loss,
    last_token,
    leave_one_out,
    linear_schedule,
    log_win_share,
    masked_mean,
    masked_sum,
    masked_var,
    policy_gradient_loss,
    ppo_clip_loss,
    ppo_clip_terms,
    ratio_metrics,
    response_mean,
    restrict,
    soft_value,
    token_rewards,
    token_statistics,
    value_loss,
    whiten,
)

LN2 = math.log(2)


def f64(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def prefix_mask(*lengths: int, width: int) -> Tensor:
    return torch.arange(width) < torch.tensor(lengths).unsqueeze(1)


def close(actual: Tensor | None, expected: Any) -> None:
    assert actual is not None
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=1e-12, atol=1e-12)


# --- masked statistics -----------------------------------------------------------------------------


def test_masked_sum_and_mean_weigh_every_token_the_same() -> None:
    x = f64([1, 2, 6], [5, 99, 99])
    mask = prefix_mask(3, 1, width=3)
    assert masked_sum(x, mask).item() == 14
    assert masked_sum(x, mask, dim=1).tolist() == [9, 5]
    assert masked_mean(x, mask).item() == 3.5  # 14 / 4 tokens; the mean of the rows' means would be 4


def test_mean_of_nothing_is_zero() -> None:
    assert masked_mean(f64([1, 2]), torch.zeros(1, 2, dtype=torch.bool)).item() == 0


def test_the_mean_over_responses_weighs_every_response_the_same() -> None:
    x, mask = f64([1, 2, 6], [5, 99, 99]), prefix_mask(3, 1, width=3)
    assert response_mean(x, mask).item() == 4  # of 3 and 5; the mean over tokens is 3.5


def test_variance_is_the_population_variance() -> None:
    # Mean 3, squares 4 + 4 + 4 + 4 over 4 tokens; over 3 it would be 16/3.
    assert masked_var(f64([1, 1, 5], [5, 99, 99]), prefix_mask(3, 1, width=3)).item() == 4


def test_whitening_centres_and_scales_and_clears_the_padding() -> None:
    whitened = whiten(f64([1, 1, 5], [5, 99, 99]), prefix_mask(3, 1, width=3), eps=0.0)
    assert whitened.tolist() == [[-1, -1, 1], [1, 0, 0]]


def test_whitening_one_token_gives_zero() -> None:
    assert whiten(f64([7, 3]), prefix_mask(1, width=2)).tolist() == [[0, 0]]


def test_explained_variance() -> None:
    target, mask = f64([1, 3, 5], [7, 99, 99]), prefix_mask(3, 1, width=3)  # variance 5
    error = f64([1, -1, 1], [-1, 50, -50])  # variance 1
    close(explained_variance(target - error, target, mask), 0.8)
    close(explained_variance(target - error + 10, target, mask), 0.8)  # a constant offset costs nothing
    assert explained_variance(target, target, mask).item() == 1
    assert explained_variance(torch.zeros_like(target), target, mask).item() == 0
    close(explained_variance(-target, target, mask), -3.0)  # 1 − 4·5/5


@pytest.mark.parametrize("constant", [0.0, 0.1, 1 / 3, -1e6])
def test_a_target_that_does_not_vary_has_nothing_to_explain(constant: float) -> None:
    target = torch.full((3, 7), constant)
    assert explained_variance(torch.randn(3, 7), target, torch.ones(3, 7, dtype=torch.bool)).isnan()


# --- log-probabilities -----------------------------------------------------------------------------


def test_gather_logp_takes_the_entry_of_the_token() -> None:
    table = f64([-1, -2, -3], [-4, -5, -6]).unsqueeze(0)
    assert gather_logp(table, torch.tensor([[2, 0]])).tolist() == [[-3, -4]]


def test_restriction_shares_the_probability_of_the_candidates() -> None:
    log_probs = f64([0.5, 0.25, 0.125, 0.125], [0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4], [1, 0, 0, 0]).log()
    candidates = torch.tensor([[0, 2], [3, -1], [-1, -1], [0, 1]])
    close(
        restrict(log_probs, candidates).exp(), f64([0.8, 0, 0.2, 0], [0, 0, 0, 1], [0.1, 0.2, 0.3, 0.4], [1, 0, 0, 0])
    )
    close(restrict(log_probs[0], torch.tensor([2, 0, 2])).exp(), f64([0.8, 0, 0.2, 0])[0])
    close(
        restrict(log_probs.reshape(2, 2, 4), candidates.reshape(2, 2, 2)),
        restrict(log_probs, candidates).reshape(2, 2, 4),
    )


def test_a_restriction_has_the_gradient_of_what_it_keeps() -> None:
    logits = f64([1.0, 2.0, 3.0]).requires_grad_()
    restrict(logits.log_softmax(-1), torch.tensor([[0, 2]]))[0, 0].backward()
    p = math.exp(3) / (math.exp(1) + math.exp(3))
    close(logits.grad, f64([p, 0, -p]))  # ∂ log p_0 / ∂ logits, of a softmax over tokens 0 and 2 alone


def test_entropy_in_nats() -> None:
    probabilities = f64([0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3], [1, 0, 0], [0.5, 0.5, 0])
    close(entropy(probabilities.log()), [1.5 * LN2, math.log(3), 0.0, LN2])


def test_entropy_has_a_finite_gradient_where_tokens_are_forbidden() -> None:
    logits = f64([math.log(3), 0, -math.inf]).requires_grad_()
    entropy(logits.log_softmax(-1)).sum().backward()
    # dH/dz_i = −p_i (log p_i + H); p = (3/4, 1/4): H + log p_0 = log(3)/4, so ±3/16 log 3.
    close(logits.grad, f64([-3 / 16 * math.log(3), 3 / 16 * math.log(3), 0]))


def test_token_statistics_by_hand() -> None:
    """Of x = log(3, 1, 0) + c, p = (3/4, 1/4, 0): H as above, and ∂ log p_a / ∂x_v = [v = a] − p_v."""
    logits = (f64([math.log(3), 0, -math.inf], [math.log(3), 0, -math.inf]) + 5).requires_grad_()
    logp, h = token_statistics(logits, torch.tensor([0, 1]))
    close(logp, [math.log(3 / 4), math.log(1 / 4)])
    close(h, [math.log(4) - 3 / 4 * math.log(3)] * 2)
    logp.sum().backward(retain_graph=True)
    close(logits.grad, f64([1 / 4, -1 / 4, 0], [-3 / 4, 3 / 4, 0]))
    logits.grad = None
    h.sum().backward()
    close(logits.grad, f64([-3 / 16 * math.log(3), 3 / 16 * math.log(3), 0]).expand(2, -1))


def test_token_statistics_can_be_differentiated_twice() -> None:
    """As TRPO does. What autograd finds by finite differences is the oracle."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, dtype=torch.float64, generator=draw, requires_grad=True)
    tokens = torch.tensor([0, 4, 2])
    for part in (0, 1):
        assert torch.autograd.gradcheck(lambda x, part=part: token_statistics(x, tokens)[part], logits)
        assert torch.autograd.gradgradcheck(lambda x, part=part: token_statistics(x, tokens)[part], logits)
    assert torch.autograd.gradgradcheck(lambda x: token_statistics(x, tokens), logits)


def test_an_entropy_of_no_weight_costs_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    monkeypatch.setattr(functional, "entropy", lambda x: counted.append(1) or entropy(x))
    logits, tokens = f64([1, 2, 0], [0, 3, -math.inf]), torch.tensor([0, 1])
    gradients = []
    for weight in (None, 0.0, 1.0):
        counted.clear()
        x = logits.clone().requires_grad_()
        logp, h = token_statistics(x, tokens)
        (logp.sum() if weight is None else logp.sum() + weight * h.sum()).backward()
        assert len(counted) == (2 if weight else 1)  # of which one for its value
        gradients.append(x.grad)
    assert torch.equal(gradients[0], gradients[1]) and not torch.allclose(gradients[0], gradients[2])


# --- KL divergence: π = (1/2, 1/4, 1/4), ref = (1/4, 1/4, 1/2) --------------------------------------
# Δ = (ln 2, 0, −ln 2), KL = ½ ln 2 − ¼ ln 2 = ¼ ln 2, and with softmax logits θ: ∂KL/∂θ = π (Δ − KL).

PI, REF = f64([0.5, 0.25, 0.25])[0], f64([0.25, 0.25, 0.5])[0]
KL = LN2 / 4
KL_GRADIENT = f64([3 / 8 * LN2, -1 / 16 * LN2, -5 / 16 * LN2])[0]

Estimator = Callable[[Tensor, Tensor], Tensor]


@pytest.mark.parametrize(
    ("estimator", "expectation"),
    [(kl_k1, KL), (kl_k2, 3 / 8 * LN2**2), (kl_k3, KL)],  # 0.1733, 0.1802, 0.1733: k2 alone is biased
)
def test_expectation_of_the_kl_estimators(estimator: Estimator, expectation: float) -> None:
    close((PI * estimator(PI.log(), REF.log())).sum(), expectation)


def test_only_k1_can_be_negative() -> None:
    logp, ref_logp = PI.log(), REF.log()
    close(kl_k1(logp, ref_logp), [LN2, 0, -LN2])
    close(kl_k2(logp, ref_logp), [LN2**2 / 2, 0, LN2**2 / 2])
    close(kl_k3(logp, ref_logp), [LN2 - 0.5, 0, 1 - LN2])


@pytest.mark.parametrize(
    ("estimator", "gradient"),
    [
        (kl_k1, torch.zeros(3)),  # E[∇ log π] = 0: it does nothing at all
        (kl_k2, KL_GRADIENT),  # E[Δ ∇ log π]: exact
        (kl_k3, PI - REF),  # E[(1 − ref/π) ∇ log π]: the gradient of KL(ref ‖ π) instead
    ],
)
def test_expected_gradient_of_each_estimator_as_a_loss(estimator: Estimator, gradient: Tensor) -> None:
    logits = PI.log().requires_grad_()
    (PI * estimator(logits.log_softmax(-1), REF.log())).sum().backward()  # π sampled, so not differentiated
    close(logits.grad, gradient)


@pytest.mark.parametrize(
    ("estimator", "gradient"),
    [
        (kl_k1, KL_GRADIENT),  # exact
        (kl_k2, f64([1 / 16, -3 / 32, 1 / 32])[0] * LN2**2),  # π (k2 − E k2)
        (kl_k3, KL_GRADIENT + REF - PI),
    ],
)
def test_expected_policy_gradient_of_each_estimator_as_a_reward(estimator: Estimator, gradient: Tensor) -> None:
    logits = PI.log().requires_grad_()
    logp = logits.log_softmax(-1)
    (PI * estimator(logp, REF.log()).detach() * logp).sum().backward()
    close(logits.grad, gradient)


def test_full_kl_is_the_sum_and_its_gradient_the_true_one() -> None:
    logits = PI.log().requires_grad_()
    kl = kl_full(logits.log_softmax(-1), REF.log())
    kl.backward()
    close(kl.detach(), KL)
    close(logits.grad, KL_GRADIENT)


def test_full_kl_with_forbidden_tokens() -> None:
    half = f64([0.5, 0.5, 0.0])[0]
    logits = half.log().requires_grad_()
    kl = kl_full(logits.log_softmax(-1), f64([0.25, 0.75, 0.0])[0].log())  # forbidden to both: it costs nothing
    kl.backward()
    close(kl.detach(), 0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert logits.grad is not None and logits.grad.isfinite().all()
    close(kl_full(half.log(), PI.log()), 0.5 * math.log(2))  # forbidden to the policy only: ½ ln 1 + ½ ln 2
    assert kl_full(PI.log(), half.log()).item() == math.inf  # forbidden to the reference only


# --- rewards ---------------------------------------------------------------------------------------

SCORE = f64([2, -1])[0]
LOGP = f64([-1, -2, -0.5], [-3, 99, 99])
REF_LOGP = f64([-1.5, -1, -1], [-1, 99, -99])
REWARD_MASK = prefix_mask(3, 1, width=3)  # log-ratios (0.5, −1, 0.5) and (−2)


def test_token_rewards_by_hand() -> None:
    rewards = token_rewards(SCORE, LOGP, REF_LOGP, REWARD_MASK, 0.5)
    assert rewards.tolist() == [[-0.25, 0.5, 1.75], [0, 0, 0]]  # the second: −0.5·(−2) − 1 on its only token
    rewards = token_rewards(SCORE, LOGP, REF_LOGP, REWARD_MASK, 0.5, placement="terminal")
    assert rewards.tolist() == [[0, 0, 2], [0, 0, 0]]


def test_beta_may_differ_between_episodes() -> None:
    beta = f64([0.5, 2])[0]
    assert token_rewards(SCORE, LOGP, REF_LOGP, REWARD_MASK, beta).tolist() == [[-0.25, 0.5, 1.75], [3, 0, 0]]
    terminal = token_rewards(SCORE, LOGP, REF_LOGP, REWARD_MASK, beta, placement="terminal")
    assert terminal.tolist() == [[0, 0, 2], [3, 0, 0]]


@pytest.mark.parametrize("placement", ["token", "terminal"])
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), seed=st.integers(0, 2**32 - 1))
def test_rewards_of_an_episode_add_up_to_score_minus_beta_kl(placement: str, lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logp, ref_logp = torch.randn(2, len(lengths), 6, generator=generator, dtype=torch.float64)
    score, beta = torch.randn(2, len(lengths), generator=generator, dtype=torch.float64)
    rewards = token_rewards(score, logp, ref_logp, prefix_mask(*lengths, width=6), beta, placement=placement)
    for row, length in enumerate(lengths):
        kl = sum((logp[row, t] - ref_logp[row, t]).item() for t in range(length))
        assert rewards[row].sum().item() == pytest.approx(score[row].item() - beta[row].item() * kl, abs=1e-12)
        assert rewards[row, length:].eq(0).all()


@pytest.mark.parametrize("placement", ["token", "terminal"])
def test_without_kl_the_score_stands_alone_on_the_last_token_that_counts(placement: str) -> None:
    zero = torch.zeros(3, 3)
    rewards = token_rewards(
        torch.tensor([5.0, 6.0, 7.0]), zero, zero, prefix_mask(3, 2, 1, width=3), 1.0, placement=placement
    )
    assert rewards.tolist() == [[0, 0, 5], [0, 6, 0], [7, 0, 0]]


def test_unknown_placement() -> None:
    with pytest.raises(ValueError, match="'token' or 'terminal', got 'sentence'"):
        token_rewards(SCORE, LOGP, REF_LOGP, REWARD_MASK, 0.5, placement="sentence")


def test_last_token() -> None:
    mask = prefix_mask(3, 1, 2, 0, width=3)
    assert last_token(mask).int().tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0], [0, 0, 0]]


# --- advantages ------------------------------------------------------------------------------------


def test_gae_by_hand() -> None:
    """Row 0: δ = (1 + ½·4 − 2, 0 + ½·1 − 4, 2 + ½·2 − 1, 4 − 2) = (1, −3.5, 2, 2); each A = δ + ¼ A'."""
    rewards = f64([1, 0, 2, 4], [0, 3, 77, 77])
    values = f64([2, 4, 1, 2], [1, 2, 77, 77])
    advantages = gae(rewards, values, prefix_mask(4, 2, width=4), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[0.28125, -2.875, 2.5, 2], [0.25, 1, 0, 0]]


@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    gamma=st.sampled_from([0.0, 0.7, 0.99, 1.0]),
    lam=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_gae_equals_the_double_sum(lengths: list[int], gamma: float, lam: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, len(lengths), 7, generator=generator, dtype=torch.float64)
    advantages = gae(rewards, values, prefix_mask(*lengths, width=7), gamma, lam)
    for row, length in enumerate(lengths):
        r, v = rewards[row].tolist(), [*values[row, :length].tolist(), 0.0]
        for t in range(7):
            expected = sum((gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k]) for k in range(t, length))
            assert advantages[row, t].item() == pytest.approx(expected, abs=1e-12)


def test_gae_limits() -> None:
    """λ = 1: discounted return minus value; λ = 0: the one-step error."""
    rewards, values, mask = f64([1, 2, 4]), f64([1, 1, 3]), prefix_mask(3, width=3)
    assert gae(rewards, values, mask, gamma=0.5, lam=1.0).tolist() == [[2, 3, 1]]  # 1+1+1−1, 2+2−1, 4−3
    assert gae(rewards, values, mask, gamma=0.5, lam=0.0).tolist() == [[0.5, 2.5, 1]]


def test_rewards_placed_on_tokens_or_at_the_end_have_the_same_undiscounted_return() -> None:
    zero = torch.zeros_like(LOGP)
    by_token, at_end = (
        gae(token_rewards(SCORE, LOGP, REF_LOGP, REWARD_MASK, 0.5, placement=p), zero, REWARD_MASK, lam=1.0)[:, 0]
        for p in ("token", "terminal")
    )
    assert by_token.tolist() == at_end.tolist() == [2, 0]


def test_the_others_are_the_baseline() -> None:
    """(1, 2, 6): (2 + 6)/2, (1 + 6)/2, (1 + 2)/2; a group knows nothing of the other one."""
    x = f64([1, 2, 6, 50, 30, 10])[0]
    assert leave_one_out(x, 3).tolist() == [4, 3.5, 1.5, 20, 30, 40]
    assert leave_one_out(x[:2], 2).tolist() == [2, 1]


def test_the_others_do_not_depend_on_oneself() -> None:
    x = f64([1, 2, 6])[0].requires_grad_()
    (gradient,) = torch.autograd.grad(leave_one_out(x, 3)[1], x)
    assert gradient.tolist() == [0.5, 0, 0.5]


def test_advantages_within_a_group() -> None:
    """Means 3 and 30; deviations √((4 + 1 + 9)/2) = √7 and 20, with K − 1 in the denominator."""
    x = f64([1, 2, 6, 50, 30, 10])[0]
    assert group_advantages(x, 3, scale=False).tolist() == [-2, -1, 3, 20, 0, -20]
    scaled = group_advantages(x, 3, scale=True, eps=0.0)
    close(scaled, [-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5, 1, 0, -1])
    assert group_advantages(torch.full((4,), 5.0), 4, scale=True).tolist() == [0, 0, 0, 0]  # and not 0/0


def test_a_schedule_is_a_straight_line_or_stays() -> None:
    assert [linear_schedule(4.0, 2.0, progress) for progress in (0.0, 0.25, 1.0)] == [4, 3.5, 2]
    assert linear_schedule(4.0, None, 0.5) == 4
    assert linear_schedule(4.0, 0.0, 0.5) == 2


# --- losses ----------------------------------------------------------------------------------------


def test_the_policy_gradient_loss_by_hand() -> None:
    logp, mask = f64([-1, -2], [-3, 99]).requires_grad_(), prefix_mask(2, 1, width=2)
    loss = policy_gradient_loss(logp, f64([2, -4], [6, 99]), mask)
    loss.backward()
    close(loss.detach(), -(2 * -1 + -4 * -2 + 6 * -3) / 3)
    close(logp.grad, f64([-2 / 3, 4 / 3], [-2, 0]))


def test_the_plain_value_loss_by_hand() -> None:
    values = f64([1, 3], [0, 99]).requires_grad_()
    loss = value_loss(values, f64([2, 3], [-4, 7]), prefix_mask(2, 1, width=2))
    loss.backward()
    close(loss.detach(), (1 + 0 + 16) / 6)
    close(values.grad, f64([-1 / 3, 0], [4 / 3, 0]))


def test_how_far_a_policy_has_moved() -> None:
    """Ratios 3/2, 1/2, 1: k3 of KL(old ‖ new) is ρ − 1 − ln ρ."""
    mask = prefix_mask(3, width=4)
    found = ratio_metrics(f64([1.5, 0.5, 1.0, 1e9]).log(), torch.zeros(1, 4, dtype=torch.float64), mask, clip=0.2)
    expected = {
        "approx_kl": (0.5 - math.log(1.5) - 0.5 + LN2) / 3,
        "clip_fraction": 2 / 3,
        "max_ratio": 1.5,
        "max_ratio_error": 0.5,
    }
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected)
    assert ratio_metrics(f64([1.5, 0.5, 1.0, 0]).log(), f64([1, 1, 1, 0]).log(), mask, 0.6)["clip_fraction"] == 0


def test_what_a_policy_has_moved_is_measured_without_a_gradient() -> None:
    logp = f64([-1, -2]).requires_grad_()
    found = ratio_metrics(logp, f64([-1, -1]), prefix_mask(2, width=2), 0.2)
    assert not any(value.requires_grad for value in found.values())


def test_the_ppo_clip_is_pessimistic() -> None:
    """ρ = 3/2, 1/2, 3/2, 1/2 with A = 2, 2, −2, −2: min gives 2.4 (clipped), 1, −3, −1.6 (clipped); mean −0.3."""
    logp = f64([1.5, 0.5, 1.5, 0.5, 7]).log().requires_grad_()
    advantages, mask = f64([2, 2, -2, -2, 7]), prefix_mask(4, width=5)
    loss = ppo_clip_loss(logp, torch.zeros_like(advantages), advantages, mask, clip=0.2)
    loss.backward()
    close(loss.detach(), 0.3)
    close(logp.grad, f64([0, -0.25, 0.75, 0, 0]))  # −ρA/4 where not clipped


def test_the_first_ppo_step_is_the_policy_gradient() -> None:
    logp = f64([-1, -2], [-3, -4]).requires_grad_()
    loss = ppo_clip_loss(logp, logp.detach(), f64([2, -4], [6, 99]), prefix_mask(2, 1, width=2))
    loss.backward()
    close(loss.detach(), -4 / 3)
    close(logp.grad, f64([-2 / 3, 4 / 3], [-2, 0]))


def test_the_value_loss_takes_the_worse_of_clipped_and_unclipped() -> None:
    """V_old = 0.5, ε = 0.2. V = 1, R = 2: max(1, 1.3²); V = 1, R = 0: max(1, 0.7²); V = 0.6, R = 0: 0.6² twice."""
    values = f64([1, 1, 0.6, 9]).requires_grad_()
    mask = prefix_mask(3, width=4)
    loss = clipped_value_loss(values, f64([0.5, 0.5, 0.5, 9]), f64([2, 0, 0, -9]), mask, clip=0.2)
    loss.backward()
    close(loss.detach(), (1.69 + 1 + 0.36) / 6)
    close(values.grad, f64([0, 1 / 3, 0.2, 0]))  # (V − R)/3 where the clip does not bind


# --- the adaptive coefficient ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),
        (6.6, 1.01),  # 10 % above target, a tenth of the horizon
        (5.4, 0.99),
        (60.0, 1.02),  # clipped at +20 %
        (-60.0, 0.98),  # clipped at −20 %
    ],
)
def test_beta_follows_the_kl(kl: float, factor: float) -> None:
    assert adaptive_beta_factor(kl, target=6.0, episodes=100, horizon=1000) == pytest.approx(factor, abs=1e-12)


@given(
    kl=st.floats(-100, 100),
    target=st.floats(0.01, 100),
    episodes=st.integers(1, 10_000),
    horizon=st.integers(1, 10_000),
)
def test_beta_grows_where_the_kl_is_too_large_and_by_a_fifth_at_most(
    kl: float, target: float, episodes: int, horizon: int
) -> None:
    factor = adaptive_beta_factor(kl, target, episodes, horizon)
    assert 0.8 <= factor <= 1.2
    assert (factor >= 1) if kl >= target else (factor <= 1)


def test_a_batch_larger_than_the_horizon_cannot_turn_beta_negative() -> None:
    assert adaptive_beta_factor(0.0, target=6.0, episodes=1000, horizon=100) == 0.8  # and not 1 − 0.2 · 10


# --- values from data ------------------------------------------------------------------------------


def test_the_expectile_loss_by_hand() -> None:
    """Too low by 2 costs 0.9 · 4, too high by 2 costs 0.1 · 4."""
    close(expectile_loss(f64([2, -2, 0])[0], 0.9), [3.6, 0.4, 0])
    close(expectile_loss(f64([2, -2, 0])[0], 0.5), [2, 2, 0])


@pytest.mark.parametrize("tau", [0.1, 0.5, 0.9])
def test_of_zeros_and_ones_the_expectile_is_tau(tau: float) -> None:
    """τ (1 − m) = (1 − τ) m at m = τ: towards 1 it goes to the best that occurs."""
    m = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
    expectile_loss(f64([0, 1])[0] - m, tau).sum().backward()
    close(m.grad, 0.0)


def test_the_conservative_loss_by_hand() -> None:
    q = f64([1, 2, 5]).log().requires_grad_()
    loss = conservative_loss(q, torch.tensor([2]))
    loss.sum().backward()
    close(loss.detach(), [math.log(8 / 5)])
    close(q.grad, f64([1 / 8, 2 / 8, 5 / 8 - 1]))  # descent lowers what was not chosen and raises what was


def test_the_soft_value_by_hand() -> None:
    """Q = ½ (ln 1, ln 3) at temperature ½: V = ½ ln 4, which π = (¼, ¾) attains as E[Q] + ½ H(π)."""
    q = 0.5 * f64([1, 3]).log()
    close(soft_value(q, 0.5), [0.5 * math.log(4)])
    policy = f64([0.25, 0.75])
    close((policy * q).sum() + 0.5 * entropy(policy.log()).sum(), 0.5 * math.log(4))
    assert soft_value(q, 1e-3).item() == pytest.approx(0.5 * math.log(3))  # nearly the largest


# --- sampling --------------------------------------------------------------------------------------


def test_inverse_cdf_sampling_by_hand() -> None:
    log_probs = f64([0.0, 0.5, 0.0, 0.25, 0.25, 0.0]).log().expand(6, 6)
    uniform = f64([0.0, 0.49, 0.5, 0.74, 0.75, 1 - 2**-53])[0]
    assert inverse_cdf_sample(log_probs, uniform).tolist() == [1, 1, 3, 3, 4, 4]


@given(seed=st.integers(0, 2**32 - 1))
def test_the_largest_uniform_never_draws_a_forbidden_token(seed: int) -> None:
    logits = torch.randn(64, 9, generator=torch.Generator().manual_seed(seed)) * 3
    logits[:, [0, 7, 8]] = -torch.inf
    for u in (0.0, 1 - 2**-24):
        drawn = inverse_cdf_sample(logits.log_softmax(-1), torch.full((64,), u))
        assert ((drawn >= 1) & (drawn <= 6)).all()


# --- padding never matters -------------------------------------------------------------------------

MASKED = {
    "masked_sum": lambda x, y, z, mask: masked_sum(x, mask),
    "masked_sum by row": lambda x, y, z, mask: masked_sum(x, mask, dim=1),
    "masked_mean": lambda x, y, z, mask: masked_mean(x, mask),
    "masked_var": lambda x, y, z, mask: masked_var(x, mask),
    "whiten": lambda x, y, z, mask: whiten(x, mask),
    "explained_variance": lambda x, y, z, mask: explained_variance(x, y, mask),
    "token_rewards token": lambda x, y, z, mask: token_rewards(x[:, 0], x, y, mask, 0.3),
    "token_rewards terminal": lambda x, y, z, mask: token_rewards(x[:, 0], x, y, mask, 0.3, placement="terminal"),
    "response_mean": lambda x, y, z, mask: response_mean(x, mask),
    "gae": lambda x, y, z, mask: gae(x, y, mask, 0.9, 0.8),
    "policy_gradient_loss": lambda x, y, z, mask: policy_gradient_loss(x, y, mask),
    "ppo_clip_terms": lambda x, y, z, mask: ppo_clip_terms(x, y, z, mask),
    "ppo_clip_loss": lambda x, y, z, mask: ppo_clip_loss(x, y, z, mask),
    "value_loss": lambda x, y, z, mask: value_loss(x, y, mask),
    "clipped_value_loss": lambda x, y, z, mask: clipped_value_loss(x, y, z, mask),
    "implicit_reward": lambda x, y, z, mask: implicit_reward(x, y, mask),
}


@pytest.mark.parametrize("poison", [1e6, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", MASKED)
def test_padding_reaches_neither_results_nor_gradients(name: str, poison: float) -> None:
    mask = prefix_mask(5, 2, 1, 4, width=5)
    inputs = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))

    def run(padding: float) -> tuple[Tensor, list[Tensor | None]]:
        x, y, z = (torch.where(mask, i, padding).requires_grad_() for i in inputs)
        result = MASKED[name](x, y, z, mask)
        weights = torch.arange(1.0, result.numel() + 1).reshape(result.shape)
        (result * weights).sum().backward()
        return result.detach(), [x.grad, y.grad, z.grad]

    (clean, clean_grads), (poisoned, poisoned_grads) = run(0.0), run(poison)
    assert clean.isfinite().all() and torch.equal(clean, poisoned)
    assert any(g is not None and g.abs().sum() > 0 for g in clean_grads)
    for expected, grad in zip(clean_grads, poisoned_grads, strict=True):
        if expected is None:
            assert grad is None
        else:
            assert grad is not None and torch.equal(expected, grad)
            assert grad[~mask].eq(0).all()


@pytest.mark.parametrize("poison", [1e6, math.inf, math.nan])
def test_padding_reaches_no_metric(poison: float) -> None:
    mask = prefix_mask(5, 2, width=5)
    logp, old = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(1))
    clean, poisoned = (
        ratio_metrics(torch.where(mask, logp, x), torch.where(mask, old, -x), mask, 0.2) for x in (0.0, poison)
    )
    assert clean == poisoned


# --- best of n -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_of_the_best_over_all_subsets(n):
    scores = torch.tensor([[0.3, -1.0, 2.0, 0.5, 0.3], [5.0, 4.0, 3.0, 2.0, 1.0]])
    expected = [sum(max(c) for c in combinations(row, n)) / math.comb(5, n) for row in scores.tolist()]
    torch.testing.assert_close(best_of_n(scores, n), torch.tensor(expected, dtype=torch.float64), atol=1e-7, rtol=0)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_by_one_number_is_worth_another(n):
    """What is chosen by score is paid in gold: the mean gold, over all subsets, of the draw whose score is best."""
    scores = torch.tensor([[0.3, -1.0, 2.0, 0.5, 0.4], [5.0, 4.0, 3.0, 2.0, 1.0]])
    gold = torch.tensor([[1.0, 9.0, -3.0, 2.0, 0.0], [0.0, 1.0, 5.0, 0.5, 7.0]])
    expected = [
        sum(values[max(subset, key=row.__getitem__)] for subset in combinations(range(5), n)) / math.comb(5, n)
        for row, values in zip(scores.tolist(), gold.tolist(), strict=True)
    ]
    found = best_of_n(scores, n, gold)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(best_of_n(scores, n, scores), best_of_n(scores, n), atol=0, rtol=0)
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(best_of_n(scores[:, order], n, gold[:, order]), found)


def test_best_of_n_of_thousands_does_not_overflow():
    """E[max of n uniform draws] = n / (n + 1); from the exact quantiles of a uniform distribution."""
    scores = (torch.arange(4096, dtype=torch.float64) + 1) / 4097
    assert float(best_of_n(scores, 1000)) == pytest.approx(1000 / 1001, abs=1e-6)
    with pytest.raises(ValueError, match="best of 5 cannot be estimated from 4"):
        best_of_n(scores[:4], 5)


def test_the_kl_of_best_of_n_by_hand() -> None:
    assert best_of_n_kl_bound(1) == 0
    close(torch.tensor(best_of_n_kl_bound(4)), math.log(4) - 0.75)


@pytest.mark.parametrize("n", [2, 16])
def test_the_kl_of_best_of_n_is_that_of_many_unlikely_responses(n: int) -> None:
    """Of M equally likely ones, the k-th best by score is best with probability (k/M)ⁿ − ((k − 1)/M)ⁿ."""
    k = torch.arange(1, 20_001, dtype=torch.float64) / 20_000
    best = k**n - (k - 1 / 20_000) ** n
    kl = float(torch.where(best > 0, best * (best * 20_000).log(), 0.0).sum())
    assert kl < best_of_n_kl_bound(n)
    assert kl == pytest.approx(best_of_n_kl_bound(n), abs=1e-3)


def test_the_share_that_a_response_beats() -> None:
    """(1 + wins)/(2 + M), ties won; each prompt's own others."""
    scores, others = f64([2, 0, 9], [2, 0, 9]), f64([1, 2, 3, 4], [0, 0, 0, 0])
    found, expected = log_win_share(scores, others), f64([3 / 6, 1 / 6, 5 / 6], [5 / 6, 5 / 6, 5 / 6])
    torch.testing.assert_close(found.exp(), expected)


# --- preferences -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("difference", "preference", "expected"),
    [
        (0.0, 1.0, LN2),
        (math.log(3), 1.0, math.log(4 / 3)),  # σ(ln 3) = 3/4
        (math.log(3), 0.0, math.log(4)),
        (math.log(3), 0.5, (math.log(4 / 3) + math.log(4)) / 2),
        (1000.0, 1.0, 0.0),
        (1000.0, 0.0, 1000.0),
        (-1000.0, 0.5, 500.0),
    ],
)
def test_bradley_terry_loss_by_hand(difference: float, preference: float, expected: float) -> None:
    loss = bradley_terry_loss(torch.tensor([difference]), torch.tensor([preference]))
    torch.testing.assert_close(loss, torch.tensor([expected]))


def test_bradley_terry_loss_keeps_its_digits_where_it_is_small() -> None:
    """−log σ(d) = log(1 + exp(−d)) ≈ exp(−20), of which log(σ(d)) in float32 knows nothing."""
    for difference, preference in ((20.0, 1.0), (-20.0, 0.0)):
        loss = bradley_terry_loss(torch.tensor(difference), torch.tensor(preference))
        assert float(loss) == pytest.approx(math.exp(-20), rel=1e-6)


@given(difference=st.floats(-50, 50), preference=st.sampled_from([0.0, 0.5, 1.0]))
def test_bradley_terry_loss_has_no_first_response_and_the_gradient_of_logistic_regression(
    difference: float, preference: float
) -> None:
    d = torch.tensor(difference, dtype=torch.float64, requires_grad=True)
    y = torch.tensor(preference, dtype=torch.float64)
    loss = bradley_terry_loss(d, y)
    torch.testing.assert_close(loss, bradley_terry_loss(-d, 1 - y), rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(loss, d)
    assert float(gradient) == pytest.approx(1 / (1 + math.exp(-difference)) - preference, abs=1e-12)


def test_the_implicit_reward_is_the_log_ratio_of_the_whole_response() -> None:
    logp, ref_logp = f64([-1, -2, -0.5], [-3, 99, 99]), f64([-1.5, -1, -1], [-1, 99, -99])
    assert implicit_reward(logp, ref_logp, prefix_mask(3, 1, width=3)).tolist() == [0, -2]  # 0.5 − 1 + 0.5; −3 + 1


def test_the_dpo_loss_by_hand() -> None:
    """d = ln 9, β = ½: the first is preferred with probability σ(ln 3) = ¾."""
    d = torch.full((4,), math.log(9), dtype=torch.float64)
    preference = f64([1, 0, 0.5, 0.75])[0]
    sure, surely_not = math.log(4 / 3), math.log(4)
    expected = [sure, surely_not, (sure + surely_not) / 2, 0.75 * sure + 0.25 * surely_not]
    close(dpo_loss(d, preference, 0.5), expected)
    close(dpo_loss(d, preference, torch.full((4,), 0.5, dtype=torch.float64)), expected)
    # One label in ten was turned over: what was 1 is 0.9, a tie stays a tie.
    close(
        dpo_loss(d, preference, 0.5, smoothing=0.1)[:3],
        [0.9 * sure + 0.1 * surely_not, 0.1 * sure + 0.9 * surely_not, expected[2]],
    )


@pytest.mark.parametrize(("smoothing", "optimum"), [(0.0, math.log(3)), (0.1, math.log(0.7 / 0.3))])
def test_where_the_dpo_loss_is_lowest(smoothing: float, optimum: float) -> None:
    """At the log-odds of the label over β: ln(p / (1 − p)); p = ¾ smoothed by a tenth is 0.7."""
    d = torch.tensor(optimum / 0.2, dtype=torch.float64, requires_grad=True)
    dpo_loss(d, torch.tensor(0.75, dtype=torch.float64), 0.2, smoothing).backward()
    close(d.grad, 0.0)


def test_the_ipo_loss_by_hand() -> None:
    """β = ¼: the preferred one is to lead by 2 nats."""
    d = f64([2, 2, 3, 0])[0]
    close(ipo_loss(d, f64([1, 0, 1, 0.5])[0], 0.25), [0, 16, 1, 4])
    d = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)  # (p − ½)/β, p = ¾
    ipo_loss(d, torch.tensor(0.75, dtype=torch.float64), 0.25).backward()
    close(d.grad, 0.0)


def test_the_kto_loss_by_hand() -> None:
    """β (r − z) = ½ (ln 9 + 1 − 1) = ln 3, σ of which is ¾: a good response has ¼ to gain, a bad one ¾ to lose."""
    r = torch.full((2,), math.log(9) + 1, dtype=torch.float64, requires_grad=True)
    z = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    loss = kto_loss(r, torch.tensor([True, False]), z, 0.5, lambda_d=2.0, lambda_u=4.0)
    close(loss.detach(), [0.5, 3])
    loss.sum().backward()
    close(r.grad, [-0.5 * 2 * 3 / 16, 0.5 * 4 * 3 / 16])  # β λ σ (1 − σ)
    assert z.grad is None
