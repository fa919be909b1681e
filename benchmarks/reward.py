"""A reward model's time: learning from 1,000 pairs, and scoring relative to the bare forward pass of its classifier.

    python benchmarks/reward.py

GPT-2s of two sizes on responses of 16 to 48 characters. The bare forward gets the same batches, padded and in order of
length already; scoring has to read the texts, sort, pad and put the scores back. One thread, process time; the ratio is
taken within a round, and medians of the rounds are printed.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from typing import Any

import numpy as np
import torch
from paired import begin, row, seconds, table, take_turns

from rlhf_env.reward_models.bradley_terry import fit_comparisons, new_reward_model
from rlhf_env.reward_models.classifier import ClassifierReward
from rlhf_env.settings import BradleyTerryConfig
from rlhf_env.training.config import NewModelConfig
from rlhf_env.training.sft import new_model
from rlhf_env.types import Comparison

PAIRS = 1000


def texts(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("abcdefgh "), rng.integers(16, 49))) for _ in range(count)]


def batches(reward: ClassifierReward, responses: list[str]) -> list[dict[str, Any]]:
    """What `score` gives its classifier: rows of like length, padded on the right."""
    rows = sorted(map(tuple, dict.fromkeys(map(tuple, reward.encode([""] * len(responses), responses)))), key=len)
    parts = [rows[i : i + reward.batch_size] for i in range(0, len(rows), reward.batch_size)]
    pad = reward.model.config.pad_token_id
    filled = []
    for part in parts:
        width = max(map(len, part))
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in part])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in part])
        filled.append({"input_ids": ids, "attention_mask": mask})
    return filled


def new_classifier(responses: list[str], n_layer: int, n_embd: int) -> ClassifierReward:
    with tempfile.TemporaryDirectory() as body:
        new = NewModelConfig(tokenizer="char", n_layer=n_layer, n_embd=n_embd)
        new_model(new, responses, 0, "cpu", "float32").save_pretrained(body)
        return new_reward_model(body)


def learn(reward: ClassifierReward, judged: list[Comparison]) -> None:
    for _ in fit_comparisons(reward, judged, BradleyTerryConfig(epochs=2)):
        pass


@torch.inference_mode()
def bare(reward: ClassifierReward, ready: list[dict[str, Any]]) -> None:
    for batch in ready:
        reward.model(**batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    begin()
    responses = texts(2 * PAIRS, 0)
    judged = [Comparison("", (responses[2 * i], responses[2 * i + 1]), (0, 1)) for i in range(PAIRS)]
    table("classifier", "", "seconds", "texts per second", "of the bare forward")
    for n_layer, n_embd in ((2, 64), (6, 256)):
        size = f"{n_layer} layers of width {n_embd}"
        reward = new_classifier(responses, n_layer, n_embd)
        if n_layer == 2:
            took = seconds(partial(learn, reward, judged))()
            row(size, f"learning from {PAIRS:,} pairs, two passes", f"{took:.2f}", f"{4 * PAIRS / took:,.0f}", "")
        forward = seconds(partial(bare, reward, batches(reward, responses)))
        scoring = seconds(partial(reward.score, [""] * len(responses), responses))
        took, ratio = take_turns({"bare": forward, "scoring": scoring}, rounds)["scoring"]
        row(size, f"scoring {2 * PAIRS:,} texts", f"{took:.2f}", f"{2 * PAIRS / took:,.0f}", f"{1 / ratio:.0%}")


if __name__ == "__main__":
    main()
