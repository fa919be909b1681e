"""Rankings of four: as one choice after the other, as pairs, or as pairs torn apart?

    python examples/reward_models/kwise.py

Film reviews are ranked four at a time by somebody who sees VADER's sentiment with noise (Gumbel's, which makes
Plackett–Luce the true model). A small transformer learns from the same rankings in five ways, at equal passes over
them: as separate pairs, each response is read three times per pass. Held-out rankings are measured by all their pairs.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Sequence

import numpy as np

from rlhf_env.intervals import mean_interval
from rlhf_env.reward_models.bradley_terry import fit_comparisons, measure_comparisons, new_reward_model
from rlhf_env.reward_models.vader import VaderReward
from rlhf_env.settings import BradleyTerryConfig
from rlhf_env.text.corpus import film_reviews
from rlhf_env.training.config import NewModelConfig
from rlhf_env.training.sft import new_model
from rlhf_env.types import Comparison

NOISE = 0.25  # of the labeler, in units of VADER's score


def rankings(count: int, seed: int) -> tuple[list[Comparison], list[Comparison]]:
    """Four reviews each, ranked with noise; and the same by VADER's score itself."""
    reviews = sorted({review for review in film_reviews() if len(review) < 200})
    rng, gold = np.random.default_rng(seed), VaderReward()
    judged, true = [], []
    while len(judged) < count:
        four = tuple(reviews[i] for i in rng.choice(len(reviews), 4, replace=False))
        scores = gold.score([""] * 4, four)
        if len(set(scores.tolist())) == 4:
            seen = scores / NOISE + rng.gumbel(size=4)
            for kept, by in ((judged, seen), (true, scores)):
                kept.append(Comparison("", four, tuple(np.argsort(np.argsort(-by)).tolist())))
    return judged, true


def separate(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Each pair of a ranking as a comparison of its own."""
    return [
        Comparison(c.prompt, (c.responses[i], c.responses[j]), (0, 1) if c.ranks[i] < c.ranks[j] else (1, 0))
        for c in comparisons
        for i, j in itertools.combinations(range(len(c.responses)), 2)
    ]


def best_against_worst(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The first and the last of each ranking, and nothing else."""
    ends = [(c, c.ranks.index(0), c.ranks.index(len(c.ranks) - 1)) for c in comparisons]
    return [Comparison(c.prompt, (c.responses[best], c.responses[worst]), (0, 1)) for c, best, worst in ends]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rankings", type=int, default=500, help="to learn from")
    parser.add_argument("--epochs", type=int, default=4, help="passes over them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()

    ways = {
        "all pairs of a ranking": ("pairs", list, 32),
        "Plackett–Luce": ("plackett_luce", list, 32),
        "the best of four": ("best", list, 32),
        "pairs torn apart": ("pairs", separate, 192),  # as many pairs per step
        "best against worst": ("pairs", best_against_worst, 32),
    }
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in ways}
    for seed in args.seeds:
        learned, held_out = rankings(args.rankings, 2 * seed)[0], rankings(200, 2 * seed + 1)
        texts = [response for c in learned for response in c.responses]
        for name, (loss, form, batch_size) in ways.items():
            config = BradleyTerryConfig(3e-3, args.epochs, batch_size, loss=loss)
            with tempfile.TemporaryDirectory() as body:
                shape = NewModelConfig(tokenizer="word", n_layer=1)
                new_model(shape, texts, seed, "cpu", "float32").save_pretrained(body)
                model = new_reward_model(body, seed=seed)
            for _ in fit_comparisons(model, form(learned), config, seed=seed):
                pass
            labels, gold = (measure_comparisons(model, those) for those in held_out)
            own = measure_comparisons(model, learned)
            found[name].append((gold["accuracy"], labels["accuracy"], labels["log_loss"], own["log_loss"]))
    print(f"{len(args.seeds)} seeds, {args.rankings} rankings of four, mean (± half of its 95 % interval)")
    print(f"{'':24} gold accuracy    label accuracy   log loss         loss learned")
    for name, rows in found.items():
        cells = []
        for column in zip(*rows, strict=True):
            interval = mean_interval("x", column)
            cells.append(f"{interval['x']:.3f} (±{interval.get('x_high', np.nan) - interval['x']:.3f})")
        print(f"{name:24} {'   '.join(cells)}")


if __name__ == "__main__":
    main()
