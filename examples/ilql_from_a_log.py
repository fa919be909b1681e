"""Offline: from a log of aimless walks to shortest paths that nobody in the log ever took from there.

    python examples/ilql_from_a_log.py      # about a minute

The log is text: walks over a grid of twenty places, a letter each, from a start (the prompt) to the goal, by somebody
who mostly turns the wrong way. A letter costs 1, arriving is worth 10. From the far corners nobody ever took a shortest
path, so no walk of the log is worth imitating there. ILQL learns from the same text what each step is worth, and puts
together pieces of different walks ("stitching").
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
import torch

from rlhf_env import CausalLM, Rollout, TextGenerationVectorEnv, collect
from rlhf_env.agents import ILQL, ILQLConfig
from rlhf_env.models.tiny import tiny_config
from rlhf_env.text.tokenizers import char_tokenizer

LETTERS, GOAL, LONGEST = "abcdefghijklmnopqrst", "t", 24
WIDE, RIGHT = 5, 0.3  # four rows of five; how often a turn is one towards the goal


def apart(a: str, b: str) -> int:
    """Steps between two places of the grid."""
    (y, x), (v, u) = divmod(LETTERS.index(a), WIDE), divmod(LETTERS.index(b), WIDE)
    return abs(y - v) + abs(x - u)


def walk(start: str, rng: np.random.Generator) -> str:
    """An aimless walk from `start`, without it; it ends at the goal or after too long."""
    path = start
    while path[-1] != GOAL and len(path) <= LONGEST:
        near = [b for b in LETTERS if apart(path[-1], b) == 1]
        closer = [b for b in near if apart(b, GOAL) < apart(path[-1], GOAL)]
        wrong = [b for b in near if b not in closer]
        path += str(rng.choice(closer if rng.random() < RIGHT or not wrong else wrong))
    return path[1:]


def worth(prompts: list[str], responses: list[str]) -> list[float]:
    """11 − steps of a walk that is one and arrives; −50 of what is not."""
    whole = [p + r for p, r in zip(prompts, responses, strict=True)]
    real = [w.endswith(GOAL) and all(apart(a, b) == 1 for a, b in zip(w, w[1:], strict=False)) for w in whole]
    return [10.0 - len(r) if ok else -50.0 for r, ok in zip(responses, real, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--walks", type=int, default=20_000, help="that are tried; those that arrive are the log")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the walks and the model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(args.seed)
    starts = [a for a in LETTERS if a != GOAL]
    tried = [(start, walk(start, rng)) for start in rng.choice(starts, args.walks).tolist()]
    log = [(start, path) for start, path in tried if path.endswith(GOAL)]
    best = {a: min((len(path) for start, path in log if start == a), default=LONGEST) for a in starts}
    far = [a for a in starts if best[a] > apart(a, GOAL)]
    print(f"log: {len(log)} walks of {np.mean([len(path) for _, path in log]):.1f} steps, e.g. {log[0]}")

    tokenizer = char_tokenizer(LETTERS)
    config = tiny_config("gpt2", len(tokenizer), n_layer=2, n_embd=64, n_head=4, n_positions=LONGEST + 2)
    policy = CausalLM.from_config(config, tokenizer, seed=args.seed)
    envs = TextGenerationVectorEnv(
        64, prompts=far or starts, tokenizer=tokenizer, reward_model=worth, max_new_tokens=LONGEST, beta=0.0
    )
    prompts = [tokenizer(start)["input_ids"][-1:] for start, _ in log]
    responses = [[*tokenizer(path)["input_ids"][-len(path) :], tokenizer.eos_token_id] for _, path in log]
    data = Rollout.of_tokens(prompts, responses, envs.task.law)
    end = torch.arange(data.reward.shape[1]) == (data.lengths - 1).unsqueeze(1)
    data = replace(data, reward=torch.where(end, 10.0, -1.0) * data.response_mask)
    settings = ILQLConfig(learning_rate=1e-3, epochs=args.epochs, tau=0.9, perturbation=16.0, conservatism=0.05)
    agent = ILQL(policy, replace(settings, target_rate=0.05), seed=args.seed)
    for _ in agent.fit(data):
        pass

    print(f"\n{len(far)} far starts, 20 walks each    arrive    steps")
    for name, model in {"imitating the log": agent.model, "ILQL": agent.policy}.items():
        score = collect(model, envs, [a for a in far or starts for _ in range(20)], seed=1).score
        arrived = score > -50
        print(f"{name:<29}{float(arrived.float().mean()):>8.0%}{float((10 - score[arrived]).mean()):>9.2f}")
    print(f"{'best walk in the log':<37}{np.mean([best[a] for a in far]):>9.2f}")
    print(f"{'shortest path':<37}{np.mean([apart(a, GOAL) for a in far]):>9.2f}")


if __name__ == "__main__":
    main()
