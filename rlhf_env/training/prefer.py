"""The second stage: responses of a policy, ranked by simulated labelers or by a language model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from rlhf_env.errors import DataError, RemoteError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.preferences.comparisons import write_comparisons
from rlhf_env.preferences.judge import LogOddsJudge
from rlhf_env.preferences.labelers import label_agreement, present, utilities_of
from rlhf_env.preferences.populations import Population
from rlhf_env.records.config import to_dict
from rlhf_env.records.run import Run, require_free
from rlhf_env.reward_models.load import load_reward
from rlhf_env.text.prompts import load_prompts, prompt_indices
from rlhf_env.training.assemble import load_sampler, parse_device
from rlhf_env.training.collect import collect
from rlhf_env.training.config import PreferConfig
from rlhf_env.training.evaluate import response_texts
from rlhf_env.training.inference import Progress, unscored_envs
from rlhf_env.training.labelers import build_labelers, reply_counts
from rlhf_env.training.report import surroundings
from rlhf_env.types import Comparison, Labeler

SAMPLING_SEED = 1_000_033  # added to the seed: training shall not meet these random numbers again
_ASKED_TOGETHER = 64  # queries: no more answers are lost with a server
_MOST_QUERIES = 4  # times those that would do if none had identical responses and none were skipped


def run_prefer(config: PreferConfig, out: str | Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Make comparisons as `config` says, in `out`/comparisons.jsonl; returns what summary.json says.

    Query q has prompt, responses, order of presentation and answers of its own, made from the seed and q alone. A query
    whose responses are all the same text is not asked, since its answer could teach nothing; it is counted
    (`identical`). So is, of all answers that were asked for (`asked`), each that a labeler would not give (`skipped`).
    Where several answer each query (`overlap`), there may be a few more comparisons than wanted. Of judges the summary
    has `JudgeLabeler.counts`. Where a server is lost, nothing is made up: `RemoteError`, and the comparisons made
    before are in the file.
    """
    out = Path(out)
    require_free(out)
    began = time.perf_counter()
    device, prompts = parse_device(config.device), load_prompts(config.prompts)
    load = cache(partial(load_reward, device=device))
    gold = None if config.gold is None else load(config.gold)
    labelers = labelers_of(config, load)
    policy = load_sampler(config)
    envs = unscored_envs(config.env, config.num_envs, prompts, config.prompts, policy)
    run, k = Run.create(out, to_dict(config)), config.responses
    wanted = math.ceil(config.comparisons / config.overlap)  # queries, if all are answered

    comparisons: list[Comparison] = []
    queries = identical = 0
    file = out / "comparisons.jsonl"

    def save() -> str:
        if comparisons:
            write_comparisons(file, comparisons)
        return f"{len(comparisons)} comparisons were made before, and are in {file}" if comparisons else ""

    with saved(save):
        while len(comparisons) < config.comparisons:
            missing = math.ceil((config.comparisons - len(comparisons)) / config.overlap)
            in_vain = not comparisons and queries - identical >= wanted
            if in_vain or queries + missing > _MOST_QUERIES * wanted:
                raise DataError(_too_few(queries, identical, len(comparisons), reply_counts(labelers)))
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
            for begin in range(0, len(differ), _ASKED_TOGETHER):
                some = differ[begin : begin + _ASKED_TOGETHER]
                comparisons += ask(
                    labelers,
                    [asked[i] for i in some],
                    [responses[i] for i in some],
                    [queries + i for i in some],
                    policy=config.server.model or config.policy,
                    seed=config.seed,
                )
            queries, identical = queries + missing, identical + missing - len(differ)
    write_comparisons(file, comparisons)
    agreement = {}
    if gold is not None:
        utilities = utilities_of(gold, [c.prompt for c in comparisons], [c.responses for c in comparisons])
        agreement = label_agreement(comparisons, utilities)
    run.write_summary(
        {
            "comparisons": len(comparisons),
            "responses": k,
            "prompts": len({comparison.prompt for comparison in comparisons}),
            "queries": queries,
            "identical": identical,
            "asked": (asked_for := (queries - identical) * config.overlap),
            "skipped": asked_for - len(comparisons),
            **reply_counts(labelers),
            **agreement,
            "seed": config.seed,
            "seconds": time.perf_counter() - began,
            **surroundings(config.device),
        }
    )
    return run.summary


def labelers_of(config: PreferConfig, load: Callable[[str], Any] = load_reward) -> Labeler | Population:
    """Who answers the queries of these settings; `load` makes a reward model of a name."""
    load_model = partial(CausalLM.from_pretrained, device=config.device, dtype=config.dtype)
    who = config.one, config.labelers, config.overlap
    return build_labelers(*who, gold=config.gold, seed=config.seed, load=load, load_model=load_model)


@contextmanager
def saved(save: Callable[[], str]) -> Iterator[None]:
    """Where a server is lost or somebody interrupts, `save` what there is; it says what that is, "" for nothing."""
    try:
        yield
    except (RemoteError, KeyboardInterrupt) as error:
        if (said := save()) and isinstance(error, RemoteError):
            raise RemoteError(f"{error}; {said}") from None
        raise


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
    population that are asked the same query see the same order. Of two responses a `LogOddsJudge`'s probability is kept
    (`Comparison.preference`).
    """
    orders = [present(len(those), seed, query) for those, query in zip(responses, queries, strict=True)]
    shown = [[those[i] for i in order] for those, order in zip(responses, orders, strict=True)]
    everywhere = list(range(len(queries)))
    shares = labelers.shares(queries) if isinstance(labelers, Population) else [(labelers, everywhere)]
    found: list[list[Comparison]] = [[] for _ in queries]
    for labeler, places in shares:
        asked = [prompts[q] for q in places], [shown[q] for q in places], [queries[q] for q in places]
        for q, answer in zip(places, _answers(labeler, *asked), strict=True):
            if answer is not None:
                ranks, preference = _as_sampled(answer, order := orders[q])
                said = Comparison(
                    prompts[q], tuple(responses[q]), ranks, labeler.name, policy, order=order, preference=preference
                )
                found[q].append(said)
    return [comparison for those in found for comparison in those]


def _answers(
    labeler: Labeler, prompts: Sequence[str], shown: Sequence[Sequence[str]], queries: Sequence[int]
) -> Sequence[tuple[int, ...] | float | None]:
    """Ranks of the responses or, of two, the probability that the first is better, where the labeler knows it."""
    if isinstance(labeler, LogOddsJudge) and all(len(those) == 2 for those in shown):
        return labeler.preferences(prompts, shown).tolist()
    return labeler.rank(prompts, shown, queries)


def _as_sampled(answer: tuple[int, ...] | float, order: tuple[int, ...]) -> tuple[tuple[int, ...], float | None]:
    """Ranks of the responses and preference for the first, in the order in which they were sampled."""
    if isinstance(answer, tuple):
        return tuple(answer[order.index(i)] for i in range(len(answer))), None
    preference = answer if order == (0, 1) else 1 - answer
    return (int(preference < 0.5), int(preference > 0.5)), preference


def _too_few(queries: int, identical: int, comparisons: int, replies: Mapping[str, int]) -> str:
    differ = queries - identical
    if identical > queries / 2:
        return (
            f"of {queries} queries only {differ} had responses that differ: the policy nearly always writes the same; "
            "raise env.temperature, or give more prompts"
        )
    if replies and replies["unparsed"] > replies["replies"] / 2:
        return (
            f"{differ} queries brought only {comparisons} answers: {replies['unparsed']} of the judge's "
            f"{replies['replies']} replies hold no verdict, [[A]], [[B]] or [[C]]; use a model that follows "
            "instructions, raise judge.max_new_tokens, or read its probabilities (judge.by=log_odds)"
        )
    return (
        f"{differ} queries brought only {comparisons} answers: the labelers skip nearly all; lower skip_below, which "
        "is in units of gold, or let a judge's tie_policy be tie"
    )
