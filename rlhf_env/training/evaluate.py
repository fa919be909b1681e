"""How good is a policy: score, KL, length, diversity, perplexity and win rate, with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_env.envs.binding import find_cores
from rlhf_env.envs.rewards import scores_of
from rlhf_env.envs.task import ScoreFn, TextTask
from rlhf_env.errors import DataError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.text.prompts import prompt_indices
from rlhf_env.training.collect import collect
from rlhf_env.types import Policy, RewardModel, Rollout

Z95 = 1.959963984540054  # the 97.5 % point of the normal distribution


@dataclass(frozen=True)
class Evaluation:
    """Numbers, and the samples they are about."""

    metrics: dict[str, float]  # `name` and, where it is a mean, `name_low` and `name_high`, its 95 % interval
    samples: list[dict[str, Any]]  # one row per prompt: prompt, response, score, kl and the reference's response


def evaluate(
    policy: Policy,
    envs: Any,
    prompts: Sequence[str] | None = None,
    *,
    episodes: int = 256,
    seed: int = 1_000_003,
    gold: RewardModel | ScoreFn | None = None,
    text: str | None = None,
    greedy: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Sample one response to each prompt and measure them, beside the reference's responses to the same prompts.

    Metrics: `score`, `gold` (where a true reward is given), `kl` (nats per sequence to the reference), `length`,
    `eos_rate`, `distinct_1` and `distinct_2` (distinct share of token n-grams over all responses), `perplexity` of
    `text` per token, and `win_rate` against the reference by the score (ties count half), with 95 % intervals: normal
    for means, Wilson for rates. The reference draws with the same random numbers, so equal policies give equal texts.
    """
    core = find_cores(envs)[0]
    task, beta = core.task, core.beta
    if prompts is None:
        prompts = [task.prompts[row] for row in prompt_indices(seed, 0, episodes, len(task.prompts))]
    own = collect(policy, envs, prompts, seed=seed, greedy=greedy, progress=progress)
    metrics = {
        **mean_interval("score", own.score.numpy(force=True)),
        **mean_interval("length", own.lengths.numpy(force=True)),
        **rate_interval("eos_rate", float(own.ended.sum()), len(own)),
        "distinct_1": distinct_n(own, 1),
        "distinct_2": distinct_n(own, 2),
    }
    samples = _rows(task, prompts, own)
    if gold is not None:
        true = scores_of(gold, list(prompts), [s["response"] for s in samples])
        metrics |= mean_interval("gold", true)
        for row, value in zip(samples, true.tolist(), strict=True):
            row["gold"] = value
    if task.uses_reference:
        assert task.reference is not None
        if not greedy:  # the log-ratio of the most probable tokens is no estimate of the KL
            metrics |= mean_interval("kl", own.kl.numpy(force=True))
        theirs = collect(task.reference, envs, prompts, seed=seed, greedy=greedy, progress=progress)
        metrics["reference_score"] = float(theirs.score.mean())
        difference = (own.score - theirs.score).numpy(force=True)
        wins = float((difference > 0).sum() + 0.5 * (difference == 0).sum())
        metrics |= rate_interval("win_rate", wins, len(own))
        for row, other, kl in zip(samples, _rows(task, prompts, theirs), own.kl.tolist(), strict=True):
            row |= {"kl": kl, "reference_response": other["response"], "reference_score": other["score"]}
    core.beta = beta  # an adaptive β does not learn from evaluation
    if text is not None:
        metrics["perplexity"] = perplexity(policy, task, text)
    return Evaluation(metrics, samples)


def mean_interval(name: str, x: NDArray[Any]) -> dict[str, float]:
    """Mean of independent values and its normal 95 % interval; no interval for a single value."""
    x = np.asarray(x, dtype=np.float64)
    mean = float(x.mean())
    if len(x) < 2:
        return {name: mean}
    half = Z95 * float(x.std(ddof=1)) / math.sqrt(len(x))
    return {name: mean, f"{name}_low": mean - half, f"{name}_high": mean + half}


def rate_interval(name: str, successes: float, n: int) -> dict[str, float]:
    """Share of successes and its 95 % interval by Wilson (1927), which stays within [0, 1] and works at 0 and 1."""
    rate, z2 = successes / n, Z95 * Z95
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return {name: rate, f"{name}_low": centre - half, f"{name}_high": centre + half}


def distinct_n(rollout: Rollout, n: int) -> float:
    """Distinct n-grams of tokens as a share of all in the responses; 1 = no repeats (Li et al. 2016, 1510.03055)."""
    grams = [
        tuple(ids[i : i + n])
        for ids in (row[m].tolist() for row, m in zip(rollout.response_ids, rollout.response_mask, strict=True))
        for i in range(len(ids) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 1.0


@torch.no_grad()
def perplexity(policy: Policy, task: TextTask, text: str) -> float:
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


def _rows(task: TextTask, prompts: Sequence[str], rollout: Rollout) -> list[dict[str, Any]]:
    before = [row[m].tolist() for row, m in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    responses = [row[m].tolist() for row, m in zip(rollout.response_ids, rollout.response_mask, strict=True)]
    texts = task.codec.decode_responses(before, responses)
    return [
        {"prompt": prompt, "response": text, "score": score, "length": length}
        for prompt, text, score, length in zip(
            prompts, texts, rollout.score.tolist(), rollout.lengths.tolist(), strict=True
        )
    ]
