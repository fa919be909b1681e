"""What the KL estimators k1, k2, k3 are worth as numbers, as rewards and as losses: exactly, by listing every response.

    python examples/kl_estimators.py      # half a minute; the table of docs/agents/kl.rst

For policies at growing distance from the reference, on-policy expectations over all responses of an enumerable world:
the estimator's bias and deviation per sequence, and what a gradient step on it follows, compared with the gradient of
the exact KL of sequences (cosine, and length as a multiple of its length).

as reward       a constant that each token is charged with, reinforced by what is still to come (policy gradient)
as loss         differentiated at the sampled tokens, each token for itself (how GRPO and most libraries do it)
of sequences    differentiated as one number of the whole response, k(Σ log π/ref)
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_env.functional import gather_logp, kl_full, kl_k1, kl_k2, kl_k3
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.types import Rollout
from rlhf_env.worlds.enumerable import EnumerableWorld

ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def moved(world: EnumerableWorld, distance: float) -> CausalLM:
    """A policy at about `distance` nats: steps of exact gradient ascent on gold, without the KL term."""
    policy: CausalLM = world.policy().double()  # type: ignore[assignment]
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-4)
    while float(world.kl(world.sequence_log_probs(policy).detach())) < distance:
        _, gradient = world.exact_gradient(policy, beta=1e-9)
        for p, g in zip(policy.parameters(), gradient, strict=True):
            p.grad = -g
        optimizer.step()
    return policy


def along(loss: Tensor, policy: CausalLM) -> Tensor:
    gradients = torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True, retain_graph=True)
    pairs = zip(gradients, policy.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


def compare(world: EnumerableWorld, policy: CausalLM) -> dict[str, list[float]]:
    """Rows: KL, bias and deviation in nats per sequence, then cosine and relative length of each kind of gradient."""
    rollout = Rollout.of_tokens([[0]] * len(world.sequences), world.sequences.tolist(), world.law)
    own = policy.response_log_probs(rollout)[0]
    ref = world.reference.double().response_log_probs(rollout)[0].detach()  # type: ignore[operator]
    logp, ref_logp = gather_logp(own, rollout.response_ids), gather_logp(ref, rollout.response_ids)  # [N, T]
    probability = logp.sum(1).exp()
    exact_kl = (probability * (logp - ref_logp).sum(1)).sum()
    exact, p, exact_kl = along(exact_kl, policy), probability.detach(), exact_kl.detach()

    def gradients(terms: Tensor, whole: Tensor | None) -> list[float]:
        to_go = terms.detach().flip(1).cumsum(1).flip(1)
        found = [along((p * (to_go * logp).sum(1)).sum(), policy), along((p * terms.sum(1)).sum(), policy)]
        found += [] if whole is None else [along((p * whole).sum(), policy)]
        return [x for g in found for x in (cosine(g, exact), float(g.norm() / exact.norm()))]

    rows = {}
    for name, k in ESTIMATORS.items():
        terms, whole = k(logp, ref_logp), k(logp.sum(1), ref_logp.sum(1))
        total = terms.sum(1).detach()
        mean = (p * total).sum()
        deviation = (p * (total - mean) ** 2).sum().sqrt()
        rows[name] = [float(mean - exact_kl), float(deviation), *gradients(terms, whole)]
    terms = kl_full(own, ref)  # [N, T], the KL of the next token in each state
    total = terms.sum(1).detach()
    mean, deviation = (p * total).sum(), (p * (total - (p * total).sum()) ** 2).sum().sqrt()
    rows["full"] = [float(mean - exact_kl), float(deviation), *gradients(terms, None)]
    return {name: [float(exact_kl), *row] for name, row in rows.items()}


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a, b, dim=0)) if a.norm() > 1e-9 else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--distances", type=float, nargs="+", default=[0.1, 1.0, 3.0], help="nats from the reference")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    columns = ["KL", "bias", "deviation"]
    columns += [f"{use}: {m}" for use in ("reward", "loss", "sequence") for m in ("cos", "norm")]
    print("| estimator | " + " | ".join(columns) + " |\n" + "|---" * (1 + len(columns)) + "|")
    for distance in arguments.distances:
        found = []
        for seed in arguments.worlds:
            world = EnumerableWorld.make(seed, vocab_size=4, length=4)
            found.append(compare(world, moved(world, distance)))
        for name in found[0]:
            means = torch.tensor([rows[name] for rows in found]).mean(0).tolist()
            cells = [f"{x:.3f}" if x == x else "–" for x in means] + ["–"] * (len(columns) - len(means))
            print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
