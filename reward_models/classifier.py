"""A Hugging Face sequence classifier as reward model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_env.errors import ConfigError, RewardError
from rlhf_env.reward_models.heads import Groups, Steps, head_of, stored
from rlhf_env.reward_models.normalise import moments
from rlhf_env.reward_models.steps import step_ends, token_before


class ClassifierReward:
    """The logit that a classifier, read by its own tokenizer, gives to a text: score = (logit − mean) / std.

    `folder` is a model saved with its tokenizer; weights that are missing from it or left over are an error, since
    the head would be random. `label` (name or index) chooses among several logits. `of="text"` scores prompt and
    response as one text, `of="response"` the response alone. Texts longer than `max_length` tokens lose their
    beginning. A model that `save_pretrained` wrote keeps `of`, `max_length`, mean and std in its config.json; where
    nothing is said, these are "text", what model and tokenizer allow, 0 and 1. One of the `heads` may make the logit
    of several; config.json says which. Of the head `Groups` the `label` chooses one group, with its own mean and std.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        label: str | int | None = None,
        of: Literal["text", "response"] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
        max_length: int | None = None,
    ) -> None:
        model = _load_model(Path(folder), dtype).to(device)
        self._assemble(model, AutoTokenizer.from_pretrained(folder), label, of, batch_size, max_length)

    @classmethod
    def from_model(
        cls,
        model: Any,
        tokenizer: Any,
        *,
        label: str | int | None = None,
        of: Literal["text", "response"] | None = None,
        batch_size: int = 32,
        max_length: int | None = None,
    ) -> Self:
        """A classifier in memory, and the tokenizer that it reads with."""
        reward = cls.__new__(cls)
        reward._assemble(model, tokenizer, label, of, batch_size, max_length)
        return reward

    def _assemble(
        self, model: Any, tokenizer: Any, label: str | int | None, of: Any, batch_size: int, max_length: int | None
    ) -> None:
        self.model = model.eval()  # and it stays so: dropout would make the score depend on chance
        self.tokenizer = tokenizer
        tokenizer.padding_side, tokenizer.truncation_side = "right", "left"
        self.head = head_of(model.config)
        if label is not None and not isinstance(self.head, Groups | None):
            raise ConfigError(f"all logits of this reward model make its score: leave out the label {label!r}")
        self.label = None if self.head is not None and label is None else _label_index(model.config, label)
        self.of = of or getattr(model.config, "reward_of", "text")
        if self.of not in ("text", "response"):
            raise ConfigError(f"of must be 'text' or 'response', got {self.of!r}")
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise ConfigError(f"a score cannot be normalised by the mean {self.mean} and the std {self.std}")
        # Decoder classifiers read the last token of a row that is not this one; without one, rows must go singly.
        config = model.config.get_text_config()
        if config.pad_token_id is None:
            config.pad_token_id = padding_token(tokenizer, model.get_input_embeddings().weight.shape[0])
        self._pad: int | None = config.pad_token_id
        self.batch_size = 1 if self._pad is None else batch_size
        if max_length is not None and max_length < 1:
            raise ConfigError(f"max_length must be at least 1, got {max_length}")
        context = getattr(config, "max_position_embeddings", None) or 2**31 - 1
        wanted = max_length or getattr(model.config, "reward_max_length", None) or context
        self.max_length: int = min(wanted, context, tokenizer.model_max_length)

    @property
    def mean(self) -> float:
        """The logit that scores 0."""
        if isinstance(self.head, Groups) and self.label is not None:
            return self.head.means[self.label] if self.head.means else 0.0
        return getattr(self.model.config, "reward_mean", 0.0)

    @property
    def std(self) -> float:
        """How many units of the logit are one unit of the score."""
        if isinstance(self.head, Groups) and self.label is not None:
            return self.head.stds[self.label] if self.head.stds else 1.0
        return getattr(self.model.config, "reward_std", 1.0)

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64]:
        """(logit − mean) / std of each text, [B]; the same whichever texts share its batch, up to rounding."""
        return (self.logits(prompts, responses) - self.mean) / self.std

    def logits(self, prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64]:
        """The classifier's own number for each text, [B], before any normalisation."""
        return self.reduce(torch.from_numpy(self.all_logits(prompts, responses))).numpy()

    def label_log_odds(self, prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64]:
        """log(p / (1 − p)) of the probability p that the classifier gives its label, [B].

        Of one logit, of a head, and of labels that do not exclude each other (`problem_type` says so) it is the logit,
        p = σ(z); of labels of which one is true, p is their softmax: z − log Σ exp of the others.
        """
        every = torch.from_numpy(self.all_logits(prompts, responses))
        logit, config = self.reduce(every), self.model.config
        if self.head is not None or config.num_labels == 1 or config.problem_type == "multi_label_classification":
            return logit.numpy()
        others = [label for label in range(config.num_labels) if label != self.label]
        return (logit - every[:, others].logsumexp(1)).numpy()

    def all_logits(self, prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64]:
        """Everything that the classifier says of each text, [B, L]; the head `Steps` makes one number of all steps."""
        if isinstance(self.head, Steps):
            scores = [self.head.aggregated(torch.from_numpy(those)) for those in self.step_logits(prompts, responses)]
            return np.array(scores, dtype=np.float64).reshape(-1, 1)
        rows = [tuple(row) for row in self.encode(prompts, responses)]
        distinct = sorted(dict.fromkeys(rows), key=len)  # little padding per batch, and equal texts score exactly alike
        known: dict[tuple[int, ...], list[float]] = {}
        for start in range(0, len(distinct), self.batch_size):
            batch = distinct[start : start + self.batch_size]
            with torch.inference_mode():
                known |= zip(batch, self.read(batch).tolist(), strict=True)
        return np.array([known[row] for row in rows], dtype=np.float64)

    def step_logits(self, prompts: Sequence[str], responses: Sequence[str]) -> list[NDArray[np.float64]]:
        """The logit of every step of each response, [S] each, under the head `Steps`; of those that are not cut off."""
        places = self.places(prompts, responses)
        found: dict[int, NDArray[np.float64]] = {}
        order = sorted(range(len(places)), key=lambda i: len(places[i][0]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            with torch.inference_mode():
                logits = self.read_tokens([places[i][0] for i in batch])[..., 0].double().cpu().numpy()
            for row, i in zip(logits, batch, strict=True):
                tokens = [token for token in places[i][1] if token is not None]
                found[i] = row[tokens or [len(places[i][0]) - 1]]
        return [found[i] for i in range(len(places))]

    def places(self, prompts: Sequence[str], responses: Sequence[str]) -> list[tuple[list[int], list[int | None]]]:
        """What is read of each response, and the number of each step's last token in it; none where it is cut off."""
        if not isinstance(self.head, Steps):
            raise ConfigError("only a model with the head Steps reads steps: new_reward_model(body, head=Steps())")
        if not self.tokenizer.is_fast:
            raise ConfigError(f"{type(self.tokenizer).__name__} does not tell where its tokens stand in a text")
        found: list[tuple[list[int], list[int | None]]] = []
        for prompt, response, ids in zip(prompts, responses, self.encode(prompts, responses), strict=True):
            before = "" if self.of == "response" else prompt
            options = {"truncation": True, "max_length": self.max_length, "split_special_tokens": True}
            offsets = self.tokenizer(before + response, return_offsets_mapping=True, **options)["offset_mapping"]
            ends = [len(before) + end for end in step_ends(response, self.head.separator)]
            found.append((ids, [token_before(end, offsets) for end in ends]))
        return found

    def encode(self, prompts: Sequence[str], responses: Sequence[str]) -> list[list[int]]:
        """Token ids of what is read of each response: its own tokenizer's, at most `max_length`."""
        texts = list(responses if self.of == "response" else map("".join, zip(prompts, responses, strict=True)))
        if not texts:
            return []
        try:
            rows = self._ids(texts)
        except Exception:  # the Rust tokenizers raise bare Exception; one by one shows which text it was
            return [self._encode(text) for text in texts]
        return [row or self._encode(text) for row, text in zip(rows, texts, strict=True)]

    def reduce(self, logits: Tensor) -> Tensor:
        """The one number that is made of a text's logits, [B, L] → [B]: one of them, or what the head says."""
        if self.label is not None:
            return logits[:, self.label]
        assert self.head is not None
        return self.head.reduce(logits)

    def log_odds(self, first: Tensor, second: Tensor) -> Tensor | None:
        """log [P(first preferred) / P(second preferred)] from all logits [P, L] of each, [P]; None where it says none.

        A classifier without a head that has one logit is taken for a Bradley–Terry model; of several logits without a
        head nobody says that one is a preference.
        """
        if self.head is not None and self.label is None:
            return self.head.log_odds(first, second)
        known = self.head is not None or self.model.config.num_labels == 1
        return (first - second)[:, self.label] if known else None

    def forward(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Logits [B] of rows of token ids, with gradient."""
        return self.reduce(self.read(rows))

    def read(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """All logits [B, L] of rows of token ids, with gradient; float32 even where the weights are less precise."""
        return _precise(self.model(**self._padded(rows)).logits)

    def read_tokens(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """What the head makes of the hidden state of every token, [B, T, L], with gradient; right of a row is chance.

        At a row's last token it is what `read` gives. Raises `ConfigError` where the head is not one linear layer.
        """
        hidden = self.model.base_model(**self._padded(rows)).last_hidden_state
        return _precise(linear_head(self.model)(hidden))

    def _padded(self, rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        width, pad = max(map(len, rows)), self._pad or 0
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
        mask = (torch.arange(width) < torch.tensor([[len(row)] for row in rows])).long()
        return {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}

    def normalize_on(self, prompts: Sequence[str], responses: Sequence[str]) -> tuple[float, float]:
        """Make these responses score mean 0 and variance 1; returns the mean and the std of their logits.

        Of a reference's responses, so that β means the same for every reward model (Ziegler et al. 2019, arXiv
        1909.08593, §2).
        """
        every = self.all_logits(prompts, responses)
        if self.head is not None and len(every) > 1 and np.isfinite(every).all():
            self.head = self.head.settled(torch.from_numpy(every))
        mean, std = moments(self.reduce(torch.from_numpy(every)).numpy(), "logit")
        if self.head is None or self.label is None:  # else they are that group's, which its head has
            self.model.config.update({"reward_mean": mean, "reward_std": std})
        return mean, std

    def save_pretrained(self, folder: str | Path) -> None:
        """Write an ordinary Hugging Face folder (safetensors, tokenizer), mean and std in its config.json."""
        told = {"reward_of": self.of, "reward_max_length": self.max_length}
        if self.head is None or self.label is None:
            told |= {"reward_mean": self.mean, "reward_std": self.std}
        self.model.config.update(told | stored(self.head))
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, truncation=True, max_length=self.max_length, split_special_tokens=True)[
            "input_ids"
        ]

    def _encode(self, text: str) -> list[int]:
        try:
            (ids,) = self._ids([text])
        except Exception as error:
            raise RewardError(f"the reward model's tokenizer cannot read {text[:60]!r}: {error}") from error
        if not ids:  # an empty response still needs a score
            ids = [t for t in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id) if t is not None][:1]
        if not ids:
            raise RewardError(f"the reward model's tokenizer makes no token of the text {text!r}: it has no score")
        return ids


def linear_head(model: Any) -> nn.Linear:
    """The one linear layer of a classifier that is not in its body."""
    inside = f"{model.base_model_prefix}."
    found = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and not name.startswith(inside)]
    if len(found) != 1:
        raise ConfigError(f"the head of {type(model).__name__} is not one linear layer")
    return found[0]


def _precise(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def padding_token(tokenizer: Any, vocab_size: int) -> int | None:
    """A special token below `vocab_size` that no text becomes or ends in: the tokenizer's pad, else EOS, else BOS.

    None where there is none: a decoder classifier takes the last *other* token for the end of the text.
    """
    last = _last_of_a_text(tokenizer)
    # An <unk> that is EOS or BOS too is never written: such tokenizers (GPT-2's) know every byte.
    unknown = {tokenizer.unk_token_id} - {tokenizer.eos_token_id, tokenizer.bos_token_id}
    names = [name for name in (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) if name is not None]
    for name, token in zip(names, tokenizer.convert_tokens_to_ids(names), strict=True):
        if token < vocab_size and token not in unknown | {last, *_plain_ids(tokenizer, name)}:
            return token
    return None


def _last_of_a_text(tokenizer: Any) -> int | None:
    """What the tokenizer appends to a text, where it does."""
    probe = next(probe for probe in ("a", *tokenizer.get_vocab()) if _plain_ids(tokenizer, probe))
    plain, whole = _plain_ids(tokenizer, probe), tokenizer.encode(probe, split_special_tokens=True)
    return None if whole[-len(plain) :] == plain else whole[-1]


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    try:
        return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    except Exception:  # a vocabulary without this text
        return []


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
