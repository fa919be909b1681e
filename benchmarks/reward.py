"""A reward model's time: learning from 1,000 pairs, and scoring relative to the bare forward pass of its classifier.

    python benchmarks/reward.py

A GPT-2 of two layers and width 64 on responses of 16 to 48 characters. The bare forward gets the same batches, padded
and in order of length already; scoring has to read the texts, sort, pad and put the scores back. One thread, process
time; the ratio is taken within a round, and medians of the rounds are printed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import numpy as np
import torch
from paired import begin

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    begin()
    responses = texts(2 * PAIRS, 0)
    judged = [Comparison("", (responses[2 * i], responses[2 * i + 1]), (0, 1)) for i in range(PAIRS)]
    with tempfile.TemporaryDirectory() as body:
        new_model(NewModelConfig(tokenizer="char"), responses, 0, "cpu", "float32").save_pretrained(body)
        reward = new_reward_model(body)

    began = time.process_time()
    for _ in fit_comparisons(reward, judged, BradleyTerryConfig(epochs=2)):
        pass
    learning = time.process_time() - began

    ready, seconds, ratios = batches(reward, responses), list[float](), list[float]()
    for _ in range(rounds):
        began = time.process_time()
        with torch.inference_mode():
            for batch in ready:
                reward.model(**batch)
        bare = time.process_time() - began
        began = time.process_time()
        reward.score([""] * len(responses), responses)
        seconds.append(time.process_time() - began)
        ratios.append(bare / seconds[-1])
    print("\n| a classifier of two layers, width 64 | seconds | texts per second | of the bare forward |")
    print("|---|---|---|---|")
    print(f"| learning from {PAIRS:,} pairs, two passes | {learning:.2f} | {4 * PAIRS / learning:,.0f} | |")
    took = statistics.median(seconds)
    print(f"| scoring {2 * PAIRS:,} texts | {took:.3f} | {2 * PAIRS / took:,.0f} | {statistics.median(ratios):.0%} |")


if __name__ == "__main__":
    main()
