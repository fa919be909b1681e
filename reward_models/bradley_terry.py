"""A reward model learned from comparisons: P(first preferred) = σ(logit of the first − logit of the second).

Bradley & Terry 1952; for language models Ziegler et al. 2019 (arXiv 1909.08593), Stiennon et al. 2020 (2009.01325) and
Ouyang et al. 2022 (2203.02155). What is learned is an ordinary sequence classifier with one logit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_env.errors import ConfigError, DataError, RewardError, TokenizerError
from rlhf_env.functional import bradley_terry_loss
from rlhf_env.models.descent import descend
from rlhf_env.preferences.reward_metrics import measure_logits
from rlhf_env.reward_models.classifier import ClassifierReward, padding_token
from rlhf_env.settings import BradleyTerryConfig
from rlhf_env.text.codec import Codec
from rlhf_env.types import Comparison

__all__ = ["BradleyTerryConfig", "fit_comparisons", "measure_comparisons", "new_reward_model", "usable"]


def new_reward_model(
    body: str | Path,
    *,
    seed: int = 0,
    of: Literal["text", "response"] = "text",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_length: int | None = None,
) -> ClassifierReward:
    """A reward model to be trained: `body`, any Hugging Face folder or hub name, with a fresh head of one logit.

    Head weights are drawn from N(0, 1/(d + 1)) for an input of width d (Stiennon et al. 2020), by `seed`
    alone; biases are 0 and dropout is off. Weights are read from safetensors only. Raises `ConfigError` where weights
    other than the head's are missing, and `TokenizerError` where the tokenizer is not the body's or cannot pad.
    """
    name = str(body)
    folder = Path(body)
    if not folder.is_dir() and (folder.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise ConfigError(f"there is no folder {name}")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"{name} is not a Hugging Face model folder: it has no config.json")
    try:
        model, absent = _load(name, dtype)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{name} cannot be the body of a reward model: {reason}") from error
    inside = f"{model.base_model_prefix}."
    if lacking := sorted(key for key in absent if key.startswith(inside) and ".pooler." not in key):
        raise ConfigError(f"{name} lacks the weights {', '.join(lacking[:5])}: they would be random")
    _draw(seed, {k: w for k, w in model.named_parameters() if k in absent or not k.startswith(inside)})

    vocab_size = model.get_input_embeddings().weight.shape[0]
    if (size := Codec.of(tokenizer).vocab_size) > vocab_size:
        raise TokenizerError(
            f"the tokenizer of {name} has {size} tokens but the model's embedding only {vocab_size} rows: it is not "
            "the model's own, or tokens were added without resize_token_embeddings"
        )
    if (pad := padding_token(tokenizer, vocab_size)) is None:
        raise TokenizerError(
            f"the tokenizer of {name} has no special token to fill shorter texts with that plain text could not become "
            "too: give it a pad_token, add its embedding and save both"
        )
    model.config.get_text_config().pad_token_id = pad
    return ClassifierReward.from_model(model.to(device), tokenizer, of=of, max_length=max_length)


def usable(reward: ClassifierReward, comparisons: Sequence[Comparison]) -> tuple[list[Comparison], int]:
    """The comparisons that can teach `reward` something, and how many were left out.

    Where all responses become the same tokens, say because only their beginnings differ and were cut off, every score
    difference is 0 and so is the gradient.
    """
    kept = [c for c in comparisons if len(set(map(tuple, _rows(reward, c)))) > 1]
    if not kept:
        raise DataError(
            f"of {len(comparisons)} comparisons none has responses that differ in the {reward.max_length} tokens which "
            "the reward model reads"
        )
    return kept, len(comparisons) - len(kept)


def fit_comparisons(
    reward: ClassifierReward,
    comparisons: Sequence[Comparison],
    config: BradleyTerryConfig = BradleyTerryConfig(),  # noqa: B008 (frozen)
    *,
    seed: int = 0,
) -> Iterator[dict[str, float]]:
    """Minimise the mean over comparisons of the mean `bradley_terry_loss` of their pairs, yielding metrics per step.

    Every response is read once per epoch, and all pairs of a ranking of K learn from its K logits (Ouyang et al. 2022,
    eq. 1): as separate comparisons they overfit within one epoch. `loss` is in nats per pair, `accuracy` that of the
    batch before the step, over pairs that are no tie. The order depends on `seed` and the epoch.
    """
    if not comparisons:
        raise DataError("there are no comparisons to learn from")
    rows = [_rows(reward, comparison) for comparison in comparisons]

    def loss_of(batch: list[int]) -> tuple[Tensor, dict[str, float]]:
        logits = reward.forward([row for i in batch for row in rows[i]])
        difference, preference, weight = _pairs([comparisons[i] for i in batch], logits)
        right = _right(difference.detach().double().cpu().numpy(), preference.double().cpu().numpy())
        accuracy = {"accuracy": float(right.mean())} if len(right) else {}
        return (weight * bradley_terry_loss(difference, preference)).sum(), accuracy

    yield from descend([p for p in reward.model.parameters() if p.requires_grad], len(rows), loss_of, config, seed)


def measure_comparisons(reward: ClassifierReward, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """How well the logits predict comparisons that were not learned from; plain numbers and lists, ready for JSON.

    accuracy     share of pairs, ties left out, whose preferred response has the higher logit (half where they are
                 equal), with its 95 % interval; pairs of one ranking are not independent, so it counts rankings
    log_loss     mean `bradley_terry_loss`, in nats per pair; log 2 = 0.693 for one who knows nothing
    brier        mean (P − y)² with y = 1, 0, or 0.5 for a tie
    ece          expected calibration error: mean |predicted − observed| over the bins, weighted by their counts
    reliability  its bins that are not empty; each pair counts in both orders, so none stands first
    margin       mean lead of the preferred response, in logits, ties left out
    """
    if not comparisons:
        raise DataError("there are no comparisons to measure on")
    responses = [response for c in comparisons for response in c.responses]
    logits = reward.logits([c.prompt for c in comparisons for _ in c.responses], responses)
    if not np.isfinite(logits).all():
        broken = responses[int(np.flatnonzero(~np.isfinite(logits))[0])]
        raise RewardError(f"the reward model's logit of the response {broken[:60]!r} is not finite")
    return measure_logits(comparisons, np.split(logits, np.cumsum([len(c.responses) for c in comparisons])[:-1]))


def _rows(reward: ClassifierReward, comparison: Comparison) -> list[list[int]]:
    return reward.encode([comparison.prompt] * len(comparison.responses), comparison.responses)


def _pairs(comparisons: Sequence[Comparison], logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of all pairs: logit difference, preference and weight, such that each comparison weighs the same and all 1."""
    first, second, preference, weight = [], [], [], []
    offset = 0
    for comparison in comparisons:
        pairs = comparison.pairs
        for i, j, y in pairs:
            first.append(offset + i)
            second.append(offset + j)
            preference.append(y)
            weight.append(1 / (len(pairs) * len(comparisons)))
        offset += len(comparison.responses)
    return logits[first] - logits[second], logits.new_tensor(preference), logits.new_tensor(weight)


def _right(difference: np.ndarray, preference: np.ndarray) -> np.ndarray:
    """1 for each pair, ties left out, that is predicted right, 0 where wrong, 0.5 where nothing is predicted."""
    lead = (difference * (preference - 0.5))[preference != 0.5]
    return 0.5 + 0.5 * np.sign(lead)


def _load(name: str, dtype: torch.dtype) -> tuple[Any, set[str]]:
    """A classifier of one logit without dropout, and the weights that it did not find."""
    config = AutoConfig.from_pretrained(name, num_labels=1)
    config.update({k: 0.0 for k, v in config.to_dict().items() if "drop" in k and isinstance(v, float)})
    # A body that was a reward model before brings the normaliser of a head that is replaced.
    config.update({"reward_mean": 0.0, "reward_std": 1.0, "reward_max_length": None})
    log = logging.getLogger("transformers.modeling_utils")
    log.addFilter(_is_no_report)
    try:
        with torch.random.fork_rng(devices=[]):  # what is drawn here is drawn again
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                name,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    finally:
        log.removeFilter(_is_no_report)
    model, info = loaded
    return model, {key if isinstance(key, str) else key[0] for key in info["missing_keys"] | info["mismatched_keys"]}


def _is_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()  # that the head is missing is as it should be


def _draw(seed: int, weights: Mapping[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, weight in weights.items():
        with torch.no_grad():
            if weight.dim() == 2:
                weight.copy_(torch.randn(weight.shape, generator=generator) / math.sqrt(weight.shape[1] + 1))
            else:  # a bias, or the gain of a normalisation
                weight.fill_(float(name.endswith("weight")))
