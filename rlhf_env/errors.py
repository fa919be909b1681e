"""What can go wrong, as exceptions that say what happened, where, and what to do."""

from __future__ import annotations


class RLHFEnvError(Exception):
    """Base of every error raised on purpose by this package; the commands print it as one line."""


class EmptyPromptError(RLHFEnvError, ValueError):
    """A prompt became zero tokens, so there is no state from which to choose the first token."""


class PromptTooLongError(RLHFEnvError, ValueError):
    """A prompt, or prompt plus response, does not fit the observation or the model's context."""


class TokenizerError(RLHFEnvError, ValueError):
    """A tokenizer lacks what the environment needs, or does not fit the model."""


class RewardError(RLHFEnvError, ValueError):
    """A reward model returned the wrong number of scores, a wrong type, or a value that is not finite."""


class NonFiniteError(RLHFEnvError, FloatingPointError):
    """A log-probability, loss or gradient is not finite; the step was refused and no weight was changed."""


class MissingLogProbError(RLHFEnvError, RuntimeError):
    """The environment charges for KL, but nobody told it log π of the actions that were stepped."""


class ConfigError(RLHFEnvError, ValueError):
    """A setting is unknown, of the wrong type, or out of range."""


class ContractError(RLHFEnvError, AssertionError):
    """An environment breaks a promise that token-level environments make; `check_token_env` raises it."""


class DataError(RLHFEnvError, ValueError):
    """A file of data is malformed; the message names file, line and reason."""


class RemoteError(RLHFEnvError, RuntimeError):
    """A server cannot be reached, fails, or answers otherwise than agreed; the message names its address."""


class NegativeKLWarning(UserWarning):
    """The mean KL to the reference is negative beyond chance, which no true KL is."""


class UnboundPolicyWarning(UserWarning):
    """The environment charges the KL of a uniformly random policy because no policy was bound."""
