"""Asking a reward model, and believing only a proper answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_env.errors import RewardError
from rlhf_env.records.safe_text import safe_text
from rlhf_env.types import RewardModel


def scores_of(
    reward_model: RewardModel | Callable[..., Any], prompts: Sequence[str], responses: Sequence[str]
) -> NDArray[np.float64]:
    """One finite score per response, [B], from a `RewardModel` or a callable of the same signature.

    A tensor, array or list of numbers is accepted; anything else, and any NaN or infinity, raises `RewardError`.
    """
    ask = getattr(reward_model, "score", reward_model)
    who = f"the reward model {_name(reward_model)}"
    if not callable(ask):
        raise RewardError(f"{who} is no reward model: it has no method score(prompts, responses) and is not callable")
    answer = ask(list(prompts), list(responses))
    scores = _array(answer, who)
    if scores.shape != (len(responses),):
        raise RewardError(
            f"{who} returned scores of shape {list(scores.shape)} for {len(responses)} responses; "
            f"it must return one number for each, shape [{len(responses)}]"
        )
    if not (finite := np.isfinite(scores)).all():
        row = int(np.argmin(finite))
        raise RewardError(
            f"{who} returned {int((~finite).sum())} of {len(scores)} scores that are not finite; the first is "
            f'{scores[row]} in row {row}, for the response "{safe_text(responses[row][:80])}"'
        )
    return scores


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
    return f"{named.__module__}.{named.__qualname__}"
