"""The token MDP as one batched state machine; the Gymnasium environments are views of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_env.envs.beta import AdaptiveBeta
from rlhf_env.envs.rendering import render_ansi
from rlhf_env.envs.task import StopReason, TextTask
from rlhf_env.errors import MissingLogProbError, NonFiniteError, UnboundPolicyWarning
from rlhf_env.types import Decoder

_KL_BATCH = 64  # finished episodes after which an adaptive β moves: its clip is meant for the mean of many

Observation = dict[str, NDArray[Any]]
LogProbFn = Callable[[Observation, NDArray[np.int64]], Any]


@dataclass(frozen=True)
class Transition:
    """What one step did to N slots. Only the entries of slots that stepped mean anything."""

    reward: NDArray[np.float64]  # [N]
    terminated: NDArray[np.bool_]  # [N]
    truncated: NDArray[np.bool_]  # [N]
    info: dict[str, NDArray[np.float64]]  # per-token quantities, [N] each
    final_info: dict[int, dict[str, Any]]  # slot → decomposition of the episode that ended there


def as_array(values: Any) -> NDArray[Any]:
    """Numbers as a NumPy array, also from a torch tensor with gradient or on another device."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


class TokenMDP:
    """N episodes side by side. State: prompt and tokens so far; action: the next token.

    The state machine knows nothing of seeds or autoreset: its views do. Slots are begun with a prompt, stepped until
    they end, and begun again.
    """

    def __init__(self, task: TextTask, num_slots: int, beta: float | AdaptiveBeta) -> None:
        self.task, self.num_slots, self._beta = task, num_slots, beta
        n, t = num_slots, task.max_new_tokens
        self.input_ids = np.full((n, task.observation_length), task.codec.pad_token_id, dtype=np.int64)
        self.prompts: list[str] = [""] * n
        self.prompt_length = np.zeros(n, dtype=np.int64)
        self.written = np.zeros(n, dtype=np.int64)  # response tokens so far
        self.active = np.zeros(n, dtype=np.bool_)
        self.episode_beta = np.zeros(n)
        self.logp, self.ref_logp, self.reward = (np.zeros((n, t)) for _ in range(3))
        self.final_info: list[dict[str, Any]] = [{} for _ in range(n)]  # of each slot's present or last episode
        self._finished_kl: list[float] = []  # of episodes that an adaptive β has not heard of yet
        self._decoder: Decoder | None = None
        self._log_prob_fn: LogProbFn | None = None
        self._pushed: tuple[NDArray[np.float64], NDArray[np.int64]] | None = None
        self._knows_policy = False  # once told log π, silence is an error
        self._warned = False

    # --- where log π comes from -----------------------------------------------------------------

    def bind(self, fn: LogProbFn) -> None:
        """Ask `fn(observation, actions)` for log π of every action that is stepped, [N]."""
        self._log_prob_fn, self._knows_policy = fn, True

    def expect_push(self) -> None:
        """From here on a step without a push is an error: somebody has promised to push."""
        self._knows_policy = True

    def push(self, logp: Any, actions: Any) -> None:
        """Tell log π of the actions that the next step will be given, [N] each."""
        logp, actions = as_array(logp).astype(np.float64), as_array(actions).astype(np.int64)
        if logp.shape != (self.num_slots,) or actions.shape != (self.num_slots,):
            raise ValueError(
                f"push_logprobs wants one log-probability and one action per environment, [{self.num_slots}], "
                f"got {logp.shape} and {actions.shape}"
            )
        self._pushed, self._knows_policy = (logp, actions), True

    def _policy_logp(self, actions: NDArray[np.int64], stepping: NDArray[np.bool_]) -> NDArray[np.float64] | None:
        """log π of `actions` [N] under whoever chose them, or None where nobody knows and nobody is charged."""
        pushed, self._pushed = self._pushed, None
        if self.task.kl_mode not in ("reward", "observe") or not stepping.any():
            return None
        if pushed is not None:
            logp, told = pushed
            if (stale := stepping & (told != actions)).any():
                slot = int(np.flatnonzero(stale)[0])
                raise MissingLogProbError(
                    f"push_logprobs was told action {told[slot]} for environment {slot}, but {actions[slot]} was "
                    "stepped: push the log-probabilities of exactly the actions given to the next step"
                )
        elif self._log_prob_fn is not None:
            logp = as_array(self._log_prob_fn(self.observation(), actions)).astype(np.float64)
            if logp.shape != (self.num_slots,):
                raise ValueError(f"the bound policy returned shape {logp.shape}, expected ({self.num_slots},)")
        elif self._knows_policy:
            raise MissingLogProbError(
                "no log-probabilities were pushed for this step: call push_logprobs(logp, actions) before every step, "
                "or bind_policy once; for evaluation make the environment with kl_mode='off'"
            )
        elif self.task.kl_mode == "reward" and (self.episode_beta[stepping] != 0).any():
            if not self._warned:
                self._warned = True
                warnings.warn(
                    "no policy is bound, so the KL of a uniformly random policy is charged, which is right for "
                    "action_space.sample() only: call rlhf_env.bind_policy(env, fn), or before each step "
                    "rlhf_env.push_logprobs(env, logp, actions), or attach_sb3(model); or make the environment with "
                    "kl_mode='off'",
                    UnboundPolicyWarning,
                    stacklevel=5,
                )
            return -np.log(self.task.law.allowed(self.written).sum(1))
        else:
            return None
        if not np.isfinite(logp[stepping]).all():
            slot = int(np.flatnonzero(stepping & ~np.isfinite(logp))[0])
            raise MissingLogProbError(
                f"the policy's log-probability in environment {slot} is {logp[slot]}: log π of an action that it "
                "sampled is finite, so the policy's weights or its mask are broken"
            )
        return logp

    # --- the state machine ----------------------------------------------------------------------

    @property
    def beta(self) -> float:
        """The KL coefficient of episodes that begin now, in reward per nat."""
        return self._beta.value if isinstance(self._beta, AdaptiveBeta) else float(self._beta)

    @beta.setter
    def beta(self, value: float) -> None:
        if isinstance(self._beta, AdaptiveBeta):
            self._beta.value = value
        else:
            self._beta = value

    def observe_kl(self, kl: Sequence[float] | NDArray[np.floating]) -> None:
        """Let an adaptive β take note of finished episodes, in nats each."""
        if isinstance(self._beta, AdaptiveBeta):
            self._beta.observe(kl)

    def begin(self, slots: Sequence[int], prompts: Sequence[str], prompt_ids: Sequence[Sequence[int]]) -> None:
        """Start a new episode in each of `slots`."""
        for slot, prompt, ids in zip(slots, prompts, prompt_ids, strict=True):
            self.prompts[slot] = prompt
            self.input_ids[slot] = self.task.codec.pad_token_id
            self.input_ids[slot, : len(ids)] = ids
            self.prompt_length[slot] = len(ids)
            self.final_info[slot] = {}
        index = list(slots)
        self.written[index], self.active[index], self.episode_beta[index] = 0, True, self.beta
        self.logp[index], self.ref_logp[index], self.reward[index] = 0.0, 0.0, 0.0
        if self.task.uses_reference:
            assert self.task.reference is not None
            if self._decoder is None:
                self._decoder = self.task.reference.decoder(self.num_slots, self.task.law)
            self._decoder.start(index, prompt_ids)

    def step(self, actions: Any, stepping: NDArray[np.bool_] | None = None) -> Transition:
        """Append `actions[i]` to every slot that is `stepping` (default: all of them)."""
        task = self.task
        stepping = np.ones(self.num_slots, dtype=np.bool_) if stepping is None else stepping
        actions = self._checked(actions, stepping)
        going = np.flatnonzero(stepping)
        logp = self._policy_logp(actions, stepping)
        ref_logp = self._reference_logp(actions, stepping)

        t = self.written[going]
        reward, kl_token = np.zeros(self.num_slots), np.zeros(self.num_slots)
        info: dict[str, NDArray[np.float64]] = {}
        if logp is not None:
            info["logp"] = logp
            self.logp[going, t] = logp[going]
        if ref_logp is not None:
            info["ref_logp"] = ref_logp
            self.ref_logp[going, t] = ref_logp[going]
        if task.kl_mode == "reward" and logp is not None and ref_logp is not None:
            kl_token = logp - ref_logp
        elif task.kl_mode == "reference" and ref_logp is not None:
            kl_token = -ref_logp
        if task.kl_placement == "token":
            reward[going] -= (self.episode_beta * kl_token)[going]

        self.input_ids[going, (self.prompt_length + self.written)[going]] = actions[going]
        self.written[going] += 1
        stop: dict[int, StopReason] = {}
        for slot in self._maybe_over(actions, stepping):
            if reason := task.stop_reason(self.prompt_tokens(slot), self.response_ids(slot)):
                stop[slot] = reason
        finished = list(stop)
        over, cut = np.zeros(self.num_slots, dtype=np.bool_), np.zeros(self.num_slots, dtype=np.bool_)
        over[finished] = True
        if task.length_limit == "truncate":
            cut[[slot for slot in finished if stop[slot] == "length"]] = True

        scored = [slot for slot in finished if not cut[slot]]
        self.active[going] = False  # should the reward model fail, nobody can go on from a half-done step
        worth = self._score(scored, stop)
        for slot in finished:
            self.final_info[slot] = self._decomposition(slot, stop[slot], info, worth.get(slot))
            reward[slot] += sum(worth.get(slot, (0.0, 0.0)))
            if task.kl_placement == "terminal" and "kl" in self.final_info[slot] and task.kl_mode == "reward":
                reward[slot] -= self.episode_beta[slot] * self.final_info[slot]["kl"]
        self.reward[going, t] = reward[going]
        self.active[going] = ~over[going]
        if self._decoder is not None:
            alive = [slot for slot in going.tolist() if not over[slot]]
            if alive:
                self._decoder.append(actions[alive], alive)
        self._finished_kl += [self.final_info[slot]["kl"] for slot in finished if "kl" in self.final_info[slot]]
        if len(self._finished_kl) >= _KL_BATCH:
            self.observe_kl(self._finished_kl)
            self._finished_kl = []
        return Transition(reward, over & ~cut, cut, info, {slot: dict(self.final_info[slot]) for slot in finished})

    def _checked(self, actions: Any, stepping: NDArray[np.bool_]) -> NDArray[np.int64]:
        actions = np.asarray(actions)
        if actions.shape != (self.num_slots,) or actions.dtype.kind not in "iu":
            raise ValueError(
                f"actions must be {self.num_slots} token ids (integers), got shape {actions.shape} of {actions.dtype}"
            )
        actions = np.where(stepping, actions, 0).astype(np.int64)  # a row that only resets may be given anything
        if (stepping & ~self.active).any():
            slot = int(np.flatnonzero(stepping & ~self.active)[0])
            raise RuntimeError(f"the episode in environment {slot} is over (or never began): reset it first")
        size = self.task.law.vocab_size
        if (outside := stepping & ((actions < 0) | (actions >= size))).any():
            slot = int(np.flatnonzero(outside)[0])
            raise ValueError(f"action {actions[slot]} of environment {slot} is outside the vocabulary of {size}")
        if self.task.law.banned_tokens or self.task.law.min_new_tokens:
            allowed = self.action_masks()[np.arange(self.num_slots), np.where(stepping, actions, 0)]
            if (banned := stepping & ~allowed).any():
                slot = int(np.flatnonzero(banned)[0])
                raise ValueError(
                    f"action {actions[slot]} of environment {slot} is forbidden here (banned_tokens, min_new_tokens): "
                    "choose among action_masks()"
                )
        return actions

    def _reference_logp(self, actions: NDArray[np.int64], stepping: NDArray[np.bool_]) -> NDArray[np.float64] | None:
        if self._decoder is None:
            return None
        table = self._decoder.log_probs  # [N, V]; rows that do not step may be stale
        rows = np.flatnonzero(stepping)
        ref_logp = np.zeros(self.num_slots)
        ref_logp[rows] = table[rows.tolist(), actions[rows].tolist()].cpu().numpy()
        if not np.isfinite(ref_logp).all():
            slot = int(np.flatnonzero(~np.isfinite(ref_logp))[0])
            raise NonFiniteError(
                f"the reference's log-probability of action {actions[slot]} in environment {slot} is {ref_logp[slot]}: "
                "its weights hold NaN or infinity, or its logits overflow"
            )
        return ref_logp

    def _maybe_over(self, actions: NDArray[np.int64], stepping: NDArray[np.bool_]) -> list[int]:
        """Slots whose end is worth a look: all where text decides, else those at EOS or at the length limit."""
        if not self.task.stop_strings:
            at_eos = actions == self.task.law.eos_token_id if self.task.law.eos_token_id is not None else False
            stepping = stepping & (at_eos | (self.written >= self.task.max_new_tokens))
        return np.flatnonzero(stepping).tolist()

    def _score(self, slots: Sequence[int], stop: dict[int, StopReason]) -> dict[int, tuple[float, float]]:
        """Score and minus penalty of the episodes that just ended, in one call of the reward model."""
        if not slots:
            return {}
        score = self.task.score(
            [self.prompts[s] for s in slots],
            [self.prompt_tokens(s) for s in slots],
            [self.response_ids(s) for s in slots],
        )
        penalty = self.task.penalties(np.array([stop[s] != "length" for s in slots]))
        return {s: (float(score[i]), -float(penalty[i])) for i, s in enumerate(slots)}

    def _decomposition(
        self, slot: int, reason: StopReason, info: dict[str, Any], worth: tuple[float, float] | None
    ) -> dict[str, Any]:
        """What the finished episode's return is made of; a quantity that nobody knows is a key that is not there."""
        t = int(self.written[slot])
        final: dict[str, Any] = {name: float(values[slot]) for name, values in info.items()}
        if worth is not None:
            final["score"], final["penalty"] = worth[0], -worth[1]
        if "logp" in info and "ref_logp" in info:
            final["kl"] = float((self.logp[slot, :t] - self.ref_logp[slot, :t]).sum())
        return final | {
            "beta": float(self.episode_beta[slot]),
            "stop_reason": reason,
            "prompt_length": int(self.prompt_length[slot]),
            "response_length": t,
        }

    # --- reading the state ----------------------------------------------------------------------

    def observation(self) -> Observation:
        """Fresh right-padded arrays [N, L]: `input_ids` int64, `attention_mask` and `response_mask` int8."""
        column = np.arange(self.task.observation_length)
        attention = column < (self.prompt_length + self.written)[:, None]
        response = attention & (column >= self.prompt_length[:, None])
        return {
            "input_ids": self.input_ids.copy(),
            "attention_mask": attention.astype(np.int8),
            "response_mask": response.astype(np.int8),
        }

    def prompt_tokens(self, slot: int) -> list[int]:
        """Token ids of one slot's prompt."""
        return self.input_ids[slot, : self.prompt_length[slot]].tolist()

    def response_ids(self, slot: int) -> list[int]:
        """Token ids that were written so far in one slot."""
        begin = self.prompt_length[slot]
        return self.input_ids[slot, begin : begin + self.written[slot]].tolist()

    def action_masks(self) -> NDArray[np.bool_]:
        """Which next tokens the sampling law allows, bool [N, V]."""
        return self.task.law.allowed(self.written)

    def render(self, slot: int) -> str:
        """Prompt, response, per-token KL and reward of one slot, coloured for a terminal."""
        t, final = int(self.written[slot]), self.final_info[slot]
        whole = self.input_ids[slot, : self.prompt_length[slot] + t].tolist()
        known = self._decoder is not None and self.task.kl_mode in ("reward", "observe")
        return render_ansi(
            self.prompts[slot],
            self.task.codec.pieces(whole)[int(self.prompt_length[slot]) :],
            kl=(self.logp[slot, :t] - self.ref_logp[slot, :t]).tolist() if known else None,
            reward=self.reward[slot, :t].tolist(),
            footer={k: final[k] for k in ("score", "kl", "penalty", "beta", "stop_reason") if k in final},
        )
