"""What one score makes of people who disagree, and a mixture that finds out who wants what.

    python examples/reward_models/mixed_annotators.py
    python examples/reward_models/mixed_annotators.py --seeds 5      # two groups, five times

First 200 random populations, without any sampling: five responses, three to seven people with utilities of their own,
every pair compared by everybody, and the scores that minimise the Bradley–Terry loss of the expected labels. Do they
rank like the Borda count, the mean probability to win (Siththaranjan et al. 2024, arXiv 2312.08358, theorem 3.1), or
like the expected utility? Then two groups of people compare film reviews: eight like praise, four like blame.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_env.reward_models.bradley_terry import (
    HasLogits,
    comparison_costs,
    fit_comparisons,
    measure_comparisons,
    new_reward_model,
)
from rlhf_env.reward_models.groups import fit_mixture
from rlhf_env.reward_models.heads import Groups
from rlhf_env.reward_models.vader import VaderReward
from rlhf_env.settings import BradleyTerryConfig
from rlhf_env.text.corpus import film_reviews
from rlhf_env.training.config import NewModelConfig
from rlhf_env.training.sft import new_model
from rlhf_env.types import Comparison

PEOPLE = {f"praise {i}": 1 for i in range(8)} | {f"blame {i}": -1 for i in range(4)}


def expected_labels(utilities: NDArray[np.float64]) -> NDArray[np.float64]:
    """P(i preferred to j) by a person drawn at random, [K, K], from everybody's utilities [A, K]."""
    return (1 / (1 + np.exp(utilities[:, None, :] - utilities[:, :, None]))).mean(0)


def bradley_terry_scores(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """The scores [K] of lowest loss where the label of every pair is its probability, [K, K]."""
    pairs = list(itertools.combinations(range(len(p)), 2))
    told = [(f"{i}", f"{j}", float(p[i, j])) for i, j in pairs]
    judged = [Comparison("", (i, j), (0, 1) if y > 0.5 else (1, 0), preference=y) for i, j, y in told]
    scores, seen = torch.zeros(len(p), dtype=torch.float64, requires_grad=True), [i for pair in pairs for i in pair]
    optimizer = torch.optim.LBFGS([scores], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = comparison_costs(scores[seen], judged).mean()
        value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    return scores.detach().numpy()


def populations(count: int) -> tuple[int, int, int]:
    """In how many of `count` populations the scores rank like Borda, like expected utility, and have its best one."""
    like_borda = like_utility = same_best = 0
    for seed in range(count):
        rng = np.random.default_rng(seed)
        intensity = rng.lognormal(sigma=1.0, size=(rng.integers(3, 8), 1))  # some care more than others
        utilities = intensity * rng.normal(size=(len(intensity), 5))
        p = expected_labels(utilities)
        order = np.argsort(bradley_terry_scores(p)).tolist()
        like_borda += order == np.argsort(p.sum(1)).tolist()
        by_utility = np.argsort(utilities.mean(0)).tolist()
        like_utility += order == by_utility
        same_best += order[-1] == by_utility[-1]
    return like_borda, like_utility, same_best


def reviews_judged(each: int, seed: int) -> list[Comparison]:
    """Everybody compares pairs of film reviews of their own; who likes praise takes the one that VADER finds better."""
    reviews = [review for review in film_reviews() if len(review) < 200]
    rng, gold, judged = np.random.default_rng(seed), VaderReward(), []
    for name, sign in PEOPLE.items():
        count = 0
        while count < each:
            pair = tuple(reviews[i] for i in rng.choice(len(reviews), 2, replace=False))
            first, second = sign * gold.score(["", ""], pair)
            if first != second:
                judged.append(Comparison("", pair, (0, 1) if first > second else (1, 0), labeler=name))
                count += 1
    return judged


def two_groups(each: int, seed: int) -> None:
    learned, held_out = reviews_judged(each, 2 * seed), reviews_judged(20, 2 * seed + 1)
    config = BradleyTerryConfig(learning_rate=3e-3, epochs=4, batch_size=32)
    with tempfile.TemporaryDirectory() as body:
        texts = [response for c in learned for response in c.responses]
        new_model(NewModelConfig(tokenizer="word", n_layer=1), texts, seed, "cpu", "float32").save_pretrained(body)
        one = new_reward_model(body, seed=seed)
        mixture = new_reward_model(body, seed=seed, head=Groups(("one", "other"), (0.5, 0.5)))
        for _ in fit_comparisons(one, learned, config, seed=seed):
            pass
        *_, members = fit_mixture(mixture, learned, config, rounds=4, seed=seed)
    group = dict(zip(members.labelers, members.posterior.argmax(1), strict=True))
    majority = int(members.weights.argmax())
    alike = sum((group[name] == majority) == (sign == 1) for name, sign in PEOPLE.items())
    found = f"{alike} of {len(PEOPLE)} people where they belong; shares {members.weights.round(2)}"
    print(f"\nseed {seed}: the mixture puts {found}")
    print(f"{'right about held-out pairs of':32} praise  blame")
    own = {sign: Column(mixture, majority if sign == 1 else 1 - majority) for sign in (1, -1)}
    for name, models in (("one score for all", {1: one, -1: one}), ("the mixture's score of the group", own)):
        right = [
            measure_comparisons(models[sign], [c for c in held_out if PEOPLE[c.labeler] == sign])["accuracy"]
            for sign in (1, -1)
        ]
        print(f"{name:32} {right[0]:6.1%} {right[1]:6.1%}")


class Column:
    """One group's logit."""

    def __init__(self, model: HasLogits, group: int) -> None:
        self.model, self.group = model, group

    def logits(self, prompts, responses):
        return self.model.all_logits(prompts, responses)[:, self.group]  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--populations", type=int, default=200)
    parser.add_argument("--each", type=int, default=120, help="comparisons by each person; of 80 the groups merge")
    parser.add_argument("--seeds", type=int, default=1, help="of the two groups")
    args = parser.parse_args()
    borda, utility, best = populations(args.populations)
    print(f"of {args.populations} populations Bradley–Terry ranks {borda} by Borda count, {utility} by mean utility")
    print(f"in {args.populations - best} its best response is not the one of the highest expected utility")
    for seed in range(args.seeds):
        two_groups(args.each, seed)


if __name__ == "__main__":
    main()
