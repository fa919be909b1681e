"""Whether SB3's spaces are those of the token MDP, and the sampling law that they carry."""

from __future__ import annotations

from gymnasium import spaces

from rlhf_env.errors import ConfigError
from rlhf_env.types import SamplingLaw

_KEYS = ("input_ids", "attention_mask", "response_mask")


def require_token_space(space: spaces.Space) -> SamplingLaw | None:
    """The law of the token MDP's observation space, None where a wrapper lost it; `ConfigError` if it is another."""
    if not isinstance(space, spaces.Dict):
        raise ConfigError(
            f"the observation space is a {type(space).__name__}, but tokens are read from the Dict of "
            f"{', '.join(_KEYS)}: take away the wrapper that flattens or stacks observations"
        )
    if missing := [key for key in _KEYS if key not in space.spaces]:
        raise ConfigError(
            f"the observation space lacks {', '.join(missing)}; it has {', '.join(space.spaces)}: use a "
            "text-generation environment, and no wrapper that leaves out parts of its observations"
        )
    return getattr(space, "law", None)
