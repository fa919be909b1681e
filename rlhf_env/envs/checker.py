"""Is this a token-level environment as this package means it? For people who write their own worlds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray

from rlhf_env.envs.binding import bind_policy, find_cores
from rlhf_env.envs.core import TokenMDP
from rlhf_env.envs.infos import info_rows
from rlhf_env.envs.policy_logp import Observation
from rlhf_env.errors import ConfigError, ContractError, UnboundPolicyWarning

_PARTS = ("input_ids", "attention_mask", "response_mask")
_STOP_REASONS = ("eos", "stop_string", "length", "context")
_EXACT = 1e-9  # Σ rewards against the decomposition: sums of float64
_PER_TOKEN = 1e-4  # log π against log ref of equal weights: different float32 kernels


@dataclass
class _Episode:
    """What one row saw from reset to end."""

    states: list[Observation]
    begun: dict[str, Any]
    actions: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    infos: list[dict[str, Any]] = field(default_factory=list)
    truncated: bool = False


def check_token_env(env: gym.Env[Any, Any] | VectorEnv[Any, Any, Any], *, steps: int = 200, seed: int = 0) -> None:
    """Play `steps` random steps twice and raise `ContractError` at the first broken promise, saying what to do.

    Checked: the spaces; that observations are right-padded, show each token written, and are fresh arrays; that the
    same seed and actions give the same episodes; that every episode ends with its `score`, `penalty`, `beta`,
    `stop_reason` and lengths; that its rewards sum to score − β·KL − penalty (or what its `kl_mode` makes of that);
    that its KL is Σ (logp − ref_logp); that β stays as it was at reset; that infos hold finite scalars; and, where the
    environment has a reference that can be asked, that the KL of the reference itself is 0. Takes a `gymnasium.Env` or
    `VectorEnv` made for this check: afterwards it is bound to a policy of the checker's.
    """
    _check_spaces(env)
    cores = _cores_of(env)
    for core in cores:
        _bind_uniform(core)
    first, again = (_play(env, steps, seed) for _ in range(2))
    _require(bool(first), "no episode ended", f"in {steps} steps: give a larger number of steps, or look for the end")
    for a, b in zip(first, again, strict=True):
        _check_infos(a)
        _check_equal(a, b)
    kl_mode = cores[0].task.kl_mode if cores else "reward"
    for episode in first:
        _check_states(episode, env)
        _check_end(episode)
        _check_sum(episode, kl_mode)
    _check_fresh(env, seed)
    reference = cores[0].task.reference if cores else None
    if kl_mode in ("reward", "observe") and hasattr(reference, "action_log_probs"):
        bind_policy(env, reference)
        for episode in _play(env, steps, seed):
            for t, info in enumerate(episode.infos):
                if "logp" in info and "ref_logp" in info:
                    _require(
                        abs(info["logp"] - info["ref_logp"]) <= _PER_TOKEN,
                        "the reference has KL to itself",
                        f"token {t}: log π {info['logp']:.6f}, log ref {info['ref_logp']:.6f}; a mask, a temperature "
                        "or padding is applied on one side only",
                    )
            kl = episode.infos[-1].get("kl", 0.0)  # all there is to see where the reference is deferred
            _require(
                abs(kl) <= _PER_TOKEN * len(episode.actions),
                "the reference has KL to itself",
                f"{kl:.6f} nats over {len(episode.actions)} tokens; see that its decoder, `evaluate` and "
                "`action_log_probs` follow the same law",
            )


def _require(holds: bool, promise: str, what: str) -> None:
    if not holds:
        raise ContractError(f"{promise}: {what}")


def _cores_of(env: Any) -> list[TokenMDP]:
    try:
        return find_cores(env)
    except ConfigError as error:
        if "no text-generation environment" in str(error):
            return []  # a world of somebody's own make: what needs no state machine is still checked
        raise


def _bind_uniform(core: TokenMDP) -> None:
    if core.task.kl_mode in ("reward", "observe"):
        core.log_pi.bind(lambda observation, actions: -np.log(np.maximum(core.action_masks().sum(1), 1)))


def _check_spaces(env: Any) -> None:
    space = getattr(env, "single_observation_space", env.observation_space)
    actions = getattr(env, "single_action_space", env.action_space)
    _require(
        isinstance(space, gym.spaces.Dict) and set(_PARTS) <= set(space),
        "the observation space is a Dict with input_ids, attention_mask and response_mask",
        f"it is {space}; do not flatten it",
    )
    for name in _PARTS:
        part = space[name]
        _require(
            isinstance(part, gym.spaces.Box) and np.issubdtype(part.dtype, np.integer) and len(part.shape) == 1,
            f"{name} is a Box of integers [L]",
            f"it is {part}",
        )
    _require(isinstance(actions, gym.spaces.Discrete) and actions.start == 0, "actions are Discrete", f"got {actions}")


# --- playing ---------------------------------------------------------------------------------------


def _play(env: Any, steps: int, seed: int) -> list[_Episode]:
    """The episodes that `steps` random allowed actions in every row finish, in the order in which they end."""
    rng, finished = np.random.default_rng(seed), []
    rows = env.num_envs if isinstance(env, VectorEnv) else 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnboundPolicyWarning)
        observation, info = _as_rows(env, env.reset(seed=seed))
        playing = [_Episode([observation[i]], info[i]) for i in range(rows)]
        waiting = [False] * rows  # NEXT_STEP: the coming step of this row is its reset
        for _ in range(steps):
            actions = _random_actions(env, rng, rows)
            observation, reward, terminated, truncated, info, last = _step(env, actions)
            over = terminated | truncated
            for i in range(rows):
                if waiting[i]:
                    playing[i], waiting[i] = _Episode([observation[i]], info[i]), False
                    continue
                episode, (final_state, final_info) = playing[i], last[i]
                episode.actions.append(int(actions[i]))
                episode.rewards.append(float(reward[i]))
                episode.states.append(final_state if over[i] else observation[i])
                episode.infos.append(final_info if over[i] else info[i])
                if over[i]:
                    episode.truncated = bool(truncated[i])
                    finished.append(episode)
                    playing[i] = _Episode([observation[i]], info[i])
            waiting = _restart(env, over, playing, waiting)
    return finished


def _mode(env: Any) -> AutoresetMode | None:
    return env.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP) if isinstance(env, VectorEnv) else None


def _restart(env: Any, over: NDArray[np.bool_], playing: list[_Episode], waiting: list[bool]) -> list[bool]:
    """Begin new episodes where the environment does not do so itself; which rows will be reset by the next step."""
    if not over.any() or _mode(env) == AutoresetMode.SAME_STEP:
        return waiting
    if _mode(env) == AutoresetMode.NEXT_STEP:
        return [w or bool(o) for w, o in zip(waiting, over, strict=True)]
    options = None if _mode(env) is None else {"reset_mask": over.copy()}
    observation, info = _as_rows(env, env.reset(options=options))
    for i in np.flatnonzero(over).tolist():
        playing[i] = _Episode([observation[i]], info[i])
    return waiting


def _random_actions(env: Any, rng: np.random.Generator, rows: int) -> NDArray[np.int64]:
    """Uniform among what the environment allows, if it says so."""
    count = int(getattr(env, "single_action_space", env.action_space).n)
    masks: Callable[[], Any] | None = getattr(env.unwrapped, "action_masks", None)
    allowed = np.ones((rows, count), dtype=np.bool_) if masks is None else np.reshape(masks(), (rows, count))
    allowed = allowed | ~allowed.any(1, keepdims=True)  # a row that is only being reset may be given anything
    return np.array([rng.choice(np.flatnonzero(row)) for row in allowed])


def _step(env: Any, actions: NDArray[np.int64]) -> tuple[Any, ...]:
    """One step as rows: observations, rewards, ends, infos, and the (observation, info) that each finished row left."""
    if not isinstance(env, VectorEnv):
        observation, reward, terminated, truncated, info = env.step(actions[0])
        return [observation], [reward], np.array([terminated]), np.array([truncated]), [info], [(observation, info)]
    observation, reward, terminated, truncated, infos = env.step(actions)
    states, info = _as_rows(env, (observation, infos))
    last = [(row.pop("final_obs", state), row.pop("final_info", row)) for state, row in zip(states, info, strict=True)]
    return states, reward, terminated, truncated, info, last


def _as_rows(env: Any, result: tuple[Any, dict[str, Any]]) -> tuple[list[Observation], list[dict[str, Any]]]:
    observation, infos = result
    if not isinstance(env, VectorEnv):
        return [observation], [infos]
    states = [{name: values[i] for name, values in observation.items()} for i in range(env.num_envs)]
    return states, info_rows(infos, env.num_envs)


# --- the promises ----------------------------------------------------------------------------------


def _check_equal(a: _Episode, b: _Episode) -> None:
    same_states = len(a.states) == len(b.states) and all(
        np.array_equal(x[name], y[name]) for x, y in zip(a.states, b.states, strict=True) for name in x
    )
    _require(
        same_states, "the same seed and actions give the same observations", "two runs differ: draw from np_random"
    )
    _require(
        a.rewards == b.rewards, "the same seed and actions give the same rewards", "is dropout on, or a clock read?"
    )
    _require(a.infos == b.infos, "the same seed and actions give the same infos", "leave out what changes by itself")


def _check_states(episode: _Episode, env: Any) -> None:
    space = getattr(env, "single_observation_space", env.observation_space)
    for t, state in enumerate(episode.states):
        _require(space.contains(state), "observations are in the observation space", f"state {t} is not: {state}")
        attention, response = state["attention_mask"] != 0, state["response_mask"] != 0
        length, written = int(attention.sum()), int(response.sum())
        _require(bool(attention[:length].all()), "observations are right-padded", f"in state {t} padding stands inside")
        _require(
            written == t and bool(response[length - written : length].all()),
            "response_mask marks the tokens written so far, the last ones that attention_mask marks",
            f"state {t} has {written} of them",
        )
    count = getattr(env, "single_action_space", env.action_space).n
    by_rank = "candidates" in space.spaces and space["candidates"].shape[0] == count
    for t, (before, after) in enumerate(zip(episode.states, episode.states[1:], strict=False)):
        length, action = int(before["attention_mask"].sum()), episode.actions[t]
        kept = np.array_equal(before["input_ids"][:length], after["input_ids"][:length])
        _require(kept, "tokens stay as they were written", f"step {t} changed earlier ones")
        # With `action="candidate"` the action is a rank among the candidates.
        possible = {action, int(before["candidates"][action])} if by_rank else {action}
        shown = int(after["input_ids"][length])
        _require(shown in possible, "a step appends its action", f"step {t} did {action} and appended {shown}")


def _check_infos(episode: _Episode) -> None:
    for t, info in enumerate([episode.begun, *episode.infos]):
        for name, value in info.items():
            scalar = isinstance(value, (bool, int, float, str, np.number))
            _require(scalar, "infos hold scalars", f"{name} of info {t} is a {type(value).__name__}")
            finite = isinstance(value, str) or math.isfinite(value)
            _require(finite, "infos hold finite numbers", f"{name} of info {t} is {value}: leave the key out instead")


def _check_end(episode: _Episode) -> None:
    final, t = episode.infos[-1], len(episode.actions)
    needed = {"beta", "stop_reason", "prompt_length", "response_length"}
    needed |= set() if episode.truncated else {"score", "penalty"}
    missing = sorted(needed - set(final))
    _require(not missing, "the last info holds the decomposition", f"{', '.join(missing)} missing")
    _require(
        final["stop_reason"] in _STOP_REASONS, f"stop_reason is one of {_STOP_REASONS}", f"{final['stop_reason']!r}"
    )
    _require(final["response_length"] == t, "response_length counts the steps", f"{final['response_length']}, not {t}")
    if "beta" in episode.begun:
        was, now = episode.begun["beta"], final["beta"]
        _require(
            was == now, "β stays as it was at reset", f"{was} became {now}: a change is for episodes that begin later"
        )


def _check_sum(episode: _Episode, kl_mode: str) -> None:
    final, total = episode.infos[-1], sum(episode.rewards)
    logp, ref_logp = ([info[name] for info in episode.infos if name in info] for name in ("logp", "ref_logp"))
    if "kl" in final and len(logp) == len(ref_logp) == len(episode.actions):
        kl = sum(logp) - sum(ref_logp)
        _require(abs(kl - final["kl"]) <= _EXACT, "kl = Σ (logp − ref_logp)", f"{final['kl']} and {kl}")
    if episode.truncated:
        return
    charge = {
        "reward": final["beta"] * final.get("kl", 0.0),
        "reference": -final["beta"] * sum(ref_logp),
    }.get(kl_mode, 0.0)
    expected = final["score"] - charge - final["penalty"]
    _require(
        abs(total - expected) <= _EXACT * max(1.0, abs(expected)),
        "the rewards of an episode sum to score − β·KL − penalty",
        f"they sum to {total:.9f}, which should be {expected:.9f} (score {final['score']:.6f}, β·KL {charge:.6f}, "
        f"penalty {final['penalty']:.6f})",
    )


def _check_fresh(env: Any, seed: int) -> None:
    """Overwriting a returned observation must not reach the environment."""
    observation, _ = env.reset(seed=seed)
    kept = {name: values.copy() for name, values in observation.items()}
    for values in observation.values():
        values[...] = 0
    again, _ = env.reset(seed=seed)
    same = all(np.array_equal(kept[name], again[name]) for name in kept)
    _require(
        same, "observations are fresh arrays", "writing into a returned one changed what came later: return copies"
    )
    shared = any(np.shares_memory(observation[name], again[name]) for name in kept)
    _require(not shared, "observations are fresh arrays", "two resets returned the same memory: return copies")
