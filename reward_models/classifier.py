"""A Hugging Face sequence classifier as reward model."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_env.errors import ConfigError, RewardError


class ClassifierReward:
    """The logit that a classifier, read by its own tokenizer, gives to a text.

    `folder` is a model saved with its tokenizer; weights that are missing from it or left over are an error, since
    the head would be random. `label` (name or index) chooses among several logits. `of="text"` scores prompt and
    response as one text, `of="response"` the response alone. Texts longer than `max_length` tokens (default: what
    model and tokenizer allow) lose their beginning.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        label: str | int | None = None,
        of: Literal["text", "response"] = "text",
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
        max_length: int | None = None,
    ) -> None:
        if of not in ("text", "response"):
            raise ConfigError(f"of must be 'text' or 'response', got {of!r}")
        self.of, self.folder = of, Path(folder)
        self.model = _load_model(self.folder, dtype).to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder, padding_side="right", truncation_side="left")
        self.label = _label_index(self.model.config, label)
        config = self.model.config.get_text_config()
        # Decoder classifiers find the last token of a padded row by this id; without one, rows must go singly.
        self._pad: int | None = config.pad_token_id
        self.batch_size = 1 if self._pad is None else batch_size
        context = getattr(config, "max_position_embeddings", None) or 2**31 - 1
        self.max_length = min(max_length or context, context, self.tokenizer.model_max_length)

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64]:
        """Logit of each text, [B]; the same whichever texts share its batch, up to rounding."""
        texts = list(responses) if self.of == "response" else list(map("".join, zip(prompts, responses, strict=True)))
        rows = [self._encode(text) for text in texts]
        scores = np.empty(len(rows), dtype=np.float64)
        by_length = np.argsort([len(row) for row in rows], kind="stable")  # little padding per batch
        for start in range(0, len(rows), self.batch_size):
            chosen = by_length[start : start + self.batch_size]
            scores[chosen] = self._logits([rows[i] for i in chosen])
        return scores

    def _encode(self, text: str) -> list[int]:
        ids = self.tokenizer(text, truncation=True, max_length=self.max_length, split_special_tokens=True)["input_ids"]
        if not ids:  # an empty response still needs a score
            ids = [t for t in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id) if t is not None][:1]
        if not ids:
            raise RewardError(f"the classifier {self.folder} has no token for the text {text!r}, so it cannot score it")
        return ids

    @torch.inference_mode()
    def _logits(self, rows: list[list[int]]) -> NDArray[np.float64]:
        width = max(map(len, rows))
        ids = torch.tensor([row + [self._pad or 0] * (width - len(row)) for row in rows], device=self.model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.model.device)
        return self.model(input_ids=ids, attention_mask=mask).logits[:, self.label].double().cpu().numpy()


def _load_model(folder: Path, dtype: torch.dtype):
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is not a model folder: it has no config.json")
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{folder} cannot be loaded as a sequence classifier: {error}") from error
    problems = [f"{kind.replace('_', ' ')} {sorted(map(str, keys))}" for kind, keys in info.items() if keys]
    if problems:
        raise ConfigError(
            f"{folder} does not hold a complete {type(model).__name__}, so part of it would be random: "
            f"{'; '.join(problems)}. Train or convert it to a sequence classifier first"
        )
    return model


def _label_index(config, label: str | int | None) -> int:
    names = {str(name): int(i) for i, name in config.id2label.items()}
    if label is None and len(names) == 1:
        return 0
    if label in names:
        return names[label]
    if isinstance(label, int) and 0 <= label < len(names):
        return label
    close = get_close_matches(str(label), names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"the classifier has the labels {list(names)}: choose one as label=, got {label!r}{hint}")
