"""How many labels does a good reward need, if somebody chooses what to ask? Five rules, linear rewards, exact numbers.

    python examples/query_selection.py      # half a minute

Gold is linear in 8 features, of standard deviation 2 (a labeler who errs often) or 6 (who seldom does); answers follow
Bradley–Terry. In each of 12 rounds a rule chooses 16 pairs in a new pool of 100 prompts with 6 responses, and 16 linear
models learn from bootstraps of all answers. Printed are, on 2,000 new prompts: how often their mean prefers what gold
prefers, and the gold of the response it finds best, from 0, a random one's, to 1, the best one's.
"""

from __future__ import annotations

import argparse
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from rlhf_env.intervals import mean_interval
from rlhf_env.preferences.queries import Rule, select

Array = NDArray[np.float64]
FEATURES, MEMBERS, PROMPTS, RESPONSES, ASKED, ROUNDS, RIDGE = 8, 16, 100, 6, 16, 12, 0.5


def fit(x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Weights [M, F] of linear models of P(first preferred) = σ(w·x), x [n, F] of differences, y [n] of 0 and 1.

    Each by Newton's method on a bootstrap of the answers, with a draw of its own from the prior N(0, 1 / RIDGE) for its
    centre, so that members differ even where there are few answers (Osband et al. 2018, arXiv 1806.03335).
    """
    w = prior = rng.normal(size=(MEMBERS, FEATURES)) / np.sqrt(RIDGE)
    counts = rng.multinomial(len(x), np.full(len(x), 1 / len(x)), size=MEMBERS)  # [M, n]
    for _ in range(30):
        p = 1 / (1 + np.exp(-np.clip(w @ x.T, -30, 30)))
        gradient = (counts * (p - y)) @ x + RIDGE * (w - prior)
        hessian = np.einsum("mn,nf,ng->mfg", counts * p * (1 - p), x, x) + RIDGE * np.eye(FEATURES)
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        w = w - step * np.minimum(1, 2 / np.linalg.norm(step, axis=1, keepdims=True))
    return w


def run(rule: Rule, seed: int, scale: float) -> list[tuple[float, float]]:
    """Accuracy and share of the best gold after each round."""
    world, rng = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    gold, new = scale * world.normal(size=FEATURES) / FEATURES**0.5, world.normal(size=(2000, RESPONSES, FEATURES))
    differences, answers, w, found = [], [], rng.normal(size=(MEMBERS, FEATURES)) / np.sqrt(RIDGE), []
    for _ in range(ROUNDS):
        pool = world.normal(size=(PROMPTS, RESPONSES, FEATURES))
        n, i, j = select(rule, np.einsum("nkf,mf->mnk", pool, w), ASKED, rng).T
        differences.append(pool[n, i] - pool[n, j])
        answers.append(world.random(ASKED) < 1 / (1 + np.exp(-differences[-1] @ gold)))
        w = fit(np.concatenate(differences), np.concatenate(answers).astype(float), rng)
        true, said = new @ gold, new @ w.mean(0)  # [prompts, responses]
        best, right = true[np.arange(2000), said.argmax(1)], (true[:, 0] > true[:, 1]) == (said[:, 0] > said[:, 1])
        found.append((right.mean(), best.mean() / true.max(1).mean()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--scales", type=float, nargs="+", default=[2.0, 6.0], help="standard deviations of gold")
    args = parser.parse_args()
    print("| scale | rule | labels | accuracy | less uniform's | gold of best | for 90 % |", "|---" * 7 + "|", sep="\n")
    for scale in args.scales:
        results = {rule: np.array([run(rule, seed, scale) for seed in range(args.seeds)]) for rule in get_args(Rule)}
        for rule, found in results.items():  # [seeds, rounds, 2]
            needed = [next((ASKED * (1 + r) for r, (a, _) in enumerate(x) if a >= 0.9), np.inf) for x in found]
            for r in (2, 5, 11):
                columns = found[:, r, 0], found[:, r, 0] - results["uniform"][:, r, 0], found[:, r, 1]
                x = [mean_interval("x", column) for column in columns]
                cells = " | ".join("{x:.3f} [{x_low:.3f}, {x_high:.3f}]".format(**cell) for cell in x)
                print(f"| {scale:g} | {rule} | {ASKED * (r + 1)} | {cells} | {np.median(needed):g} |", flush=True)


if __name__ == "__main__":
    main()
