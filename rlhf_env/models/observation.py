"""Refusing an observation that is no longer what the environment gave, before a model reads nonsense out of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_env.errors import ConfigError

_PARTS = ("input_ids", "attention_mask", "response_mask")


def require_observation(observation: Mapping[str, Any], vocab_size: int | None = None) -> None:
    """Raise `ConfigError`, saying what to do, unless these are states of the token MDP: arrays [L], or [N, L] for N.

    Whole numbers may come as floats, as Stable-Baselines3 gives them, and as tensors. Rows without any token are let
    through: they pad the sequences of a recurrent policy. `vocab_size` is the number of ids the model has rows for.
    """
    if not isinstance(observation, Mapping):
        raise ConfigError(
            f"the observation is a {type(observation).__name__}, not a mapping with {', '.join(_PARTS)}: read it as "
            "the dict the environment gives, with a policy for Dict spaces (MultiInputPolicy in Stable-Baselines3), "
            "and do not wrap the environment in FlattenObservation"
        )
    if missing := [name for name in _PARTS if name not in observation]:
        raise ConfigError(
            f"the observation has no {', '.join(missing)}, only {', '.join(map(str, observation)) or 'nothing'}: "
            "leave out FilterObservation and the like"
        )
    ids, attention, response = (as_array(observation[name]) for name in _PARTS)
    if not ids.shape == attention.shape == response.shape or ids.ndim not in (1, 2):
        shapes = ", ".join(f"{name} {tuple(np.shape(observation[name]))}" for name in _PARTS)
        raise ConfigError(f"the parts of an observation must all be [L] or all be [N, L], got {shapes}")
    for name, part in zip(_PARTS, (ids, attention, response), strict=True):
        if part.dtype.kind == "f" and (broken := part != np.trunc(part)).any():
            raise ConfigError(
                f"{name} holds {part[broken][0]:.6g}{_at(broken)}, which is not a whole number: token ids and masks "
                "were rescaled; with VecNormalize set norm_obs=False, and leave out NormalizeObservation and the like"
            )
    for name, part in (("attention_mask", attention), ("response_mask", response)):
        if (broken := (part != 0) & (part != 1)).any():
            raise ConfigError(f"{name} holds {part[broken][0]:.6g}{_at(broken)}, but masks hold 0 and 1: {_MIXED_UP}")
    if (broken := (ids < 0) | (ids >= (np.inf if vocab_size is None else vocab_size))).any():
        raise ConfigError(
            f"input_ids hold {ids[broken][0]:.6g}{_at(broken)}, which is no token of a vocabulary of "
            f"{vocab_size or 'any size'}: the environment was made with another tokenizer than the model's, or its "
            "observations were changed on the way"
        )
    if (broken := attention[..., 1:] > attention[..., :-1]).any():
        raise ConfigError(
            f"attention_mask goes on after a gap{_at(broken)}, but tokens stand at the left and padding at the right: "
            f"{_MIXED_UP}; pad a batch of your own on the right"
        )
    ends_early = (response[..., 1:] < response[..., :-1]) & (attention[..., 1:] > 0)
    if (broken := (response > attention)).any() or (broken := ends_early).any():
        raise ConfigError(
            f"response_mask does not mark the end of what attention_mask marks{_at(broken)}, as a response that "
            f"follows its prompt does: {_MIXED_UP}"
        )


_MIXED_UP = (
    "the observation's parts were mixed up, e.g. by reading them in the order of a Dict space, which is not the one "
    "you think of: take each by its name"
)


def as_array(part: Any) -> NDArray[Any]:
    """A NumPy array, also from a tensor with gradient or on another device."""
    return part.detach().cpu().numpy() if hasattr(part, "detach") else np.asarray(part)


def _at(broken: NDArray[np.bool_]) -> str:
    """Where the first broken entry of [L] or [N, L] is."""
    place = np.argwhere(broken)[0]
    return f" in row {place[0]}" if len(place) == 2 else ""
