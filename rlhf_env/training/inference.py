"""Evaluating and generating, from settings."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_env.envs.rewards import scores_of
from rlhf_env.envs.vector import TextGenerationVectorEnv
from rlhf_env.errors import DataError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.remote import RemoteLM
from rlhf_env.records.config import to_dict
from rlhf_env.records.run import Run, require_free
from rlhf_env.reward_models.load import load_reward
from rlhf_env.text.prompts import load_prompts
from rlhf_env.training.assemble import load_reference, load_sampler, make_envs, parse_device
from rlhf_env.training.collect import collect
from rlhf_env.training.config import EnvConfig, EvaluateConfig, GenerateConfig
from rlhf_env.training.evaluate import Evaluation, best_of_n_path, evaluate, response_texts
from rlhf_env.training.report import surroundings

BEST_OF_SEED = 3_000_017  # added to the seed: best-of-n draws anew

Progress = Callable[[int, int], None]  # how many more responses are finished, of how many in all


def run_evaluation(
    config: EvaluateConfig, out: str | Path | None = None, *, progress: Progress | None = None
) -> Evaluation:
    """Evaluate as `config` says and, where `out` is given, leave config, summary.json and samples.jsonl there."""
    began = time.perf_counter()
    if out is not None:
        require_free(out)
    prompts, device = load_prompts(config.prompts), parse_device(config.device)
    text = None if config.text is None else read_text(config.text)
    reward = load_reward(config.reward, device=device)
    gold = None if config.gold is None else load_reward(config.gold, device=device)
    policy = load_sampler(config)
    reference = load_reference(config)
    beta = 0.0 if reference is None else config.env.beta
    envs = make_envs(config.env, config.num_envs, prompts, config.prompts, policy, reward, reference, beta)
    episodes = config.episodes or len(prompts)
    total = episodes * (1 if reference is None else 2) + config.best_of * len(prompts)
    tell = None if progress is None else lambda more: progress(more, total)
    found = evaluate(
        policy,
        envs,
        prompts if config.episodes is None else None,
        episodes=episodes,
        seed=config.seed,
        gold=gold,
        text=text,
        greedy=config.greedy,
        progress=tell,
    )
    if config.best_of:
        drawn = [prompt for prompt in prompts for _ in range(config.best_of)]
        assert reference is not None
        rollout = collect(reference, envs, drawn, seed=config.seed + BEST_OF_SEED, progress=tell)
        scores = rollout.score.cpu().double().reshape(len(prompts), config.best_of)
        true = None if gold is None else scores_of(gold, drawn, response_texts(envs.task, rollout))
        path = best_of_n_path(scores, None if true is None else torch.from_numpy(true).reshape(scores.shape))
        found = dataclasses.replace(found, best_of=path)
    if out is not None:
        run = Run.create(out, to_dict(config))
        run.write_samples(found.samples)
        run.write_tokens(found.tokens)
        best_of = {"best_of": found.best_of} if found.best_of else {}
        facts = {
            "episodes": len(found.samples),
            "prompts": len({s["prompt"] for s in found.samples}),
            "seconds": time.perf_counter() - began,
        }
        facts |= surroundings(config.device)
        run.write_summary({**found.metrics, **best_of, **facts})
    return found


def generate(config: GenerateConfig, *, progress: Progress | None = None) -> list[dict[str, Any]]:
    """One response to each prompt: rows of prompt, response, length in tokens, and whether it ended by itself."""
    parse_device(config.device)
    policy = load_sampler(config)
    prompts = [config.prompt] if config.prompt is not None else load_prompts(str(config.prompts))
    envs = unscored_envs(config.env, config.num_envs, prompts, config.prompts or "--prompt", policy)
    tell = None if progress is None else lambda more: progress(more, len(prompts))
    rollout = collect(policy, envs, prompts, seed=config.seed, greedy=config.greedy, progress=tell)
    return [
        {"prompt": prompt, "response": text, "length": length, "ended": ended}
        for prompt, text, length, ended in zip(
            prompts, response_texts(envs.task, rollout), rollout.lengths.tolist(), rollout.ended.tolist(), strict=True
        )
    ]


def unscored_envs(
    env: EnvConfig, num_envs: int, prompts: Sequence[str], file: str, policy: CausalLM | RemoteLM
) -> TextGenerationVectorEnv:
    """An environment to sample responses from, without reward and KL.

    Where the law truncates, the policy's own probabilities decide, since it is the reference here.
    """
    truncates = env.top_k > 0 or env.top_p < 1  # which no server does, as the settings have made sure
    reference = policy if truncates and isinstance(policy, CausalLM) else None
    return make_envs(env, num_envs, prompts, file, policy, _unscored, reference, 0.0)


def _unscored(prompts: list[str], responses: list[str]) -> np.ndarray:
    return np.zeros(len(responses))


def read_text(path: str) -> str:
    """The whole of a UTF-8 file; `DataError` says why it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start + 1} is not UTF-8") from error
