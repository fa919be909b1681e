"""The mathematics of RLHF as pure functions of [B, T] tensors.

Conventions: `mask` is True where an entry counts. Index t belongs to the state *before* token t.
Log-probabilities are natural, KL is in nats, and rewards are in the units of the reward model's score.
Entries outside the mask may hold anything, NaN included: they never reach a result.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# --- masked statistics -----------------------------------------------------------------------------


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of the entries of `x` [B, T] that count."""
    kept = torch.where(mask, x, torch.zeros_like(x))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the entries of `x` [B, T] that count: one number, every token weighs the same."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def response_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over responses of the mean over their tokens of `x` [B, T]: a token of a long response weighs less."""
    return (masked_sum(x, mask, dim=1) / mask.sum(1).clamp(min=1)).mean()


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Population variance of the entries of `x` [B, T] that count."""
    x = torch.where(mask, x, torch.zeros_like(x))  # before the square, whose gradient would be 0 · NaN in the padding
    return masked_mean((x - masked_mean(x, mask)).square(), mask)


def whiten(x: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """Centre `x` [B, T] to mean 0 and scale it to variance 1 over the mask; 0 elsewhere.

    The mean is removed (`shift_mean=True` in lm-human-preferences, `utils/core.py`), with the population variance.
    """
    x = torch.where(mask, x, torch.zeros_like(x))
    centred = x - masked_mean(x, mask)
    return torch.where(mask, centred * torch.rsqrt(masked_var(x, mask) + eps), torch.zeros_like(x))


def explained_variance(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(target − prediction) / Var(target) over the mask: 1 is perfect, 0 no better than a constant.

    NaN where the target does not vary, since nothing is there to be explained.
    """
    # Not "variance > 0": the rounded mean of equal numbers may differ from them.
    varies = torch.where(mask, target, torch.inf).amin() < torch.where(mask, target, -torch.inf).amax()
    unexplained = masked_var(target - prediction, mask) / masked_var(target, mask)
    return torch.where(varies, 1 - unexplained, torch.full_like(unexplained, torch.nan))


# --- log-probabilities -----------------------------------------------------------------------------


def gather_logp(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each taken token: `log_probs` [..., V] at `tokens` [...] → [...]."""
    return log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def token_statistics(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each taken token and entropy in nats, from logits [..., V] at `tokens` [...] → [...], [...].

    As `gather_logp` and `entropy` of the log-softmax, without that tensor: log p_a = x_a − log Σ_v exp x_v, and
    H = log Σ_v exp x_v − Σ_v p_v x_v. What a gradient keeps is the logits alone.
    """
    return _TokenStatistics.apply(logits, tokens)  # type: ignore[return-value]


class _TokenStatistics(torch.autograd.Function):
    """With p = softmax(x): ∂ log p_a / ∂x_v = [v = a] − p_v, and ∂H / ∂x_v = −p_v (log p_v + H)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        log_p = logits.log_softmax(-1)
        ctx.save_for_backward(logits, tokens)
        ctx.set_materialize_grads(False)
        return gather_logp(log_p, tokens), entropy(log_p)

    @staticmethod
    def backward(ctx: Any, to_logp: Tensor | None, to_entropy: Tensor | None) -> tuple[Tensor | None, None]:  # type: ignore[override]
        logits, tokens = ctx.saved_tensors  # from which all else is made anew: so it can be differentiated again
        p, gradient = logits.softmax(-1), None
        if to_logp is not None:
            gradient = (p * -to_logp.unsqueeze(-1)).scatter_add(-1, tokens.unsqueeze(-1), to_logp.unsqueeze(-1))
        # Losses weigh the entropy by 0 more often than not; who differentiates again may yet ask about that 0.
        if to_entropy is not None and (torch.is_grad_enabled() or to_entropy.any()):
            log_p = logits.log_softmax(-1)
            of_entropy = -p * (_finite(log_p) + entropy(log_p).unsqueeze(-1)) * to_entropy.unsqueeze(-1)
            gradient = of_entropy if gradient is None else gradient + of_entropy
        return gradient, None


def restrict(log_probs: Tensor, candidates: Tensor) -> Tensor:
    """The distribution conditioned on being one of `candidates`: [..., V], int64 [..., K] → [..., V].

    −1 names no token; all others have probability 0. Where there is no candidate at all, nothing is left out.
    """
    named = torch.zeros_like(log_probs[..., :1], dtype=torch.bool).expand(
        *log_probs.shape[:-1], log_probs.shape[-1] + 1
    )
    named = named.scatter(-1, torch.where(candidates < 0, log_probs.shape[-1], candidates), True)[..., :-1]
    kept = named | ~named.any(-1, keepdim=True)
    return log_probs.masked_fill(~kept, -torch.inf).log_softmax(-1)


def entropy(log_probs: Tensor) -> Tensor:
    """−Σ_v p_v log p_v in nats over the last axis: [..., V] → [...]; forbidden tokens (−∞) contribute 0."""
    return -torch.linalg.vecdot(log_probs.exp(), _finite(log_probs))


def _finite(log_probs: Tensor) -> Tensor:
    return log_probs.clamp(min=torch.finfo(log_probs.dtype).min)


# --- KL divergence ---------------------------------------------------------------------------------
# Estimators of KL(π ‖ ref) from tokens sampled by π: Schulman, http://joschu.net/blog/kl-approx.html.
# Before using one as a loss, set the padding of both inputs to 0: a padded −∞ would reach the gradient.


def kl_k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """log π − log ref: unbiased, of either sign; the only one whose gradient *as a reward* is exact."""
    return logp - ref_logp


def kl_k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """½ (log π − log ref)²: biased, low variance; of whole responses, its gradient on-policy is that of their KL.

    Taken of each token, as losses do, the gradient lacks what a token does to the KL of later ones.
    """
    return 0.5 * (logp - ref_logp).square()


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """exp(−Δ) − 1 + Δ with Δ = log π − log ref: unbiased and never negative."""
    delta = logp - ref_logp
    return torch.expm1(-delta) + delta


def kl_full(log_probs: Tensor, ref_log_probs: Tensor) -> Tensor:
    """Exact KL of two next-token distributions, Σ_v π_v (log π_v − log ref_v): [..., V] → [...], in nats."""
    difference = torch.where(log_probs > -torch.inf, log_probs - ref_log_probs, torch.zeros_like(log_probs))
    return (log_probs.exp() * difference).sum(-1)


# --- rewards, returns, advantages ------------------------------------------------------------------


def token_rewards(
    score: Tensor, logp: Tensor, ref_logp: Tensor, mask: Tensor, beta: Tensor | float, *, placement: str = "token"
) -> Tensor:
    """Per-token rewards [B, T] whose sum over a response is score − β Σ_t (logp_t − ref_logp_t).

    `score` [B] lands on the last token that counts. `placement="token"` charges β (logp − ref_logp) at each token
    (Ziegler et al. 2019, arXiv 1909.08593, eq. 2; lm-human-preferences `compute_rewards`), `"terminal"` the whole sum
    on the last token. `beta` is a number or [B].
    """
    beta = torch.as_tensor(beta, dtype=logp.dtype, device=logp.device)
    kl = torch.where(mask, kl_k1(logp, ref_logp), torch.zeros_like(logp))  # [B, T]
    last = last_token(mask)
    if placement == "terminal":
        return torch.where(last, (score - beta * kl.sum(1)).unsqueeze(1), torch.zeros_like(kl))
    if placement != "token":
        raise ValueError(f"kl_placement must be 'token' or 'terminal', got {placement!r}")
    return -beta.reshape(-1, 1) * kl + torch.where(last, score.unsqueeze(1).to(kl.dtype), torch.zeros_like(kl))


def last_token(mask: Tensor) -> Tensor:
    """True at the last entry that counts in each row: bool [B, T], for masks that are a prefix of the row."""
    following = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    return mask & ~following


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> Tensor:
    """Generalised advantage estimation [B, T] for episodes that end at their last token that counts.

    δ_t = r_t + γ V(s_{t+1}) − V(s_t),  A_t = δ_t + γλ A_{t+1},  V(after the last token) = 0.
    Schulman et al. 2016, arXiv 1506.02438, eq. 16. `values[:, t]` is the value of the state before token t.
    """
    zero = torch.zeros_like(rewards)
    rewards, values = torch.where(mask, rewards, zero), torch.where(mask, values, zero)
    advantages, next_value, next_advantage = zero.clone(), zero[:, 0], zero[:, 0]
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # Past the end of a row δ = 0 and the carried values are 0, so nothing leaks in from the padding.
        next_advantage = torch.where(mask[:, t], delta + gamma * lam * next_advantage, zero[:, 0])
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages


def policy_gradient_loss(logp: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """−mean_t A_t log π_t, whose gradient is the policy gradient; Williams 1992, eq. 11. Inputs [B, T].

    Every token that counts weighs the same: the gradient of Σ_t A_t log π_t, per token of the batch. Where lengths
    differ that is a ratio of two estimates, and its direction is exact only as the batch grows.
    """
    logp, advantages = (torch.where(mask, x, torch.zeros_like(x)) for x in (logp, advantages))
    return -masked_mean(advantages * logp, mask)


def leave_one_out(x: Tensor, group_size: int) -> Tensor:
    """The mean of the other members of each one's group: [B] → [B], groups being rows in succession.

    A baseline that does not depend on the response it is subtracted for, so it biases no gradient; Kool et al. 2019,
    "Buy 4 REINFORCE samples, get a baseline for free!"; Ahmadian et al. 2024, arXiv 2402.14740, §2.3.
    """
    groups = x.reshape(-1, group_size)
    return ((groups.sum(1, keepdim=True) - groups) / (group_size - 1)).reshape(-1)


def group_advantages(x: Tensor, group_size: int, *, scale: bool, eps: float = 1e-4) -> Tensor:
    """What each member is above the mean of its group, [B] → [B]; with `scale` in units of the group's deviation.

    Shao et al. 2024 (GRPO), arXiv 2402.03300, §4.1.2. The mean contains the member itself, which shrinks the gradient
    by (K − 1)/K; the deviation (of K, with K − 1 in the denominator) makes a group whose members hardly differ count as
    much as any other, which moves the optimum (Liu et al. 2025, arXiv 2503.20783, §3.1).
    """
    groups = x.reshape(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + eps) if scale else centred).reshape(-1)


def linear_schedule(start: float, end: float | None, progress: float) -> float:
    """`start` at progress 0, `end` at 1, in a straight line; `start` throughout where `end` is none."""
    return start if end is None else start + (end - start) * progress


def ppo_clip_terms(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2) -> Tensor:
    """Clipped surrogate of every token, min(ρ A, clip(ρ, 1−ε, 1+ε) A) with ρ = exp(logp − old_logp), [B, T].

    Schulman et al. 2017, arXiv 1707.06347, eq. 7. `advantages` are [B, T] or [B, 1].
    """
    zero = torch.zeros_like(logp)  # masked before any product, so that padding cannot reach a gradient either
    ratio, advantages = torch.where(mask, logp - old_logp, zero).exp(), torch.where(mask, advantages, zero)
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def ppo_clip_loss(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, clip: float = 0.2) -> Tensor:
    """Minus the mean of `ppo_clip_terms`, for descent; every token that counts weighs the same."""
    return -masked_mean(ppo_clip_terms(logp, old_logp, advantages, mask, clip), mask)


def ratio_metrics(logp: Tensor, old_logp: Tensor, mask: Tensor, clip: float) -> dict[str, Tensor]:
    """How far a policy has moved from the one that sampled, from log-probabilities [B, T] of the sampled tokens.

    `approx_kl` is the k3 estimate of KL(old ‖ new) in nats per token, `clip_fraction` the share of tokens whose ratio
    is outside 1 ± `clip`, `max_ratio` the largest ratio and `max_ratio_error` its largest distance from 1.
    """
    logp = logp.detach()
    ratio = torch.where(mask, logp - old_logp, 0.0).exp()
    return {
        "approx_kl": masked_mean(kl_k3(old_logp, logp), mask),
        "clip_fraction": masked_mean(((ratio - 1).abs() > clip).float(), mask),
        "max_ratio": ratio.max(),
        "max_ratio_error": (ratio - 1).abs().max(),
    }


def value_loss(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """½ mean_t (V − R)². Inputs [B, T]."""
    return 0.5 * masked_mean(torch.where(mask, values - returns, torch.zeros_like(values)).square(), mask)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float = 0.2) -> Tensor:
    """½ mean_t max((V − R)², (V_old + clip(V − V_old, −ε, ε) − R)²); lm-human-preferences `ppo.py`, `loss`."""
    zero = torch.zeros_like(values)  # masked before any product, so that padding cannot reach a gradient either
    values, old_values, returns = (torch.where(mask, x, zero) for x in (values, old_values, returns))
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * masked_mean(torch.maximum((values - returns).square(), (clipped - returns).square()), mask)


def adaptive_beta_factor(kl: float, target: float, episodes: int, horizon: int) -> float:
    """Factor by which β grows after `episodes` episodes whose mean KL was `kl` nats per sequence.

    1 + clip(kl / target − 1, −0.2, 0.2) · episodes / horizon; Ziegler et al. 2019, arXiv 1909.08593, §2.2.
    `horizon` counts episodes; more of them at once than that count as `horizon`, or β could turn negative.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return 1.0 + error * min(episodes / horizon, 1.0)


# --- values from data ------------------------------------------------------------------------------


def expectile_loss(difference: Tensor, tau: float) -> Tensor:
    """τ u² where u = target − prediction is positive, (1 − τ) u² elsewhere: minimal at the τ-expectile of the targets.

    At ½ that is the mean; towards 1 it goes to the largest target that occurs. Kostrikov et al. 2021, arXiv 2110.06169.
    """
    return (tau - (difference < 0).to(difference.dtype)).abs() * difference.square()


def conservative_loss(q: Tensor, actions: Tensor) -> Tensor:
    """log Σ_v exp(Q_v) − Q_a: [..., V], int64 [...] → [...]; lowers Q where the data have not been.

    Kumar et al. 2020 (CQL), arXiv 2006.04779, eq. 4; Snell et al. 2022 (ILQL), arXiv 2206.11871.
    """
    return q.logsumexp(-1) - gather_logp(q, actions)


def soft_value(q: Tensor, beta: float) -> Tensor:
    """β log Σ_v exp(Q_v / β), the value of choosing with probability ∝ exp(Q/β): [..., V] → [...].

    It is max_π E_π[Q] + β·entropy(π). Where Q holds +β log ref it is the value of the KL-regularised task. Haarnoja et
    al. 2017, arXiv 1702.08165, eq. 5.
    """
    return beta * (q / beta).logsumexp(-1)


# --- preferences -----------------------------------------------------------------------------------


def bradley_terry_loss(difference: Tensor, preference: Tensor) -> Tensor:
    """−[y log σ(d) + (1 − y) log σ(−d)] in nats, elementwise, of score differences d and preferences y in [0, 1].

    σ(d) is the probability that the first of two is preferred (Bradley & Terry 1952); y = 1 where it was, 0 where the
    second was, 0.5 for a tie (Christiano et al. 2017, arXiv 1706.03741, eq. 1).
    """
    log_sigmoid = torch.nn.functional.logsigmoid
    return -(preference * log_sigmoid(difference) + (1 - preference) * log_sigmoid(-difference))


def implicit_reward(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """Σ_t (log π_t − log ref_t) of each response, [B, T] → [B]: β times it is the reward that π is optimal for, but for
    a constant per prompt. Rafailov et al. 2023, arXiv 2305.18290, eq. 5.
    """
    return masked_sum(logp - ref_logp, mask, dim=1)


def dpo_loss(difference: Tensor, preference: Tensor, beta: float | Tensor, smoothing: float = 0.0) -> Tensor:
    """The Bradley–Terry loss of implicit rewards: −log σ(β d) where the first is preferred, [B] → [B], in nats.

    d = log(π/ref)(first) − log(π/ref)(second). Rafailov et al. 2023, arXiv 2305.18290, eq. 7; `preference` in [0, 1] is
    the probability that the first one is preferred, `smoothing` that of a label which was turned over (Mitchell 2023,
    "A note on DPO with noisy preferences", eq. 3).
    """
    return bradley_terry_loss(beta * difference, preference * (1 - 2 * smoothing) + smoothing)


def ipo_loss(difference: Tensor, preference: Tensor, beta: float) -> Tensor:
    """Squared distance of d from 1/(2β) where the first is preferred, from −1/(2β) where the second is, [B] → [B].

    Azar et al. 2023, arXiv 2310.12036, eq. 17, in expectation over a soft `preference` for the first in [0, 1]. A
    single pair's optimum is d = (p − ½)/β, finite for p = 1, where DPO's is not.
    """
    target = 1 / (2 * beta)
    return preference * (difference - target).square() + (1 - preference) * (difference + target).square()


def kto_loss(
    log_ratio: Tensor, desirable: Tensor, baseline: Tensor, beta: float, lambda_d: float = 1.0, lambda_u: float = 1.0
) -> Tensor:
    """λ_D (1 − σ(β (r − z))) of desirable responses, λ_U (1 − σ(β (z − r))) of others: [B] → [B].

    r = log(π/ref) of the response, z = the KL of the policy to the reference, `baseline`, through which no gradient
    flows. Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8.
    """
    gain = beta * (log_ratio - baseline.detach())
    return torch.where(desirable, lambda_d * torch.sigmoid(-gain), lambda_u * torch.sigmoid(gain))


# --- sampling --------------------------------------------------------------------------------------


def inverse_cdf_sample(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """Draw one token per row: the first v with Σ_{u ≤ v} p_u > `uniform`; [N, V], [N] in [0, 1) → int64 [N].

    One uniform number decides one token, so a sample depends on its own row and number only, never on batch mates,
    and no token of probability 0 is ever drawn.
    """
    cumulative = log_probs.exp().cumsum(-1)
    total = cumulative[:, -1:]
    # Rounding may carry the largest uniforms to the total: kept below it, they mean the last token that adds to it.
    sought = torch.minimum(uniform.unsqueeze(-1) * total, total.nextafter(torch.zeros_like(total)))
    drawn = torch.searchsorted(cumulative, sought, right=True).squeeze(-1)
    return drawn.clamp(max=log_probs.shape[-1] - 1)  # a token also where NaN leaves none, for others to find it


def best_of_n(scores: Tensor, n: int, values: Tensor | None = None) -> Tensor:
    """Unbiased estimate of the expected best of `n` draws, from N ≥ n draws: [..., N] → [...].

    Σ_i s_(i) C(i − 1, n − 1) / C(N, n) over the sorted scores: the mean of the best over all subsets of size n
    (Nakano et al. 2021, arXiv 2112.09332). With `values` [..., N], the mean value of the draw whose score is best.
    """
    total = scores.shape[-1]
    if not 1 <= n <= total:
        raise ValueError(f"the best of {n} cannot be estimated from {total} draws")
    rank = torch.arange(n, total + 1, dtype=torch.float64)  # the n − 1 lowest are never the best
    log_weight = log_choose(rank - 1, n - 1) - log_choose(torch.tensor(float(total), dtype=torch.float64), n)
    by_score = (scores if values is None else values).gather(-1, torch.sort(scores, dim=-1, stable=True).indices)
    return (by_score[..., n - 1 :].double() * log_weight.exp().to(scores.device)).sum(-1)


def best_of_n_kl_bound(n: int) -> float:
    """log n − (n − 1)/n: the KL of best-of-n to what it draws from is never more, in nats per sequence.

    Equal where no two responses score alike and none is likely; Beirami et al. 2024, arXiv 2401.01879.
    """
    return math.log(n) - (n - 1) / n


def log_win_share(scores: Tensor, others: Tensor) -> Tensor:
    """log of the share of `others` [..., M] that score no higher than each of `scores` [..., K]: [..., K].

    One pseudo-count each way, (1 + wins)/(2 + M), keeps it finite. The distribution function that best-of-n raises to
    the power n (Sessa et al. 2024 (BOND), arXiv 2407.14622).
    """
    wins = (others.unsqueeze(-2) <= scores.unsqueeze(-1)).to(scores.dtype).sum(-1)
    return ((1.0 + wins) / (2.0 + others.shape[-1])).log()


def log_choose(n: Tensor, k: int) -> Tensor:
    """log C(n, k), elementwise in float64."""
    return torch.lgamma(n + 1) - torch.lgamma(torch.tensor(k + 1.0, dtype=torch.float64)) - torch.lgamma(n - k + 1)
