"""The second stage: responses of a policy, ranked by a simulated labeler."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_env.errors import DataError
from rlhf_env.preferences.comparisons import write_comparisons
from rlhf_env.preferences.labelers import SimulatedLabeler, label_agreement, present, utilities_of
from rlhf_env.records.config import to_dict
from rlhf_env.records.run import Run, require_free
from rlhf_env.reward_models.load import load_reward
from rlhf_env.text.prompts import load_prompts, prompt_indices
from rlhf_env.training.assemble import load_sampler, parse_device
from rlhf_env.training.collect import collect
from rlhf_env.training.config import PreferConfig
from rlhf_env.training.evaluate import response_texts
from rlhf_env.training.inference import Progress, unscored_envs
from rlhf_env.training.report import surroundings
from rlhf_env.types import Comparison, Labeler

SAMPLING_SEED = 1_000_033  # added to the seed: training shall not meet these random numbers again
_MOST_QUERIES = 4  # per comparison wanted, where responses come out identical


def run_prefer(config: PreferConfig, out: str | Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Make comparisons as `config` says, in `out`/comparisons.jsonl; returns what summary.json says.

    Query q has prompt, responses, order of presentation and answer of its own, made from the seed and q alone. A query
    whose responses are all the same text is not asked, since its answer could teach nothing; it is counted.
    """
    out = Path(out)
    require_free(out)
    began = time.perf_counter()
    device, prompts = parse_device(config.device), load_prompts(config.prompts)
    gold = load_reward(config.gold, device=device)
    policy = load_sampler(config)
    envs = unscored_envs(config.env, config.num_envs, prompts, config.prompts, policy)
    errors = f"temperature {config.labeler.temperature}, flip rate {config.labeler.flip_rate}, seed {config.seed}"
    labeler = SimulatedLabeler(gold, config.labeler, seed=config.seed, name=f"simulated: {config.gold}, {errors}")
    run, k = Run.create(out, to_dict(config)), config.responses

    comparisons: list[Comparison] = []
    queries = 0
    while (missing := config.comparisons - len(comparisons)) > 0:
        if queries + missing > _MOST_QUERIES * config.comparisons:
            raise DataError(
                f"of {queries} queries only {len(comparisons)} had responses that differ: the policy nearly always "
                "writes the same; raise env.temperature, or give more prompts"
            )
        asked = [prompts[i] for i in prompt_indices(config.seed, queries, missing, len(prompts))]
        rollout = collect(
            policy,
            envs,
            [prompt for prompt in asked for _ in range(k)],
            seed=config.seed + SAMPLING_SEED,
            start=queries * k,
            progress=None if progress is None else lambda more: progress(more, k * config.comparisons),
        )
        texts = response_texts(envs.task, rollout)
        responses = [tuple(texts[i : i + k]) for i in range(0, len(texts), k)]
        differ = [i for i, those in enumerate(responses) if len(set(those)) > 1]
        comparisons += ask(
            labeler,
            [asked[i] for i in differ],
            [responses[i] for i in differ],
            [queries + i for i in differ],
            policy=config.server.model or config.policy,
            seed=config.seed,
        )
        queries += missing
    write_comparisons(out / "comparisons.jsonl", comparisons)
    utilities = utilities_of(gold, [c.prompt for c in comparisons], [c.responses for c in comparisons])
    run.write_summary(
        {
            "comparisons": len(comparisons),
            "responses": k,
            "prompts": len({comparison.prompt for comparison in comparisons}),
            "queries": queries,
            "identical": queries - len(comparisons),
            **label_agreement(comparisons, utilities),
            "seed": config.seed,
            "seconds": time.perf_counter() - began,
            **surroundings(config.device),
        }
    )
    return run.summary


def ask(
    labeler: Labeler,
    prompts: Sequence[str],
    responses: Sequence[Sequence[str]],
    queries: Sequence[int],
    *,
    policy: str = "",
    seed: int = 0,
) -> list[Comparison]:
    """What a labeler says of each prompt's K responses, which are shown in a random order made from (seed, query)."""
    orders = [present(len(those), seed, query) for those, query in zip(responses, queries, strict=True)]
    shown = [[those[i] for i in order] for those, order in zip(responses, orders, strict=True)]
    answers = labeler.rank(prompts, shown, queries)
    return [
        Comparison(
            prompt=prompt,
            responses=tuple(those),
            ranks=tuple(answer[order.index(i)] for i in range(len(those))),
            labeler=labeler.name,
            policy=policy,
            order=order,
        )
        for prompt, those, order, answer in zip(prompts, responses, orders, answers, strict=True)
    ]
