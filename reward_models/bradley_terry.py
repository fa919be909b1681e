"""A reward model learned from comparisons: P(first preferred) = σ(logit of the first − logit of the second).

Bradley & Terry 1952; for language models Ziegler et al. 2019 (arXiv 1909.08593), Stiennon et al. 2020 (2009.01325) and
Ouyang et al. 2022 (2203.02155). What is learned is an ordinary sequence classifier with one logit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_env.errors import ConfigError, DataError, RewardError, TokenizerError
from rlhf_env.functional import bradley_terry_loss
from rlhf_env.preference_losses import (
    best_loss,
    centering_penalty,
    davidson,
    less_margin,
    outcome_loss,
    plackett_luce_loss,
    rao_kupper,
    smoothed,
    unflipped,
)
from rlhf_env.preferences.reward_metrics import differences, measure_logits
from rlhf_env.reward_models.classifier import ClassifierReward, padding_token
from rlhf_env.reward_models.heads import Head, stored
from rlhf_env.reward_models.learning import learn
from rlhf_env.settings import BradleyTerryConfig
from rlhf_env.text.codec import Codec
from rlhf_env.types import Comparison

__all__ = ["BradleyTerryConfig", "fit_comparisons", "measure_comparisons", "new_reward_model", "usable"]

_STRIDE = 30  # Adam's steps are of the learning rate's size, and a number that ties depend on has a longer way to go
_RAREST = -30.0  # log of what is learned of ties at the least: without ties it would fall for ever, until its log is −∞


def new_reward_model(
    body: str | Path,
    *,
    seed: int = 0,
    of: Literal["text", "response"] = "text",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_length: int | None = None,
    head: Head | None = None,
) -> ClassifierReward:
    """A reward model to be trained: `body`, any Hugging Face folder or hub name, with a fresh head.

    It has one logit, or those of the `head`, one of `heads`. Its weights are drawn from N(0, 1/(d + 1)) for an input of
    width d (Stiennon et al. 2020), by `seed` alone; biases are 0 and dropout is off. Weights are read from safetensors
    only. Raises `ConfigError` where weights other than the head's are missing, and `TokenizerError` where the tokenizer
    is not the body's or cannot pad.
    """
    name = str(body)
    folder = Path(body)
    if not folder.is_dir() and (folder.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise ConfigError(f"there is no folder {name}")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"{name} is not a Hugging Face model folder: it has no config.json")
    try:
        model, absent = _load(name, dtype, head)
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
    kept = [c for c in comparisons if len(set(map(tuple, rows_of(reward, c)))) > 1]
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
    """Minimise the mean of `comparison_costs`, yielding metrics per step.

    Every response is read once per epoch, and all pairs of a ranking of K learn from its K logits (Ouyang et al. 2022,
    eq. 1): as separate comparisons they overfit within one epoch. `loss` is in nats per pair (or per ranking),
    `accuracy` that of the batch before the step, over pairs that are no tie. The order depends on `seed` and the epoch.
    """
    require_learnable(comparisons, config)
    rows = [rows_of(reward, comparison) for comparison in comparisons]
    ties = TieParameter(config)

    def loss_of(batch: list[int]) -> tuple[Tensor, dict[str, float]]:
        logits = reward.forward([row for i in batch for row in rows[i]])
        those = [comparisons[i] for i in batch]
        costs = comparison_costs(logits, those, config, ties.value)
        return costs.mean(), accuracy_of(logits, those) | ties.learned

    yield from learn(reward, len(rows), loss_of, config, seed, beside=ties.parameters)


def require_learnable(comparisons: Sequence[Comparison], config: BradleyTerryConfig) -> None:
    """Raise `DataError` where there is nothing to learn from, or not what `config` asks for."""
    if not comparisons:
        raise DataError("there are no comparisons to learn from")
    if config.margin and all(c.strength is None for c in comparisons):
        raise DataError("margin is in units of a comparison's strength, and of these comparisons none has one")


def comparison_costs(
    logits: Tensor,
    comparisons: Sequence[Comparison],
    config: BradleyTerryConfig = BradleyTerryConfig(),  # noqa: B008 (frozen)
    tie_parameter: Tensor | float = 0.0,
) -> Tensor:
    """What each of C comparisons costs, [C] in nats, from the logits [N] of all their responses in a row.

    That is the mean over its pairs, or with `config.loss` what its ranking costs as a whole; a soft label is one of a
    pair, always. The two penalties are added.
    """
    pairs = flat_pairs(comparisons)
    first, second = logits[pairs.first], logits[pairs.second]
    preference, strength = logits.new_tensor(pairs.preference), logits.new_tensor(pairs.strength)
    each = config.center * centering_penalty(first, second)
    if config.loss == "pairs":
        each = each + pair_loss(first - second, preference, strength, config, tie_parameter)
    of = torch.tensor(pairs.comparison, dtype=torch.int64, device=logits.device)
    costs = logits.new_zeros(len(comparisons)).index_add(0, of, each * logits.new_tensor(pairs.share))
    scores = logits.split([len(c.responses) for c in comparisons])
    if config.loss != "pairs":
        costs = costs + torch.stack([_whole(*one, config.loss) for one in zip(scores, comparisons, strict=True)])
    if config.l2:
        costs = costs + config.l2 * torch.stack([those.square().mean() for those in scores])
    return costs


def _whole(scores: Tensor, comparison: Comparison, loss: str) -> Tensor:
    """What a ranking costs as a whole, from the scores [K] of its responses."""
    if comparison.preference is not None:
        return bradley_terry_loss(scores[0] - scores[1], scores.new_tensor(comparison.preference))
    return (plackett_luce_loss if loss == "plackett_luce" else best_loss)(scores, comparison.ranks)


def pair_loss(
    difference: Tensor,
    preference: Tensor,
    strength: Tensor,
    config: BradleyTerryConfig,
    tie_parameter: Tensor | float = 0.0,
) -> Tensor:
    """What pairs cost, elementwise: `bradley_terry_loss` with the margin, the noise and the ties of `config`."""
    d = less_margin(difference, preference, config.margin * strength)
    target = unflipped(smoothed(preference, config.label_smoothing), config.flip_rate)
    match config.ties:
        case "davidson":
            return outcome_loss(davidson(d, tie_parameter), preference, target)
        case "rao_kupper":
            return outcome_loss(rao_kupper(d, tie_parameter), preference, target)
        case _:
            return bradley_terry_loss(d, target)


class TieParameter:
    """Davidson's ν or Rao and Kupper's θ: given, or learned from where equals are tied in one of three cases, ν = 1."""

    def __init__(self, config: BradleyTerryConfig) -> None:
        self._least = 1.0 if config.ties == "rao_kupper" else 0.0
        self._given = config.tie_parameter
        self.parameters = []  # what is learned: log(ν) or log(θ − 1), divided by _STRIDE
        if config.ties != "half" and self._given is None:
            self.parameters = [nn.Parameter(torch.zeros((), dtype=torch.float64))]

    @property
    def value(self) -> Tensor | float:
        """ν or θ, with gradient where it is learned."""
        if self.parameters:
            return self._least + (_STRIDE * self.parameters[0]).clamp(min=_RAREST).exp()
        return self._least if self._given is None else self._given

    @property
    def learned(self) -> dict[str, float]:
        """A metric, where it is learned."""
        return {"tie_parameter": float(torch.as_tensor(self.value).detach())} if self.parameters else {}


class HasLogits(Protocol):
    """What can be measured on comparisons."""

    def logits(self, prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64]:
        """A number for each response, [B], whose differences predict preferences."""
        ...


def measure_comparisons(reward: HasLogits, comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """How well the logits predict comparisons that were not learned from; plain numbers and lists, ready for JSON.

    accuracy     share of pairs, ties left out, whose preferred response has the higher logit (half where they are
                 equal), with its 95 % interval; pairs of one ranking are not independent, so it counts rankings
    log_loss     mean `bradley_terry_loss`, in nats per pair; log 2 = 0.693 for one who knows nothing
    brier        mean (P − y)² with y = 1, 0, or 0.5 for a tie
    ece          expected calibration error: mean |predicted − observed| over the bins, weighted by their counts
    reliability  its bins that are not empty; each pair counts in both orders, so none stands first
    margin       mean lead of the preferred response, in logits, ties left out

    P is the probability that the model itself states (`stated`): σ of the difference for a Bradley–Terry model. Of one
    that states none, log_loss, brier, ece and reliability are missing.
    """
    if not comparisons:
        raise DataError("there are no comparisons to measure on")
    return measure_logits(comparisons, *stated(reward, comparisons))


def stated(
    reward: HasLogits, comparisons: Sequence[Comparison]
) -> tuple[list[NDArray[np.float64]], list[NDArray[np.float64]] | None]:
    """The logits [K] of every comparison's responses, and log [P / (1 − P)] of its pairs as the model states them.

    Of a `ClassifierReward` these are its `log_odds`, none where it has none; of others the `differences` of logits.
    """
    asked = [c.prompt for c in comparisons for _ in c.responses]
    responses = [response for c in comparisons for response in c.responses]
    ends = np.cumsum([len(c.responses) for c in comparisons])[:-1]
    if isinstance(reward, ClassifierReward):
        every, pairs = torch.from_numpy(reward.all_logits(asked, responses)), flat_pairs(comparisons)
        logits, found = reward.reduce(every).numpy(), reward.log_odds(every[pairs.first], every[pairs.second])
        counts = np.cumsum([len(c.pairs) for c in comparisons])[:-1]
        log_odds = None if found is None else np.split(found.numpy(), counts)
    else:
        logits = reward.logits(asked, responses)
        log_odds = [differences(c, s) for c, s in zip(comparisons, np.split(logits, ends), strict=True)]
    if not np.isfinite(logits).all():
        broken = responses[int(np.flatnonzero(~np.isfinite(logits))[0])]
        raise RewardError(f"the reward model's logit of the response {broken[:60]!r} is not finite")
    return np.split(logits, ends), log_odds


def rows_of(reward: ClassifierReward, comparison: Comparison) -> list[list[int]]:
    """Token ids of what is read of each response."""
    return reward.encode([comparison.prompt] * len(comparison.responses), comparison.responses)


class FlatPairs(NamedTuple):
    """All pairs of several comparisons, by the numbers that their responses have in a row."""

    first: list[int]
    second: list[int]
    preference: list[float]  # for the first
    strength: list[float]  # 0 where it is not known
    share: list[float]  # of its comparison, 1 / the number of its pairs
    comparison: list[int]  # the number of the one that each pair is of


def flat_pairs(comparisons: Sequence[Comparison]) -> FlatPairs:
    """The pairs of different responses of all comparisons."""
    found, offset = FlatPairs([], [], [], [], [], []), 0
    for number, c in enumerate(comparisons):
        pairs = c.pairs
        for i, j, y in pairs:
            row: tuple[Any, ...] = (offset + i, offset + j, y, c.strength or 0.0, 1 / len(pairs), number)
            for column, value in zip(found, row, strict=True):
                column.append(value)
        offset += len(c.responses)
    return found


def accuracy_of(logits: Tensor, comparisons: Sequence[Comparison]) -> dict[str, float]:
    """The share of pairs, ties left out, that logits [N] of all responses in a row predict right; empty for none."""
    pairs, known = flat_pairs(comparisons), logits.detach().double().cpu().numpy()
    right = _right(known[pairs.first] - known[pairs.second], np.array(pairs.preference))
    return {"accuracy": float(right.mean())} if len(right) else {}


def _right(difference: np.ndarray, preference: np.ndarray) -> np.ndarray:
    """1 for each pair, ties left out, that is predicted right, 0 where wrong, 0.5 where nothing is predicted."""
    lead = (difference * (preference - 0.5))[preference != 0.5]
    return 0.5 + 0.5 * np.sign(lead)


def _load(name: str, dtype: torch.dtype, head: Head | None) -> tuple[Any, set[str]]:
    """A classifier without dropout that has the logits of `head`, and the weights that it did not find."""
    labels = ("reward",) if head is None else head.labels
    config = AutoConfig.from_pretrained(name, num_labels=len(labels))
    config.id2label, config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    config.update({k: 0.0 for k, v in config.to_dict().items() if "drop" in k and isinstance(v, float)})
    # A body that was a reward model before brings the normaliser of a head that is replaced.
    config.update({"reward_mean": 0.0, "reward_std": 1.0, "reward_max_length": None} | stored(head))
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
