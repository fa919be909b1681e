"""What a round of the online loop has of its own: a pool of responses, labels for a few of its pairs, the ensemble."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_env.errors import DataError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.preferences.comparisons import read_comparisons, write_comparisons
from rlhf_env.preferences.labelers import label_agreement, utilities_of
from rlhf_env.preferences.populations import Population
from rlhf_env.preferences.queries import Rule, differing, disagreement, pair_leads, select
from rlhf_env.preferences.reward_metrics import accuracy, differences, measure_logits, ranked_by
from rlhf_env.preferences.splits import split_by_prompt
from rlhf_env.records.config import to_dict
from rlhf_env.records.jsonl import read_jsonl, write_jsonl
from rlhf_env.records.run import Run, require_free
from rlhf_env.reward_models.bradley_terry import measure_comparisons
from rlhf_env.reward_models.classifier import ClassifierReward
from rlhf_env.reward_models.load import load_reward
from rlhf_env.settings import LabelerConfig
from rlhf_env.text.prompts import load_prompts, prompt_indices
from rlhf_env.training.assemble import parse_device
from rlhf_env.training.collect import collect
from rlhf_env.training.config import DType, EnvConfig, OnlineConfig
from rlhf_env.training.evaluate import response_texts
from rlhf_env.training.inference import Progress, unscored_envs
from rlhf_env.training.labeler_config import MemberConfig
from rlhf_env.training.labelers import build_labelers
from rlhf_env.training.prefer import ask
from rlhf_env.types import Comparison, Labeler

SAMPLING_SEED = 4_000_037  # added to the seed: a pool's responses are those of no other stage
_SELECTION_STREAM = 9


@dataclass(frozen=True)
class PoolConfig:
    """Responses that labelers may be asked about, and what the present ensemble says of them."""

    policy: str  #: folder or hub name of the model that writes the responses
    prompts: str  #: file of prompts
    gold: str  #: the true reward, to measure how often the ensemble prefers what gold prefers
    ensemble: str | None  #: folders of the present reward models, A,B,C; none: there are none yet
    size: int  #: prompts
    candidates: int  #: responses to each
    start: int  #: position of the first prompt in the endless shuffled sequence of prompts
    seed: int  #: of sampling and the order of prompts
    device: str  #: "cpu", "cuda", "cuda:1", "mps"
    dtype: DType  #: precision of the policy's weights
    num_envs: int  #: responses written side by side
    env: EnvConfig  #: the token MDP


@dataclass(frozen=True)
class LabelsConfig:
    """Labels for some pairs of a pool, and the comparisons so far, to learn from and to measure on."""

    pool: str  #: file of the pool
    policy: str  #: who wrote its responses
    earlier: str | None  #: file of the comparisons before; none: there are none
    gold: str  #: the labelers' true reward
    labeler: LabelerConfig  #: how the labeler errs
    biases: dict[str, float]  #: what else it likes
    labelers: tuple[MemberConfig, ...]  #: several who share the queries, in place of the one
    overlap: int  #: how many of the labelers answer each query
    rule: Rule  #: how pairs are chosen
    count: int  #: pairs to ask about
    first: int  #: number of the first query: the pairs planned for the rounds before
    keep: int | None  #: learn from this many of the latest comparisons; none: from all
    held_out: float  #: share of the comparisons, by prompt, that is not learned from
    seed: int  #: of choice between equals, labelers and hold-out
    device: str  #: where gold is, if it is a model


@dataclass(frozen=True)
class EnsembleConfig:
    """The reward models of a round, measured together on comparisons that none of them learned from."""

    ensemble: str  #: folders of the reward models, A,B,C
    comparisons: str  #: file of the comparisons held out
    device: str  #: where the reward models are


@dataclass(frozen=True)
class Members:
    """Reward models that are asked together."""

    models: Sequence[ClassifierReward]

    @classmethod
    def load(cls, folders: str, device: torch.device) -> Members:
        """The reward models of folders with commas between them."""
        return cls([ClassifierReward(folder, device=device) for folder in folders.split(",")])

    def each(self, prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64]:
        """The logits of every member, [M, B]; only these are on the scale of P(i ≻ j) = σ(s_i − s_j)."""
        return np.stack([model.logits(prompts, responses) for model in self.models])

    def logits(self, prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64]:
        """The mean of the members' logits, [B]."""
        return self.each(prompts, responses).mean(0)


def run_pool(config: PoolConfig, out: str | Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Write `out`/pool.jsonl, a row per prompt: `prompt`, `responses` [K] and, of an ensemble, `logits` [M, K].

    `accuracy_pool` in the summary is how often the ensemble prefers what gold prefers, over all pairs of the pool.
    """
    out = Path(out)
    require_free(out)
    began = time.perf_counter()
    device, prompts, k = parse_device(config.device), load_prompts(config.prompts), config.candidates
    policy = CausalLM.from_pretrained(config.policy, device=config.device, dtype=config.dtype)
    envs = unscored_envs(config.env, config.num_envs, prompts, config.prompts, policy)
    asked = [prompts[i] for i in prompt_indices(config.seed, config.start, config.size, len(prompts))]
    repeated = [prompt for prompt in asked for _ in range(k)]
    run, seed = Run.create(out, to_dict(config)), config.seed + SAMPLING_SEED
    tell = None if progress is None else lambda more: progress(more, len(repeated))
    texts = response_texts(envs.task, collect(policy, envs, repeated, seed=seed, start=config.start * k, progress=tell))
    responses = [tuple(texts[i : i + k]) for i in range(0, len(texts), k)]
    rows: list[dict[str, Any]] = [{"prompt": p, "responses": list(r)} for p, r in zip(asked, responses, strict=True)]
    summary: dict[str, Any] = {"prompts": len(rows), "identical": sum(len(set(those)) == 1 for those in responses)}
    if config.ensemble is not None:
        logits = Members.load(config.ensemble, device).each(repeated, texts).reshape(-1, len(rows), k)  # [M, N, K]
        rows = [row | {"logits": those.tolist()} for row, those in zip(rows, logits.swapaxes(0, 1), strict=True)]
        i, j = np.triu_indices(k, 1)
        summary["disagreement"] = float(disagreement(pair_leads(logits)[..., i, j]).mean())
        truth = utilities_of(load_reward(config.gold, device=device), asked, responses)
        unranked = [Comparison(prompt, those, (0,) * k) for prompt, those in zip(asked, responses, strict=True)]
        summary |= accuracy("accuracy_pool", ranked_by(unranked, truth), list(logits.mean(0)))
    write_jsonl(out / "pool.jsonl", rows)
    run.write_summary({**summary, "seconds": time.perf_counter() - began})
    return run.summary


def run_labels(config: LabelsConfig, out: str | Path) -> dict[str, Any]:
    """Choose pairs of the pool, ask for their labels, and measure the present ensemble on them before it learns them.

    Leaves comparisons.jsonl, those of this round; all.jsonl, those so far (or the latest `keep`); and learned.jsonl and
    held_out.jsonl, its two sides. The summary counts labels: what was `planned`, `asked` (there may be too few prompts
    with responses that differ), `skipped` by the labelers and `kept`.
    """
    out = Path(out)
    require_free(out)
    began = time.perf_counter()
    device = parse_device(config.device)
    load = cache(partial(load_reward, device=device))
    gold, labelers = load(config.gold), labelers_of(config, load)
    run = Run.create(out, to_dict(config))

    rows = read_jsonl(config.pool, required={"prompt": str, "responses": list})
    responses = [tuple(row["responses"]) for row in rows]
    logits = np.array([row["logits"] for row in rows]).swapaxes(0, 1) if "logits" in rows[0] else None  # [M, N, K]
    scores = np.zeros((1, len(rows), len(responses[0]))) if logits is None else logits
    rng = np.random.default_rng([config.seed, config.first, _SELECTION_STREAM])
    chosen = select(config.rule, scores, config.count, rng, differing(responses)).tolist()
    comparisons = ask(
        labelers,
        [rows[n]["prompt"] for n, _, _ in chosen],
        [(responses[n][i], responses[n][j]) for n, i, j in chosen],
        range(config.first, config.first + len(chosen)),
        policy=config.policy,
        seed=config.seed,
    )
    earlier = [] if config.earlier is None else read_comparisons(config.earlier)
    every = [*earlier, *comparisons][-(config.keep or 0) :]
    if not comparisons or len(every) < 2:
        raise DataError(
            f"{config.pool}: of {len(rows)} prompts {len(chosen)} had responses that differ and were asked about, and "
            f"{len(comparisons)} were answered: raise pool or env.temperature, or mind the labeler"
        )
    learned, held_out = split_by_prompt(every, config.held_out, config.seed)
    named = {"comparisons": comparisons, "all": every, "learned": learned, "held_out": held_out}
    for name, those in named.items():
        write_comparisons(out / f"{name}.jsonl", those)
    utilities = utilities_of(gold, [c.prompt for c in comparisons], [c.responses for c in comparisons])
    summary: dict[str, Any] = {
        "planned": config.count * config.overlap,
        "asked": (asked := len(chosen) * config.overlap),
        "skipped": asked - len(comparisons),
        "kept": len(comparisons),
        "comparisons": len(every),
        "held_out": len(held_out),
        **label_agreement(comparisons, utilities),
    }
    if logits is not None:
        texts = ((row["prompt"], text) for row in rows for text in row["responses"])
        known = dict(zip(texts, logits.mean(0).flat, strict=True))
        said = [np.array([known[c.prompt, text] for text in c.responses]) for c in comparisons]
        leads = [differences(c, those) for c, those in zip(comparisons, said, strict=True)]
        measured = measure_logits(comparisons, said, leads)
        summary |= _named(measured, "accuracy", "accuracy_new_pairs") | {"log_loss_new_pairs": measured["log_loss"]}
    run.write_summary({**summary, "seconds": time.perf_counter() - began})
    return run.summary


def labelers_of(config: OnlineConfig | LabelsConfig, load: Callable[[str], Any]) -> Labeler | Population:
    """Who answers the queries, by the settings; `load` makes a reward model of a name."""
    one = MemberConfig(labeler=config.labeler, biases=config.biases)
    return build_labelers(one, config.labelers, config.overlap, gold=config.gold, seed=config.seed, load=load)


def run_ensemble(config: EnsembleConfig, out: str | Path) -> dict[str, Any]:
    """Measure the mean logit of the reward models on what none of them learned from."""
    require_free(out)
    began = time.perf_counter()
    members, held_out = Members.load(config.ensemble, parse_device(config.device)), read_comparisons(config.comparisons)
    run = Run.create(out, to_dict(config))
    run.write_summary({**measure_comparisons(members, held_out), "seconds": time.perf_counter() - began})
    return run.summary


def _named(measured: dict[str, Any], name: str, new: str) -> dict[str, float]:
    """A metric with its interval, under another name."""
    return {f"{new}{end}": measured[f"{name}{end}"] for end in ("", "_low", "_high") if f"{name}{end}" in measured}
