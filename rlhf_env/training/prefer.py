"""The second stage: responses of a policy, ranked by a simulated labeler."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from rlhf_env.errors import DataError
from rlhf_env.preferences.comparisons import write_comparisons
from rlhf_env.preferences.labelers import label_agreement, present, utilities_of
from rlhf_env.preferences.populations import Population
from rlhf_env.records.config import to_dict
from rlhf_env.records.run import Run, require_free
from rlhf_env.reward_models.load import load_reward
from rlhf_env.text.prompts import load_prompts, prompt_indices
from rlhf_env.training.assemble import load_sampler, parse_device
from rlhf_env.training.collect import collect
from rlhf_env.training.config import MemberConfig, PreferConfig
from rlhf_env.training.evaluate import response_texts
from rlhf_env.training.inference import Progress, unscored_envs
from rlhf_env.training.labelers import build_labelers
from rlhf_env.training.report import surroundings
from rlhf_env.types import Comparison, Labeler

SAMPLING_SEED = 1_000_033  # added to the seed: training shall not meet these random numbers again
_MOST_QUERIES = 4  # times those that would do if none had identical responses and none were skipped


def run_prefer(config: PreferConfig, out: str | Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Make comparisons as `config` says, in `out`/comparisons.jsonl; returns what summary.json says.

    Query q has prompt, responses, order of presentation and answers of its own, made from the seed and q alone. A query
    whose responses are all the same text is not asked, since its answer could teach nothing; it is counted
    (`identical`). So is, of all answers that were asked for (`asked`), each that a labeler would not give (`skipped`).
    Where several answer each query (`overlap`), there may be a few more comparisons than wanted.
    """
    out = Path(out)
    require_free(out)
    began = time.perf_counter()
    device, prompts = parse_device(config.device), load_prompts(config.prompts)
    load = cache(partial(load_reward, device=device))
    gold = load(config.gold)
    one = MemberConfig(labeler=config.labeler, biases=config.biases)
    labelers = build_labelers(one, config.labelers, config.overlap, gold=config.gold, seed=config.seed, load=load)
    policy = load_sampler(config)
    envs = unscored_envs(config.env, config.num_envs, prompts, config.prompts, policy)
    run, k = Run.create(out, to_dict(config)), config.responses
    wanted = math.ceil(config.comparisons / config.overlap)  # queries, if all are answered

    comparisons: list[Comparison] = []
    queries = identical = 0
    while len(comparisons) < config.comparisons:
        missing = math.ceil((config.comparisons - len(comparisons)) / config.overlap)
        if queries + missing > _MOST_QUERIES * wanted:
            raise DataError(_too_few(queries, identical, len(comparisons)))
        asked = [prompts[i] for i in prompt_indices(config.seed, queries, missing, len(prompts))]
        rollout = collect(
            policy,
            envs,
            [prompt for prompt in asked for _ in range(k)],
            seed=config.seed + SAMPLING_SEED,
            start=queries * k,
            progress=None if progress is None else lambda more: progress(more, k * wanted),
        )
        texts = response_texts(envs.task, rollout)
        responses = [tuple(texts[i : i + k]) for i in range(0, len(texts), k)]
        differ = [i for i, those in enumerate(responses) if len(set(those)) > 1]
        comparisons += ask(
            labelers,
            [asked[i] for i in differ],
            [responses[i] for i in differ],
            [queries + i for i in differ],
            policy=config.server.model or config.policy,
            seed=config.seed,
        )
        queries, identical = queries + missing, identical + missing - len(differ)
    write_comparisons(out / "comparisons.jsonl", comparisons)
    utilities = utilities_of(gold, [c.prompt for c in comparisons], [c.responses for c in comparisons])
    run.write_summary(
        {
            "comparisons": len(comparisons),
            "responses": k,
            "prompts": len({comparison.prompt for comparison in comparisons}),
            "queries": queries,
            "identical": identical,
            "asked": (asked_for := (queries - identical) * config.overlap),
            "skipped": asked_for - len(comparisons),
            **label_agreement(comparisons, utilities),
            "seed": config.seed,
            "seconds": time.perf_counter() - began,
            **surroundings(config.device),
        }
    )
    return run.summary


def ask(
    labelers: Labeler | Population,
    prompts: Sequence[str],
    responses: Sequence[Sequence[str]],
    queries: Sequence[int],
    *,
    policy: str = "",
    seed: int = 0,
) -> list[Comparison]:
    """What labelers say of each prompt's K responses, which are shown in a random order made from (seed, query).

    One comparison for each answer, in the order of the queries. A query that a labeler skips is none; those of a
    population that are asked the same query see the same order.
    """
    orders = [present(len(those), seed, query) for those, query in zip(responses, queries, strict=True)]
    shown = [[those[i] for i in order] for those, order in zip(responses, orders, strict=True)]
    everywhere = list(range(len(queries)))
    shares = labelers.shares(queries) if isinstance(labelers, Population) else [(labelers, everywhere)]
    found: list[list[Comparison]] = [[] for _ in queries]
    for labeler, places in shares:
        answers = labeler.rank([prompts[q] for q in places], [shown[q] for q in places], [queries[q] for q in places])
        for q, answer in zip(places, answers, strict=True):
            if answer is not None:
                ranks = tuple(answer[orders[q].index(i)] for i in range(len(answer)))
                found[q].append(
                    Comparison(prompts[q], tuple(responses[q]), ranks, labeler.name, policy=policy, order=orders[q])
                )
    return [comparison for those in found for comparison in those]


def _too_few(queries: int, identical: int, comparisons: int) -> str:
    differ = queries - identical
    if identical > queries / 2:
        return (
            f"of {queries} queries only {differ} had responses that differ: the policy nearly always writes the same; "
            "raise env.temperature, or give more prompts"
        )
    return (
        f"{differ} queries brought only {comparisons} answers: the labelers skip nearly all; lower skip_below, which "
        "is in units of gold"
    )
