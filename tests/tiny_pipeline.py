"""A whole pipeline so small that it runs in a second, and what it left, apart from times and places."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_env.text.corpus import film_reviews
from rlhf_env.training.config import EnvConfig, PipelineConfig
from rlhf_env.worlds.reviews import pipeline_config


def tiny_pipeline(folder: Path) -> PipelineConfig:
    """The demo's pipeline, shrunk: 200 reviews, whose first four words are the prompts, and four updates."""
    texts = folder / "reviews.txt"
    texts.write_text("\n".join(film_reviews()[:200]) + "\n", encoding="utf-8")
    return replace(
        pipeline_config(),
        demonstrations=str(texts),
        prompts=None,
        eval_share=0.25,
        num_envs=16,
        env=EnvConfig(beta=0.1, max_new_tokens=6),
        sft={
            "new": {"tokenizer": "word", "n_positions": 32, "n_layer": 1, "n_embd": 16, "n_head": 2},
            "fit": {"epochs": 2, "learning_rate": 0.03},
        },
        prefer={"comparisons": 40, "labeler": {"temperature": 0.1}},
        reward={"normalize_on": 48, "fit": {"epochs": 2, "learning_rate": 0.01}},
        train={
            "updates": 4,
            "checkpoint_every": 2,
            "eval_episodes": 8,
            "settings": {"batch_size": 16, "epochs": 1, "learning_rate": 3e-3},
        },
        evaluate={"episodes": 16, "best_of": 4},
    )


def left_in(folder: Path) -> dict[str, Any]:
    """All that a pipeline left but pages and pictures: numbers, texts and models, without times and its own path."""
    kinds = (".json", ".jsonl", ".yaml", ".safetensors")
    files = sorted(path for path in folder.rglob("*") if path.suffix in kinds and path.name != "manifest.json")
    return {str(path.relative_to(folder)): _content(path, folder) for path in files}


def _content(path: Path, folder: Path) -> Any:
    if path.suffix == ".safetensors":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    text = path.read_text(encoding="utf-8").replace(str(folder), "OUT")
    if path.suffix == ".yaml":
        return text
    rows = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else [json.loads(text)]
    return [{k: v for k, v in row.items() if not k.startswith(("seconds", "tokens_per_second"))} for row in rows]
