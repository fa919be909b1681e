"""Evaluating and generating, from settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_env.errors import DataError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.records.config import to_dict
from rlhf_env.records.run import Run, require_free
from rlhf_env.reward_models.load import load_reward
from rlhf_env.text.prompts import load_prompts
from rlhf_env.training.assemble import load_reference, make_envs, parse_device
from rlhf_env.training.collect import collect
from rlhf_env.training.config import EvaluateConfig, GenerateConfig
from rlhf_env.training.evaluate import Evaluation, evaluate
from rlhf_env.training.report import surroundings

Progress = Callable[[int, int], None]  # how many more responses are finished, of how many in all


def run_evaluation(
    config: EvaluateConfig, out: str | Path | None = None, *, progress: Progress | None = None
) -> Evaluation:
    """Evaluate as `config` says and, where `out` is given, leave config, summary.json and samples.jsonl there."""
    if out is not None:
        require_free(out)
    prompts, device = load_prompts(config.prompts), parse_device(config.device)
    text = None if config.text is None else _read_text(config.text)
    reward = load_reward(config.reward, device=device)
    gold = None if config.gold is None else load_reward(config.gold, device=device)
    policy = CausalLM.from_pretrained(config.policy, device=config.device, dtype=config.dtype)
    reference = load_reference(config)
    beta = 0.0 if reference is None else config.env.beta
    envs = make_envs(config.env, config.num_envs, prompts, config.prompts, policy, reward, reference, beta)
    total = (config.episodes or len(prompts)) * (1 if reference is None else 2)
    found = evaluate(
        policy,
        envs,
        prompts if config.episodes is None else None,
        episodes=config.episodes or len(prompts),
        seed=config.seed,
        gold=gold,
        text=text,
        greedy=config.greedy,
        progress=None if progress is None else lambda more: progress(more, total),
    )
    if out is not None:
        run = Run.create(out, to_dict(config))
        run.write_samples(found.samples)
        run.write_summary({**found.metrics, "episodes": len(found.samples), **surroundings(config.device)})
    return found


def generate(config: GenerateConfig, *, progress: Progress | None = None) -> list[dict[str, Any]]:
    """One response to each prompt: rows of prompt, response, length in tokens, and whether it ended by itself."""
    parse_device(config.device)
    policy = CausalLM.from_pretrained(config.policy, device=config.device, dtype=config.dtype)
    prompts = [config.prompt] if config.prompt is not None else load_prompts(str(config.prompts))
    envs = make_envs(config.env, config.num_envs, prompts, config.prompts or "--prompt", policy, _unscored, None, 0.0)
    tell = None if progress is None else lambda more: progress(more, len(prompts))
    rollout = collect(policy, envs, prompts, seed=config.seed, greedy=config.greedy, progress=tell)
    responses = [row[mask].tolist() for row, mask in zip(rollout.response_ids, rollout.response_mask, strict=True)]
    texts = envs.task.codec.decode_responses(envs.task.prompt_ids, responses)
    return [
        {"prompt": prompt, "response": text, "length": length, "ended": ended}
        for prompt, text, length, ended in zip(
            prompts, texts, rollout.lengths.tolist(), rollout.ended.tolist(), strict=True
        )
    ]


def _unscored(prompts: list[str], responses: list[str]) -> np.ndarray:
    return np.zeros(len(responses))


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start + 1} is not UTF-8") from error
