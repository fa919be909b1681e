"""What the environment is told of the policy: log π of the actions that are stepped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_env.errors import MissingLogProbError
from rlhf_env.models.observation import as_array

Observation = dict[str, NDArray[Any]]
LogProbFn = Callable[[Observation, NDArray[np.int64]], Any]


class PolicyLogP:
    """log π of N actions at a time: pushed before each step, or asked of a bound function."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.fn: LogProbFn | None = None
        self._pushed: tuple[NDArray[np.float64], NDArray[np.int64]] | None = None
        self._expected = False  # once somebody has spoken, silence is an error

    def bind(self, fn: LogProbFn) -> None:
        """Ask `fn(observation, actions)` for log π of every action that is stepped, [N]."""
        self.fn, self._expected = fn, True

    def expect_push(self) -> None:
        """From here on a step without a push is an error: somebody has promised to push."""
        self._expected = True

    def push(self, logp: Any, actions: Any) -> None:
        """Tell log π of the actions that the next step will be given, [N] each."""
        logp, actions = as_array(logp).astype(np.float64), as_array(actions).astype(np.int64)
        if logp.shape != (self.num_slots,) or actions.shape != (self.num_slots,):
            raise ValueError(
                f"push_logprobs wants one log-probability and one action per environment, [{self.num_slots}], "
                f"got {logp.shape} and {actions.shape}"
            )
        self._pushed, self._expected = (logp, actions), True

    def forget(self) -> None:
        """Let go of what was pushed."""
        self._pushed = None

    def take(
        self, actions: NDArray[np.int64], stepping: NDArray[np.bool_], observation: Callable[[], Observation]
    ) -> NDArray[np.float64] | None:
        """log π [N] of `actions` where they are `stepping`, once; None where nobody has ever said anything.

        Raises `MissingLogProbError` where it is missing, of other actions, or not finite.
        """
        pushed, self._pushed = self._pushed, None
        if pushed is not None:
            logp, told = pushed
            if (stale := stepping & (told != actions)).any():
                slot = int(np.flatnonzero(stale)[0])
                raise MissingLogProbError(
                    f"push_logprobs was told action {told[slot]} for environment {slot}, but {actions[slot]} was "
                    "stepped: push the log-probabilities of exactly the actions given to the next step"
                )
        elif self.fn is not None:
            logp = as_array(self.fn(observation(), actions)).astype(np.float64)
            if logp.shape != (self.num_slots,):
                raise ValueError(f"the bound policy returned shape {logp.shape}, expected ({self.num_slots},)")
        elif self._expected:
            raise MissingLogProbError(
                "no log-probabilities were pushed for this step: call push_logprobs(logp, actions) before every step, "
                "or bind_policy once; for evaluation make the environment with kl_mode='off'"
            )
        else:
            return None
        if not np.isfinite(logp[stepping]).all():
            slot = int(np.flatnonzero(stepping & ~np.isfinite(logp))[0])
            raise MissingLogProbError(
                f"the policy's log-probability in environment {slot} is {logp[slot]}: log π of an action that it "
                "sampled is finite, so the policy's weights or its mask are broken"
            )
        return logp
