"""Asking a reward model, and believing only a proper answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_env.errors import ConfigError, RewardError
from rlhf_env.records.safe_text import safe_text
from rlhf_env.text.codec import Codec
from rlhf_env.types import ProcessRewardModel, RewardModel

ScoreFn = Callable[[list[str], list[str]], Any]


def scores_of(
    reward_model: RewardModel | ProcessRewardModel | ScoreFn, prompts: Sequence[str], responses: Sequence[str]
) -> NDArray[np.float64]:
    """One finite score per response, [B], from a `RewardModel` or a callable of the same signature.

    A tensor, array or list of numbers is accepted, or a mapping of names to such, which are added up; anything else,
    and any NaN or infinity, raises `RewardError`.
    """
    ask = getattr(reward_model, "score", reward_model)
    if not callable(ask):
        raise RewardError(
            f"{_name(reward_model)} is no reward model: it has no method score(prompts, responses) and is not callable"
        )
    return _summed(ask(list(prompts), list(responses)), reward_model, responses)[0]


def scores_tokens(reward_model: Any) -> bool:
    """Whether `reward_model` is a `ProcessRewardModel`."""
    return callable(getattr(reward_model, "score_tokens", None))


def require_whole(what: str, *reward_models: Any) -> None:
    """Refuse to make `what` of a model that scores tokens: nobody says what becomes of them."""
    if any(map(scores_tokens, reward_models)):
        raise ConfigError(f"the members of {what} score whole responses, and one of these scores tokens")


def judge(
    reward_model: RewardModel | ProcessRewardModel | ScoreFn,
    prompts: Sequence[str],
    prompt_ids: Sequence[Sequence[int]],
    response_ids: Sequence[Sequence[int]],
    codec: Codec,
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """What a reward model says of whole responses [B], and the named parts of it: by their ids if it can, else by text.

    0 for one that scores nothing but tokens.
    """
    by_ids = getattr(reward_model, "score_ids", None)
    if by_ids is not None and _shares(reward_model, codec):
        answer = by_ids([list(ids) for ids in prompt_ids], [list(ids) for ids in response_ids])
        return _summed(answer, reward_model, response_ids)
    ask = getattr(reward_model, "score", reward_model)
    if not callable(ask):
        if scores_tokens(reward_model):
            return np.zeros(len(response_ids)), {}
        return scores_of(reward_model, [], []), {}  # raises
    texts = codec.decode_responses(prompt_ids, response_ids)
    return _summed(ask(list(prompts), texts), reward_model, texts)


def token_scores_of(
    reward_model: Any, prompts: Sequence[str], responses: Sequence[Sequence[str]]
) -> list[NDArray[np.float64]]:
    """One finite number per token, [T_i] for each response, from a `ProcessRewardModel`; checked as `scores_of` is."""
    who = _name(reward_model)
    answer = reward_model.score_tokens(list(prompts), [list(pieces) for pieces in responses])
    if not hasattr(answer, "__len__"):
        raise RewardError(
            f"{who} returned {type(answer).__name__} for tokens: it must return a row of numbers for each response"
        )
    if len(answer) != len(responses):
        raise RewardError(f"{who} scored the tokens of {len(answer)} responses, but {len(responses)} were asked about")
    scores = [_array(row, who) for row in answer]
    for row, (numbers, pieces) in enumerate(zip(scores, responses, strict=True)):
        if numbers.shape != (len(pieces),):
            raise RewardError(
                f"{who} returned numbers of shape {list(numbers.shape)} for response {row}, which has {len(pieces)} "
                "tokens: it must return one for each"
            )
        _require_finite(numbers, who, lambda row, pieces=pieces: "".join(pieces[: row + 1]))
    return scores


def _shares(reward_model: Any, codec: Codec) -> bool:
    """Whether the ids of the environment mean the same text to a reward model (one without a tokenizer says so)."""
    own = getattr(reward_model, "tokenizer", codec.tokenizer)
    return own is codec.tokenizer or Codec.of(own).fingerprint == codec.fingerprint


def _summed(
    answer: Any, reward_model: Any, responses: Sequence[Any]
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    who = _name(reward_model)
    if not isinstance(answer, Mapping):
        return _checked(answer, who, responses), {}
    if not answer:
        raise RewardError(f"{who} returned a mapping without any score")
    parts = {str(name): _checked(part, f"{who}, part {name!r},", responses) for name, part in answer.items()}
    return np.sum(list(parts.values()), axis=0), parts


def _checked(answer: Any, who: str, responses: Sequence[Any]) -> NDArray[np.float64]:
    scores = _array(answer, who)
    if scores.shape != (len(responses),):
        raise RewardError(
            f"{who} returned scores of shape {list(scores.shape)} for {len(responses)} responses; "
            f"it must return one number for each, shape [{len(responses)}]"
        )
    _require_finite(scores, who, lambda row: str(responses[row]))
    return scores


def _require_finite(scores: NDArray[np.float64], who: str, response: Callable[[int], str]) -> None:
    if not (finite := np.isfinite(scores)).all():
        row = int(np.argmin(finite))
        raise RewardError(
            f"{who} returned {int((~finite).sum())} of {len(scores)} scores that are not finite; the first is "
            f'{scores[row]} in row {row}, for the response "{safe_text(response(row)[:80])}"'
        )


def _array(answer: Any, who: str) -> NDArray[np.float64]:
    if isinstance(answer, torch.Tensor):
        answer = answer.detach().cpu()
        answer = (answer.double() if answer.is_floating_point() else answer).numpy()
    try:
        array = np.asarray(answer)
    except ValueError as error:  # a ragged list
        raise RewardError(f"{who} returned something that is no array of numbers: {error}") from error
    if array.dtype.kind not in "biuf":
        raise RewardError(f"{who} returned {type(answer).__name__} of dtype {array.dtype}; scores must be real numbers")
    return array.astype(np.float64)


def _name(reward_model: Any) -> str:
    named = reward_model if hasattr(reward_model, "__qualname__") else type(reward_model)
    return f"the reward model {named.__module__}.{named.__qualname__}"
