"""A reward model's time: learning from 1,000 pairs, and scoring relative to the bare forward pass of its classifier.

    python benchmarks/reward.py

A GPT-2 of two layers and width 64 on responses of 16 to 48 characters. The bare forward gets the same batches, padded
and in order of length already; scoring has to read the texts, sort, pad and put the scores back. One thread, process
time; the ratio is taken within a round, and the median of the rounds is printed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import numpy as np
import torch

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
    torch.set_num_threads(1)
    responses = texts(2 * PAIRS, 0)
    judged = [Comparison("", (responses[2 * i], responses[2 * i + 1]), (0, 1)) for i in range(PAIRS)]
    with tempfile.TemporaryDirectory() as body:
        new_model(NewModelConfig(tokenizer="char"), responses, 0, "cpu", "float32").save_pretrained(body)
        reward = new_reward_model(body)

    began = time.process_time()
    for _ in fit_comparisons(reward, judged, BradleyTerryConfig(epochs=2)):
        pass
    print(f"learning from {PAIRS} pairs, two passes: {time.process_time() - began:.1f} s")

    ready, ratios = batches(reward, responses), []
    for _ in range(rounds):
        began = time.process_time()
        with torch.inference_mode():
            for batch in ready:
                reward.model(**batch)
        bare = time.process_time() - began
        began = time.process_time()
        reward.score([""] * len(responses), responses)
        ratios.append(bare / (time.process_time() - began))
    print(f"scoring: {statistics.median(ratios):.0%} of the bare forward's throughput, {rounds} rounds")


if __name__ == "__main__":
    main()
