"""Policy folders and files small enough that a whole run takes a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.tiny import tiny_config
from rlhf_env.text.corpus import film_reviews, review_openings
from rlhf_env.text.tokenizers import word_tokenizer
from tests.builders import PROMPTS, random_model


def write_tiny_files(folder: Path) -> Path:
    """`policy`, a random GPT-2 over the words of the built-in reviews, and `prompts.txt`, their 79 openings."""
    tokenizer = word_tokenizer(film_reviews())
    config = tiny_config("gpt2", len(tokenizer), n_embd=16, n_head=2)
    CausalLM.from_config(config, tokenizer).save_pretrained(folder / "policy")
    (folder / "prompts.txt").write_text("\n".join(review_openings()), encoding="utf-8")
    return folder


def write_letter_files(folder: Path) -> Path:
    """`policy`, the random model of `builders`, and `prompts.txt`; its gold is "tests.builders:letter_score"."""
    random_model().save_pretrained(folder / "policy")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    return folder


def write_rows(file: Path, *rows: Any) -> str:
    """A .jsonl file of `rows`, each an object or a line as it stands; its name."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(file)


def without_times(file: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, but for what no two runs share."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("seconds", "tokens_per_second"))} for row in rows]
