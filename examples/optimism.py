"""Does it pay to look where the reward models disagree? Two rounds of comparisons, the second from an optimist.

    python examples/optimism.py      # less than a minute

In each enumerable world a labeler compares a few responses of the reference, and an ensemble of linear reward models
learns from bootstraps of the comparisons. Then a second round of as many comparisons comes from one of four policies:
the reference again, or the exact optimum of the ensemble's mean plus a bonus of −1, 0 or 1 deviations (RUNE, Liang et
al. 2022). All comparisons together make the final ensemble, and the exact optimum of its mean is judged by gold.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from rlhf_env.functional import bradley_terry_loss
from rlhf_env.intervals import mean_interval
from rlhf_env.worlds.enumerable import EnumerableWorld, gibbs_log_probs

MEMBERS, BETA = 8, 0.3


def compare(world: EnumerableWorld, log_probs: Tensor, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` pairs of a policy's responses, rows [count, 2], and who was preferred, [count]: Bradley–Terry on gold."""
    pairs = torch.multinomial(log_probs.exp(), 2 * count, replacement=True, generator=draw).reshape(-1, 2)
    chance = torch.sigmoid(world.gold[pairs[:, 0]] - world.gold[pairs[:, 1]])
    return pairs, (torch.rand(count, generator=draw, dtype=torch.float64) < chance).double()


def ensemble(features: Tensor, pairs: Tensor, preferred: Tensor, draw: torch.Generator) -> Tensor:
    """Scores [K, N] of all responses by K linear models, each of a bootstrap of the comparisons, with a ridge."""
    weights = torch.zeros(MEMBERS, features.shape[1], dtype=torch.float64, requires_grad=True)
    picked = torch.randint(len(pairs), (MEMBERS, len(pairs)), generator=draw)
    difference = features[pairs[:, 0]] - features[pairs[:, 1]]  # [M, F]
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        lead = torch.einsum("kmf,kf->km", difference[picked], weights)
        total = bradley_terry_loss(lead, preferred[picked]).sum() + 0.1 * weights.square().sum()
        total.backward()
        return total

    optimizer.step(loss)  # type: ignore[arg-type]
    return weights.detach() @ features.T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=20)
    parser.add_argument("--comparisons", type=int, nargs="+", default=[50, 200], help="in each of the two rounds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| comparisons | second round from | gold of the final policy | difference to bonus 0, within a world |")
    print("|---|---|---|---|")
    for count in args.comparisons:
        gold: dict[str, list[float]] = {"the reference": [], "bonus −1": [], "bonus 0": [], "bonus 1": []}
        for seed in range(args.worlds):
            world = EnumerableWorld.make(seed, vocab_size=6, length=4, language="bigram")
            features = one_hot(world.sequences, world.vocab_size).flatten(1).double()
            draw = torch.Generator().manual_seed(seed)
            first = compare(world, world.ref_log_probs, count, draw)
            scores, state = ensemble(features, *first, draw), draw.get_state()
            for name in gold:
                draw.set_state(state)
                optimist = world.ref_log_probs
                if name.startswith("bonus"):
                    bonus = float(name.removeprefix("bonus ").replace("−", "-"))
                    optimist = gibbs_log_probs(world.ref_log_probs, scores.mean(0) + bonus * scores.std(0), BETA)
                second = compare(world, optimist, count, draw)
                pairs, preferred = (torch.cat(both) for both in zip(first, second, strict=True))
                final = ensemble(features, pairs, preferred, draw).mean(0)
                gold[name].append(float(world.expected_gold(gibbs_log_probs(world.ref_log_probs, final, BETA))))
        for name, found in gold.items():
            m, d = (
                mean_interval("x", found),
                mean_interval("x", torch.tensor(found).sub(torch.tensor(gold["bonus 0"])).numpy()),
            )
            interval = "–" if name == "bonus 0" else f"{d['x']:+.3f} [{d['x_low']:+.3f}, {d['x_high']:+.3f}]"
            print(f"| {count} | {name} | {m['x']:.3f} [{m['x_low']:.3f}, {m['x_high']:.3f}] | {interval} |", flush=True)


if __name__ == "__main__":
    main()
