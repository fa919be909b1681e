"""How good any reward model is: on comparisons, on changes it should not care about, and on a policy's responses."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_env.envs.rewards import scores_of
from rlhf_env.errors import DataError
from rlhf_env.intervals import mean_interval
from rlhf_env.preferences.comparisons import distinct, read_comparisons
from rlhf_env.preferences.labelers import label_agreement, preference_probability, utilities_of
from rlhf_env.preferences.probes import probe
from rlhf_env.preferences.reward_metrics import (
    accuracy,
    annotator_ceiling,
    correlation,
    measure_scores,
    ranked_by,
)
from rlhf_env.preferences.reward_suite import generated_suite, measure_suite, read_suite, suite_texts
from rlhf_env.records.config import to_dict
from rlhf_env.records.run import Run, require_free
from rlhf_env.reward_models.bradley_terry import stated
from rlhf_env.reward_models.classifier import ClassifierReward
from rlhf_env.reward_models.ensemble import Ensemble
from rlhf_env.reward_models.load import load_reward
from rlhf_env.settings import LabelerConfig
from rlhf_env.text.corpus import BUILT_IN_REVIEWS, film_reviews, review_openings
from rlhf_env.text.prompts import load_prompts
from rlhf_env.training.assemble import load_sampler, parse_device
from rlhf_env.training.collect import collect
from rlhf_env.training.config import RewardEvalConfig
from rlhf_env.training.evaluate import best_of_n_path, response_texts
from rlhf_env.training.inference import BEST_OF_SEED, Progress, unscored_envs
from rlhf_env.training.report import surroundings
from rlhf_env.training.reward_card import plot_reliability, reward_card
from rlhf_env.types import Comparison

Floats = NDArray[np.float64]

_RANKED = 4  # film reviews in each built-in comparison
_PROBE_STREAM = 13


def run_reward_eval(
    config: RewardEvalConfig, out: str | Path | None = None, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Evaluate a reward model as `config` says; where `out` is given, leave config, summary, figure and card there.

    The summary, which is returned, has what `measure_scores` and `ceilings` say; `gold_accuracy`, against gold's own
    preferences; under `probes` the rows of `probe`, under `suite` what `measure_suite` says, and under `policy` what
    `measure_draws` does. What cannot be known is left out.
    """
    began = time.perf_counter()
    if out is not None:
        require_free(out)
    device = parse_device(config.device)
    reward = load_reward(config.reward, device=device)
    builtin = config.comparisons == BUILT_IN_REVIEWS
    gold_name = config.gold or ("vader" if builtin else None)
    gold = None if gold_name is None else load_reward(gold_name, device=device)
    everything = review_rankings(gold) if builtin else read_comparisons(config.comparisons)
    comparisons, identical = distinct(everything)
    if not comparisons:
        raise DataError(f"{config.comparisons}: of {identical} comparisons none has responses that differ")
    items = read_suite(config.suite) if config.suite not in (None, "generated") else []

    asked = [c.prompt for c in comparisons], [c.responses for c in comparisons]
    scores, log_odds = _scores(reward, comparisons)
    summary: dict[str, Any] = {"comparisons": len(comparisons), "identical": identical}
    summary |= {} if gold_name is None else {"gold": gold_name}
    summary |= measure_scores(comparisons, scores, log_odds, seed=config.seed)
    by_gold = comparisons
    if gold is not None:
        utilities = utilities_of(gold, *asked)
        by_gold = ranked_by(comparisons, utilities)
        if not builtin:  # whose labels are gold's
            summary |= accuracy("gold_accuracy", by_gold, scores) | ceilings(comparisons, utilities, config)
    summary |= annotator_ceiling(comparisons)
    if config.probes and summary["score_std"] > 0:
        sample = _sample(comparisons, config.probes, config.seed)
        prompts, responses = [p for p, _ in sample], [r for _, r in sample]
        summary["probes"] = probe(reward, prompts, responses, unit=summary["score_std"], seed=config.seed)
    if config.suite is not None:
        items = items or generated_suite(by_gold, seed=config.seed)
        summary["suite"] = measure_suite(items, utilities_of(reward, *suite_texts(items)))
    if config.policy is not None:
        prompts, texts = _draw(config, progress)
        summary["policy"] = measure_draws(reward, prompts, texts, gold)
        if isinstance(reward, Ensemble):
            summary["policy"] |= disagreement(reward, comparisons, prompts, texts)
    if origin := _origin(config):
        summary["origin"] = origin
    summary |= {"seed": config.seed, "seconds": time.perf_counter() - began, **surroundings(config.device)}
    if out is not None:
        run = Run.create(out, to_dict(config))
        bins = summary.get("reliability", summary.get("scaled_reliability"))
        figure = bins is not None and plot_reliability(bins, run.plots / "reliability.png")
        run.write_card(reward_card(config, summary, figure=figure))
        run.write_summary(summary)
    return summary


def review_rankings(gold: Any) -> list[Comparison]:
    """The built-in film reviews as rankings of four endings of the same beginning, by a gold reward that never errs."""
    openings = sorted(review_openings(), key=len, reverse=True)
    endings: dict[str, list[str]] = defaultdict(list)
    for review in film_reviews():
        opening = next(opening for opening in openings if review.startswith(opening))
        endings[opening].append(review.removeprefix(opening))
    groups = [
        (opening, tuple(those[i : i + _RANKED]))
        for opening, those in endings.items()
        for i in range(0, len(those) - _RANKED + 1, _RANKED)
    ]
    utilities = utilities_of(gold, [opening for opening, _ in groups], [those for _, those in groups])
    unranked = [Comparison(opening, those, (0,) * len(those)) for opening, those in groups]
    return ranked_by(unranked, utilities)


def ceilings(
    comparisons: Sequence[Comparison], utilities: Sequence[Floats], config: RewardEvalConfig
) -> dict[str, Any]:
    """What gold itself would reach on the labels: `label_agreement`, and `expected_agreement` for a known labeler.

    The first is counted, the second is the mean probability that a labeler of this temperature and flip rate prefers
    the better response, over the pairs that gold does not call a tie.
    """
    found: dict[str, Any] = label_agreement(comparisons, utilities)
    leads = [abs(u[i] - u[j]) for c, u in zip(comparisons, utilities, strict=True) for i, j, _ in c.pairs]
    leads = [lead for lead in leads if lead > 0]
    if config.label_temperature is not None and leads:
        labeler = LabelerConfig(config.label_temperature, config.label_flip_rate)
        found["expected_agreement"] = float(preference_probability(leads, labeler).mean())
    return found


def measure_draws(
    reward: Any, prompts: Sequence[str], texts: Sequence[tuple[str, ...]], gold: Any = None
) -> dict[str, Any]:
    """What N draws of a policy per prompt score, `texts` [P] of [N].

    score           their mean
    variance        the mean over prompts of the variance among the draws of one prompt. Where it is small, the
                    objective is flat, and a policy learns slowly from a reward model however accurate it is (Razin et
                    al. 2025, arXiv 2503.15477)
    variance_share  of the variance of all scores, the share that is among draws of one prompt
    flat_prompts    the share of prompts whose draws all score the same
    best_of         rows of `best_of_n_path`: best of n = 1, 2, 4, … by the score, and what gold says of it
    accuracy        where gold is given: share of pairs of draws of a prompt whose order is gold's
    correlation     … and correlation of score and gold over all draws
    """
    scores = np.stack(utilities_of(reward, prompts, texts))  # [P, N]
    true = None if gold is None else np.stack(utilities_of(gold, prompts, texts))
    within, total = scores.var(1, ddof=1), float(scores.var())
    found: dict[str, Any] = {
        "prompts": len(prompts),
        "draws": scores.shape[1],
        **mean_interval("score", scores.mean(1)),
        **mean_interval("variance", within),
        **({"variance_share": float(scores.var(1).mean()) / total} if total > 0 else {}),
        "flat_prompts": float((scores.max(1) == scores.min(1)).mean()),
        "best_of": best_of_n_path(torch.from_numpy(scores), None if true is None else torch.from_numpy(true)),
    }
    if true is not None:
        unranked = [Comparison(p, those, (0,) * len(those)) for p, those in zip(prompts, texts, strict=True)]
        found |= accuracy("accuracy", ranked_by(unranked, list(true)), list(scores))
        if not np.isnan(r := correlation(scores.ravel(), true.ravel())):
            found["correlation"] = r
    return found


def disagreement(
    ensemble: Ensemble, comparisons: Sequence[Comparison], prompts: Sequence[str], texts: Sequence[tuple[str, ...]]
) -> dict[str, Any]:
    """How far members differ about a policy's responses, and about those compared: mean deviations, and their ratio.

    Each member is first brought to mean 0 and variance 1 over the responses compared. A ratio well above 1 says that
    the policy writes what the members have not learned about (Eisenstein et al. 2023, arXiv 2312.09244). Members that
    score all of those responses alike are left out; empty where fewer than two are left.
    """
    known = [(c.prompt, response) for c in comparisons for response in c.responses]
    new = [(prompt, response) for prompt, those in zip(prompts, texts, strict=True) for response in those]
    sides: tuple[list[Floats], list[Floats]] = ([], [])
    for member in ensemble.members:
        old, fresh = (scores_of(member, *map(list, zip(*those, strict=True))) for those in (known, new))
        if (unit := float(old.std())) > 0:
            sides[0].append((old - old.mean()) / unit)
            sides[1].append((fresh - old.mean()) / unit)
    if len(sides[0]) < 2:
        return {}
    compared, drawn = (float(np.stack(side).std(0).mean()) for side in sides)
    ratio = {"deviation_ratio": drawn / compared} if compared > 0 else {}
    return {"deviation_compared": compared, "deviation_drawn": drawn, **ratio}


def _draw(config: RewardEvalConfig, progress: Progress | None) -> tuple[list[str], list[tuple[str, ...]]]:
    """Each of the different prompts, and `best_of` responses of the policy to it."""
    assert config.prompts is not None
    prompts, n = list(dict.fromkeys(load_prompts(config.prompts))), config.best_of
    policy = load_sampler(config)
    envs = unscored_envs(config.env, config.num_envs, prompts, config.prompts, policy)
    drawn = [prompt for prompt in prompts for _ in range(n)]
    tell = None if progress is None else lambda more: progress(more, len(drawn))
    texts = response_texts(envs.task, collect(policy, envs, drawn, seed=config.seed + BEST_OF_SEED, progress=tell))
    return prompts, [tuple(texts[i : i + n]) for i in range(0, len(texts), n)]


def _scores(reward: Any, comparisons: Sequence[Comparison]) -> tuple[list[Floats], list[Floats] | None]:
    """The scores [K] of every comparison's responses, and the log-odds of its pairs where the model states them."""
    if not isinstance(reward, ClassifierReward):
        return utilities_of(reward, [c.prompt for c in comparisons], [c.responses for c in comparisons]), None
    logits, log_odds = stated(reward, comparisons)
    return [(those - reward.mean) / reward.std for those in logits], log_odds


def _origin(config: RewardEvalConfig) -> dict[str, Any]:
    """What the run folder of `rlhf-env reward` around a reward model says of it; empty where there is none."""
    folder = Path(config.reward).parent
    if not Path(config.reward).is_dir() or not (folder / "config.yaml").is_file():
        return {}
    run = Run.open(folder)
    known = run.config
    if not isinstance(known.get("comparisons"), str) or "body" not in known or not run.finished:
        return {}
    same = [Path(file) for file in (known["comparisons"], config.comparisons)]
    told = {name: run.summary[name] for name in ("comparisons", "held_out", "accuracy") if name in run.summary}
    return {"learned_from": known["comparisons"], "same_file": same[0].resolve() == same[1].resolve(), **told}


def _sample(comparisons: Sequence[Comparison], most: int, seed: int) -> list[tuple[str, str]]:
    """Different responses with their prompts: all, or `most` of them at random."""
    pairs = list(dict.fromkeys((c.prompt, response) for c in comparisons for response in c.responses))
    order = np.random.default_rng([seed, _PROBE_STREAM]).permutation(len(pairs))[:most]
    return [pairs[i] for i in sorted(order.tolist())]
