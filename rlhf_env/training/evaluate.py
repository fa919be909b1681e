"""How good is a policy: score, KL, length, diversity, perplexity and win rate, with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf_env import processes
from rlhf_env.envs.binding import find_cores
from rlhf_env.envs.rewards import scores_of
from rlhf_env.envs.task import ScoreFn, TextTask
from rlhf_env.errors import DataError
from rlhf_env.functional import best_of_n, best_of_n_kl_bound, gae, kl_k2, kl_k3, masked_sum
from rlhf_env.intervals import mean_interval, rate_interval
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.sampling import Responder
from rlhf_env.models.scoring import full_kl, teacher_forced_logp
from rlhf_env.models.sharding import gathered
from rlhf_env.training.collect import collect
from rlhf_env.types import Policy, RewardModel, Rollout

_SHOWN = 12  # responses of which every token's numbers are kept
_MOST_NATS = 88.0  # exp of more is infinite in float32, and no file of records holds that


@dataclass(frozen=True)
class Evaluation:
    """Numbers, and the samples they are about."""

    metrics: dict[str, float]  # `name` and, where it is a mean, `name_low` and `name_high`, its 95 % interval
    samples: list[dict[str, Any]]  # one row per prompt: prompt, response, score, kl and the reference's response
    tokens: list[dict[str, Any]]  # of the first prompts: every token's numbers, of "policy" and of "reference"
    best_of: list[dict[str, float]] = field(default_factory=list)  # rows of `best_of_n_path`, where it was asked for


@gathered()
def evaluate(
    policy: Policy | Responder,
    envs: Any,
    prompts: Sequence[str] | None = None,
    *,
    episodes: int = 256,
    seed: int = 1_000_003,
    gold: RewardModel | ScoreFn | None = None,
    text: str | None = None,
    greedy: bool = False,
    best_of: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Sample one response to each prompt and measure them, beside the reference's responses to the same prompts.

    Of a policy that is a `Responder`, `kl_full` and the `ratio` of the reference's tokens cannot be known and are left
    out; its log-probabilities, and so `kl`, are what it says; and its random numbers are its own.

    With `best_of` n, the policy's response is the one of n draws that has the highest score (of equals the first).
    What the KL of such a choice is, no log-ratio says; `kl_bound`, in place of `kl` and its kin, is log n − (n − 1)/n
    nats, which the KL to the policy that drew never exceeds (Beirami et al. 2024, arXiv 2401.01879).

    Metrics: `score`, `gold` (where a true reward is given), `penalty` (where the task has any), `kl` (nats per sequence
    to the reference, by the estimators k1, `kl_k2` and `kl_k3`, and `kl_full`: summed over the vocabulary in every
    state that was visited), `length`, `eos_rate`, `distinct_1` and `distinct_2` (distinct share of token n-grams over
    all responses), `perplexity` of `text` per token, and `win_rate` against the reference by the score (ties count
    half), with 95 % intervals: normal for means, Wilson for rates. What is measured of the reference's responses is
    called `reference_score` and so on. The reference draws with the same random numbers, so equal policies give equal
    texts.
    """
    core = find_cores(envs)[0]
    task, beta = core.task, core.beta_state()
    if prompts is None:
        prompts, _ = task.prompts_at(seed, 0, episodes)
    drawn = [prompt for prompt in prompts for _ in range(best_of)]
    own = collect(policy, envs, drawn, seed=seed, greedy=greedy, progress=progress)
    if best_of > 1:
        own = own[torch.arange(len(prompts)) * best_of + own.score.cpu().reshape(-1, best_of).argmax(1)]
    samples = _rows(task, prompts, own, gold)
    metrics = _measured(task, own, samples)
    shown = own[slice(0, _SHOWN)]
    tokens = [
        {"prompt": row["prompt"], "policy": numbers}
        for row, numbers in zip(samples, token_rows(task, shown), strict=False)
    ]
    if task.uses_reference:
        assert task.reference is not None
        if best_of > 1:
            metrics["kl_bound"] = best_of_n_kl_bound(best_of)
        elif not greedy:  # the log-ratio of the most probable tokens is no estimate of the KL
            metrics |= mean_interval("kl", own.kl.numpy(force=True))
            for name, estimator in (("kl_k2", kl_k2), ("kl_k3", kl_k3)):
                nats = masked_sum(estimator(own.logp, own.ref_logp), own.response_mask, dim=1)
                metrics |= mean_interval(name, nats.numpy(force=True))
            if all(hasattr(model, "response_log_probs") for model in (policy, task.reference)):
                metrics |= mean_interval("kl_full", full_kl(policy, task.reference, own).numpy(force=True))
        theirs = collect(task.reference, envs, prompts, seed=seed, greedy=greedy, progress=progress)
        others = _rows(task, prompts, theirs, gold)
        metrics |= {f"reference_{name}": value for name, value in _measured(task, theirs, others).items()}
        difference = (own.score - theirs.score).numpy(force=True)
        wins = float((difference > 0).sum() + 0.5 * (difference == 0).sum())
        metrics |= rate_interval("win_rate", wins, len(own))
        for row, other, kl in zip(samples, others, own.kl.tolist(), strict=True):
            row |= {} if best_of > 1 else {"kl": kl}
            row |= {f"reference_{name}": value for name, value in other.items() if name != "prompt"}
        shown = theirs[slice(0, _SHOWN)]
        if isinstance(policy, Responder):
            rows = token_rows(task, shown)
            for row in rows:
                del row["numbers"]["ratio"]
        else:
            rows = token_rows(task, shown, teacher_forced_logp(policy, shown) - shown.ref_logp)
        for row, other, numbers in zip(tokens, others, rows, strict=False):
            row["reference"] = {**numbers, "facts": _facts(other)}
    for row, sample in zip(tokens, samples, strict=False):
        row["policy"]["facts"] = _facts(sample)
    core.load_beta_state(beta)  # evaluation is not part of training: an adaptive or scheduled β takes no note of it
    if text is not None:
        metrics["perplexity"] = perplexity(policy, task, text)
    return Evaluation(metrics, samples, tokens)


def token_rows(task: TextTask, rollout: Rollout, log_ratio: Tensor | None = None) -> list[dict[str, Any]]:
    """What every token of each response was worth: its text (`pieces`) and numbers, each a list over tokens.

    `reward` as the agent receives it, `kl` = log π − log ref, `value` before the token, `advantage` = reward still to
    come − value, `ratio` = π(token) / ref(token), whose logarithm is `kl` unless given, [B, T].
    """
    kl = rollout.logp - rollout.ref_logp
    numbers = {
        "reward": rollout.reward,
        "kl": kl,
        "value": rollout.values,
        "advantage": gae(rollout.reward, rollout.values, rollout.response_mask, gamma=1.0, lam=1.0),
        "ratio": (kl if log_ratio is None else log_ratio).clamp(max=_MOST_NATS).exp(),
    }
    return [
        {
            "pieces": task.codec.pieces(rollout.response_ids[row][mask].tolist()),
            "numbers": {name: number[row][mask].tolist() for name, number in numbers.items()},
        }
        for row, mask in enumerate(rollout.response_mask)
    ]


def best_of_n_path(scores: Tensor, gold: Tensor | None = None, *, most: int | None = None) -> list[dict[str, float]]:
    """Best of n = 1, 2, 4, … by the score, from N draws of the reference per prompt; `scores` and `gold` [prompts, N].

    Rows of `n`, `score`, `gold` (of the response whose score is best) with intervals over prompts, and `kl_bound` =
    log n − (n − 1)/n, which the KL of best-of-n never exceeds (Beirami et al. 2024, arXiv 2401.01879).
    """
    rows, n = [], 1
    while n <= (most or scores.shape[1]):
        row = {"n": n, "kl_bound": best_of_n_kl_bound(n)}
        row |= mean_interval("score", best_of_n(scores, n).numpy())
        if gold is not None:
            row |= mean_interval("gold", best_of_n(scores, n, gold).numpy())
        rows, n = [*rows, row], 2 * n
    return rows


def _facts(row: dict[str, Any]) -> dict[str, float]:
    return {name: row[name] for name in ("score", "gold", "kl", "length") if name in row}


def _measured(task: TextTask, rollout: Rollout, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    gold = {} if "gold" not in rows[0] else mean_interval("gold", [row["gold"] for row in rows])
    penalized = task.missing_eos_penalty or task.length_penalty
    return {
        **mean_interval("score", rollout.score.numpy(force=True)),
        **(mean_interval("penalty", rollout.penalty.numpy(force=True)) if penalized else {}),
        **gold,
        **mean_interval("length", rollout.lengths.numpy(force=True)),
        **rate_interval("eos_rate", float(rollout.ended.sum()), len(rollout)),
        "distinct_1": distinct_n(rollout, 1),
        "distinct_2": distinct_n(rollout, 2),
    }


def distinct_n(rollout: Rollout, n: int) -> float:
    """Distinct n-grams of tokens as a share of all in the responses; 1 = no repeats (Li et al. 2016, 1510.03055)."""
    grams = [
        tuple(ids[i : i + n])
        for ids in (row[m].tolist() for row, m in zip(rollout.response_ids, rollout.response_mask, strict=True))
        for i in range(len(ids) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 1.0


@torch.no_grad()
def perplexity(policy: Policy | Responder, task: TextTask, text: str) -> float:
    """exp of the mean negative log-likelihood per token of `text`, in windows that fit the model's context.

    Each window's first token is only conditioned on; the sampling law (temperature, bans) does not apply.
    """
    if not isinstance(policy, CausalLM):
        raise TypeError(f"perplexity needs a CausalLM, got {type(policy).__name__}")
    ids = task.codec.encode_prompt(text)
    if len(ids) < 2:
        raise DataError("perplexity needs a text of at least two tokens")
    window = min(policy.context_length or 1024, 1024)
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, window - 1):
        piece = torch.tensor([ids[start : start + window]], device=policy.device)
        logits, _ = policy(piece, torch.ones_like(piece, dtype=torch.bool))
        log_probs = logits[0, :-1].float().log_softmax(-1)
        total -= float(log_probs.gather(-1, piece[0, 1:, None]).sum())
        count += piece.shape[1] - 1
    return math.exp(total / count)


def response_texts(task: TextTask, rollout: Rollout) -> list[str]:
    """The text of each response."""
    prompts, responses = (
        [row[mask].tolist() for row, mask in zip(ids, masks, strict=True)]
        for ids, masks in ((rollout.prompt_ids, rollout.prompt_mask), (rollout.response_ids, rollout.response_mask))
    )
    return task.codec.decode_responses(prompts, responses)


def _rows(
    task: TextTask, prompts: Sequence[str], rollout: Rollout, gold: RewardModel | ScoreFn | None
) -> list[dict[str, Any]]:
    texts = response_texts(task, rollout)
    rows = [
        {"prompt": prompt, "response": text, "score": score, "length": length}
        for prompt, text, score, length in zip(
            prompts, texts, rollout.score.tolist(), rollout.lengths.tolist(), strict=True
        )
    ]
    if gold is not None:
        true = processes.agreed(lambda: scores_of(gold, list(prompts), texts))
        for row, value in zip(rows, true.tolist(), strict=True):
            row["gold"] = value
    return rows
