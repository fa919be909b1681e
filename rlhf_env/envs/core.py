"""The token MDP as one batched state machine; the Gymnasium environments are views of it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_env.envs.beta import BetaController
from rlhf_env.envs.infos import Column
from rlhf_env.envs.policy_logp import Observation, PolicyLogP
from rlhf_env.envs.rendering import render_ansi
from rlhf_env.envs.rewards import token_scores_of
from rlhf_env.envs.spaces import LOWEST
from rlhf_env.envs.task import TextTask
from rlhf_env.errors import ConfigError, NonFiniteError, UnboundPolicyWarning
from rlhf_env.functional import kl_k2, kl_k3, restrict
from rlhf_env.models.scoring import teacher_forced_logp
from rlhf_env.types import Decoder, Rollout


@dataclass(frozen=True)
class Transition:
    """What one step did to N slots. Only the entries of slots that stepped mean anything."""

    reward: NDArray[np.float64]  # [N]
    terminated: NDArray[np.bool_]  # [N]
    truncated: NDArray[np.bool_]  # [N]
    info: dict[str, Column]  # of this token, by name
    final: dict[str, Column]  # of the episodes that ended, by name: what their return is made of


class TokenMDP:
    """N episodes side by side. State: prompt and tokens so far; action: the next token.

    The state machine knows nothing of seeds or autoreset: its views do. Slots are begun with a prompt, stepped until
    they end, and begun again.
    """

    def __init__(self, task: TextTask, num_slots: int, beta: float | BetaController) -> None:
        self.task, self.num_slots = task, num_slots
        # A copy, or environments made from one spec would move each other's β.
        self._controller = cast(BetaController, copy.copy(beta)) if hasattr(beta, "observe") else None
        self._fixed_beta = 0.0 if self._controller is not None else float(cast(float, beta))
        n, t, length = num_slots, task.max_new_tokens, task.observation_length
        self.input_ids = np.full((n, length), task.codec.pad_token_id, dtype=np.int64)
        self.attention_mask, self.response_mask = (np.zeros((n, length), dtype=np.int8) for _ in range(2))
        self.prompts: list[str] = [""] * n
        self.prompt_length = np.zeros(n, dtype=np.int64)
        self.longest = np.full(n, t, dtype=np.int64)  # response tokens that each slot has room for
        self.written = np.zeros(n, dtype=np.int64)  # response tokens so far
        self.told = np.zeros(n, dtype=np.int64)  # how many of them had a known log π
        self.active = np.zeros(n, dtype=np.bool_)
        self.episode_beta = np.zeros(n)
        self.logp, self.ref_logp, self.reward = (np.zeros((n, t)) for _ in range(3))
        self.process_score = np.zeros(n)  # sum of the token scores so far
        self._pieces: list[list[str]] = [[] for _ in range(n)]  # the prompt's text and each token's, for such scores
        #: KL charge, in reward, that the last step put on a last token in one lump because it was computed late, [N].
        self.lump = np.zeros(n)
        #: log ref [T] of the episodes that the last step ended, by slot, where it was computed late.
        self.late_ref_logp: dict[int, NDArray[np.float64]] = {}
        self.step_beta = np.zeros(n)  #: β of the episodes that the last step belonged to, [N]
        self._ended: list[dict[str, Any]] = [{} for _ in range(n)]  # what to render of episodes that are over
        self._finished_kl: list[float] = []  # of episodes that the controller of β has not heard of yet
        self._decoder: Decoder | None = None
        self._ref_log_probs: torch.Tensor | None = None  # [N, V], renormalised over the candidates where there are any
        if task.law.truncates:
            k = task.law.top_k or task.law.vocab_size
            self.candidates, self.candidate_logp = np.full((n, k), -1), np.full((n, k), LOWEST, dtype=np.float32)
        self.log_pi = PolicyLogP(n)
        self._warned = False

    # --- β ----------------------------------------------------------------------------------------

    @property
    def beta(self) -> float:
        """The KL coefficient of episodes that begin now, in reward per nat."""
        return self._fixed_beta if self._controller is None else self._controller.value

    @beta.setter
    def beta(self, value: float) -> None:
        if not 0 <= value < np.inf:
            raise ConfigError(f"beta must be a finite number of at least 0, got {value}")
        if self._controller is None:
            self._fixed_beta = value
        else:
            self._controller.value = value

    def beta_state(self) -> dict[str, Any]:
        """What β depends on, for a checkpoint, as JSON values."""
        if self._controller is None:
            return {"beta": self._fixed_beta}
        unheard = [None if np.isnan(kl) else kl for kl in self._finished_kl]
        return {"controller": dict(vars(self._controller)), "unheard_kl": unheard}

    def load_beta_state(self, state: dict[str, Any]) -> None:
        """Put back what `beta_state` gave."""
        theirs, ours = (set(x) | set(x.get("controller", ())) for x in (state, self.beta_state()))
        if theirs != ours:
            raise ConfigError(
                f"the saved β is described by {', '.join(sorted(theirs))}, but this environment's by "
                f"{', '.join(sorted(ours))}: make it with the same kind of beta"
            )
        if self._controller is None:
            self._fixed_beta = state["beta"]
        else:
            vars(self._controller).update(state["controller"])
            self._finished_kl = [np.nan if kl is None else kl for kl in state["unheard_kl"]]

    def observe_kl(self, kl: Sequence[float] | NDArray[np.floating]) -> None:
        """Let β's controller, if it has one, take note of finished episodes, in nats each."""
        if self._controller is not None:
            self._controller.observe(kl)

    # --- the state machine ----------------------------------------------------------------------

    def begin(self, slots: Sequence[int], prompts: Sequence[str], prompt_ids: Sequence[Sequence[int]]) -> None:
        """Start a new episode in each of `slots`."""
        index = np.asarray(slots)
        self.active[index] = False
        self.log_pi.forget()  # what was pushed belongs to the episodes before
        self.input_ids[index] = self.task.codec.pad_token_id
        self.attention_mask[index], self.response_mask[index] = 0, 0
        for slot, prompt, ids in zip(slots, prompts, prompt_ids, strict=True):
            self.prompts[slot] = prompt
            self.input_ids[slot, : len(ids)] = ids
            self.attention_mask[slot, : len(ids)] = 1
            self.prompt_length[slot] = len(ids)
            self.longest[slot] = self.task.longest(len(ids))
            self._ended[slot] = {}
        self.written[index], self.told[index], self.episode_beta[index] = 0, 0, self.beta
        self.logp[index], self.ref_logp[index], self.reward[index], self.process_score[index] = 0.0, 0.0, 0.0, 0.0
        if self.task.uses_reference and not self.task.defers:
            if self._decoder is None:
                self._decoder = self._new_decoder()
            with self._all_over_if_it_fails():
                self._decoder.start(index.tolist(), prompt_ids)
                self._read_reference(index)
        self.active[index] = True

    def step(self, actions: Any, stepping: NDArray[np.bool_] | None = None) -> Transition:
        """Do `actions[i]` in every slot that is `stepping` (default: all of them): append a token."""
        task, n = self.task, self.num_slots
        stepping = np.ones(n, dtype=np.bool_) if stepping is None else stepping
        actions = self._checked(actions, stepping)
        tokens = self._tokens(actions, stepping)
        going = np.flatnonzero(stepping)
        logp = self._policy_logp(actions, stepping)
        ref_logp = self._reference_logp(tokens, stepping)
        self.step_beta, self.lump = self.episode_beta.copy(), np.zeros(n)
        self.late_ref_logp = {}

        t = self.written[going]
        info: dict[str, Column] = {}
        for name, values, history in (("logp", logp, self.logp), ("ref_logp", ref_logp, self.ref_logp)):
            if values is not None:
                info[name] = (values, stepping)
                history[going, t] = values[going]
        self.told[going] += logp is not None
        reward = np.zeros(n)
        if task.kl_placement == "token" and ref_logp is not None:
            if task.kl_mode == "reward" and logp is not None:
                reward[going] = (-self.episode_beta * (logp - ref_logp))[going]
            elif task.kl_mode == "reference":
                reward[going] = (self.episode_beta * ref_logp)[going]

        column = self.prompt_length[going] + t
        self.input_ids[going, column] = tokens[going]
        self.attention_mask[going, column] = self.response_mask[going, column] = 1
        self.written[going] += 1
        reasons = self._stop_reasons(tokens, stepping)
        over, cut = np.zeros(n, dtype=np.bool_), np.zeros(n, dtype=np.bool_)
        over[list(reasons)] = True
        if task.length_limit == "truncate":
            cut[[slot for slot, reason in reasons.items() if reason in ("length", "context")]] = True

        self.active[going] = False  # should the reward model fail, nobody can go on from a half-done step
        if task.scores_tokens and len(going):
            said = _spread(self._process_scores(going, over), going, n)
            self.process_score += said
            reward += said
            info["token_score"] = (said, stepping)
        final: dict[str, Column] = {}
        if reasons:
            final = self._decomposition(reasons, over, cut, info)
            reward += self._last_reward(final, over)
            for slot in reasons:
                self._ended[slot] = {name: values[slot] for name, (values, where) in final.items() if where[slot]}
        self.reward[going, t] = reward[going]
        alive = going[~over[going]]
        if self._decoder is not None and len(alive):
            with self._all_over_if_it_fails():
                self._decoder.append(tokens[alive], alive.tolist())
                self._read_reference(alive)
        self.active[alive] = True
        if task.law.truncates:
            self.candidates[over], self.candidate_logp[over] = -1, LOWEST
        return Transition(reward, over & ~cut, cut, info, final)

    def _checked(self, actions: Any, stepping: NDArray[np.bool_]) -> NDArray[np.int64]:
        actions = np.asarray(actions)
        if actions.shape != (self.num_slots,) or actions.dtype.kind not in "iu":
            raise ValueError(
                f"actions must be {self.num_slots} integers, one for each environment, got shape {actions.shape} of "
                f"{actions.dtype}"
            )
        actions = np.where(stepping, actions, 0).astype(np.int64)  # a row that only resets may be given anything
        if (stepping & ~self.active).any():
            slot = int(np.flatnonzero(stepping & ~self.active)[0])
            raise RuntimeError(f"the episode in environment {slot} is over (or never began): reset it first")
        size, what = self.num_actions, "candidates" if self.task.action == "candidate" else "vocabulary"
        if (outside := stepping & ((actions < 0) | (actions >= size))).any():
            slot = int(np.flatnonzero(outside)[0])
            raise ValueError(f"action {actions[slot]} of environment {slot} is outside the {what} of {size}")
        law = self.task.law
        if law.banned_tokens or law.min_new_tokens or law.truncates:
            allowed = self.action_masks()[np.arange(self.num_slots), actions]
            if (banned := stepping & ~allowed).any():
                slot = int(np.flatnonzero(banned)[0])
                raise ValueError(
                    f"action {actions[slot]} of environment {slot} is forbidden here (banned_tokens, min_new_tokens, "
                    "top_k, top_p): choose among action_masks()"
                )
        return actions

    def _tokens(self, actions: NDArray[np.int64], stepping: NDArray[np.bool_]) -> NDArray[np.int64]:
        if self.task.action == "token":
            return actions
        return np.where(stepping, self.candidates[np.arange(self.num_slots), actions], 0)

    # --- log π --------------------------------------------------------------------------------------

    def _policy_logp(self, actions: NDArray[np.int64], stepping: NDArray[np.bool_]) -> NDArray[np.float64] | None:
        """log π of `actions` [N] under whoever chose them, or None where nobody knows and nobody is charged."""
        if self.task.kl_mode not in ("reward", "observe") or not stepping.any():
            self.log_pi.forget()
            return None
        logp = self.log_pi.take(actions, stepping, self.observation)
        if logp is None and self.task.kl_mode == "reward" and (self.episode_beta[stepping] != 0).any():
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
            return -np.log(self.action_masks().sum(1).clip(min=1))  # none is left where the episode is over
        return logp

    # --- the reference ----------------------------------------------------------------------------

    def _new_decoder(self) -> Decoder:
        assert self.task.reference is not None
        backend = self.task.reference_backend
        extra: dict[str, Any] = {} if backend == "auto" else {"backend": backend}
        return self.task.reference.decoder(self.num_slots, self.task.law, **extra)

    @contextmanager
    def _all_over_if_it_fails(self) -> Iterator[None]:
        """A decoder that stopped half-way (out of memory, an interrupt) knows no state any more: all begin anew."""
        try:
            yield
        except BaseException:
            self.active[:], self._decoder, self._ref_log_probs = False, None, None
            raise

    def _read_reference(self, slots: NDArray[np.int64]) -> None:
        """Take the next-token distributions of `slots` from the decoder, and what may be written next."""
        assert self._decoder is not None
        if not self.task.law.truncates:
            self._ref_log_probs = self._decoder.log_probs
            return
        rows = torch.as_tensor(slots, device=self._decoder.log_probs.device)
        log_probs = self._decoder.log_probs[rows]
        candidates = self.task.law.candidates(log_probs)
        log_probs = restrict(log_probs, candidates)
        if self._ref_log_probs is None:
            self._ref_log_probs = torch.zeros_like(self._decoder.log_probs)
        self._ref_log_probs[rows] = log_probs
        of_candidates = log_probs.gather(-1, candidates.clamp(min=0)).masked_fill(candidates < 0, LOWEST)
        if (broken := of_candidates[:, 0].isnan().cpu().numpy()).any():
            self.active[slots] = False
            self._refuse(int(slots[broken][0]), int(candidates[broken.argmax(), 0]), float("nan"))
        self.candidates[slots] = candidates.cpu().numpy()
        self.candidate_logp[slots] = of_candidates.clamp(min=LOWEST, max=0).float().cpu().numpy()

    def _reference_logp(self, tokens: NDArray[np.int64], stepping: NDArray[np.bool_]) -> NDArray[np.float64] | None:
        if self._decoder is None or self.task.kl_mode == "off":
            return None
        assert self._ref_log_probs is not None
        rows = np.flatnonzero(stepping)
        ref_logp = _spread(self._ref_log_probs[rows.tolist(), tokens[rows].tolist()].cpu().numpy(), rows, len(tokens))
        if not np.isfinite(ref_logp).all():
            slot = int(np.flatnonzero(~np.isfinite(ref_logp))[0])
            self._refuse(slot, tokens[slot], ref_logp[slot])
        return ref_logp

    def _score_late(self, finished: NDArray[np.int64]) -> None:
        """log ref of the responses that just ended, all their tokens in one pass."""
        assert self.task.reference is not None
        slots = finished.tolist()
        rollout = Rollout.of_tokens(
            [self.prompt_tokens(s) for s in slots], [self.response_ids(s) for s in slots], self.task.law
        )
        ref_logp = teacher_forced_logp(self.task.reference, rollout).cpu().numpy().astype(np.float64)
        self.ref_logp[finished, : ref_logp.shape[1]] = ref_logp
        if not np.isfinite(ref_logp).all():
            row, t = (int(x[0]) for x in np.nonzero(~np.isfinite(ref_logp)))
            self._refuse(slots[row], self.response_ids(slots[row])[t], ref_logp[row, t])
        self.late_ref_logp = dict(zip(slots, ref_logp, strict=True))

    @staticmethod
    def _refuse(slot: int, token: int, ref_logp: float) -> None:
        raise NonFiniteError(
            f"the reference's log-probability of action {token} in environment {slot} is {ref_logp}: its weights hold "
            "NaN or infinity, or its logits overflow"
        )

    # --- the end of an episode --------------------------------------------------------------------

    def _stop_reasons(self, tokens: NDArray[np.int64], stepping: NDArray[np.bool_]) -> dict[int, str]:
        """Why the slots that are over now are so."""
        maybe = stepping
        if not self.task.stop_strings:
            at_eos = tokens == self.task.law.eos_token_id if self.task.law.eos_token_id is not None else False
            maybe = stepping & (at_eos | (self.written >= self.longest))
        found: dict[int, str] = {}
        for slot in np.flatnonzero(maybe).tolist():
            if reason := self.task.stop_reason(self.prompt_tokens(slot), self.response_ids(slot)):
                found[slot] = reason
        return found

    def _process_scores(self, going: NDArray[np.int64], over: NDArray[np.bool_]) -> NDArray[np.float64]:
        """What the reward model says of the tokens just written, one for each of `going`."""
        for slot in going.tolist():
            whole = self.input_ids[slot, : self.prompt_length[slot] + self.written[slot]].tolist()
            if self.written[slot] == 1:
                self._pieces[slot] = ["".join(self.task.codec.pieces(whole[:-1]))]  # the prompt, in one
            shown = "".join(self._pieces[slot])
            self._pieces[slot].append(self.task.codec.next_piece(whole, shown, last=bool(over[slot])))
        slots = going.tolist()
        scores = token_scores_of(
            self.task.reward_model, [self.prompts[s] for s in slots], [self._pieces[s][1:] for s in slots]
        )
        return np.array([numbers[-1] for numbers in scores])

    def _decomposition(
        self, reasons: dict[int, str], over: NDArray[np.bool_], cut: NDArray[np.bool_], info: dict[str, Column]
    ) -> dict[str, Column]:
        """What the returns of the episodes that just ended are made of."""
        finished = np.flatnonzero(over)
        final = {name: (values, over) for name, (values, _) in info.items()}
        final |= self._worth(finished[~cut[finished]], reasons)
        if "logp" in info and self.task.defers:
            self._score_late(finished)
        if "logp" in info and ("ref_logp" in info or self.task.defers):
            final |= self._kl(finished, over)
        kl, known = final.get("kl", (np.zeros(self.num_slots), np.zeros_like(over)))
        self._tell_controller(np.where(known, kl, np.nan)[finished])
        stop = np.full(self.num_slots, None, dtype=object)
        stop[finished] = [reasons[slot] for slot in finished.tolist()]
        return final | {
            "beta": (self.episode_beta.copy(), over),
            "stop_reason": (stop, over),
            "prompt_length": (self.prompt_length.copy(), over),
            "response_length": (self.written.copy(), over),
        }

    def _last_reward(self, final: dict[str, Column], over: NDArray[np.bool_]) -> NDArray[np.float64]:
        """What the last token of each finished episode is paid beside what every token is, [N]."""
        reward = np.zeros(self.num_slots)
        if "score" in final:
            (score, scored), (penalty, _) = final["score"], final["penalty"]
            reward += np.where(scored, score - self.process_score - penalty, 0.0)  # token scores were paid as they came
        if self.task.kl_mode == "reward" and "kl" in final:
            charge = np.where(final["kl"][1], self.episode_beta * final["kl"][0], 0.0)
            if self.task.kl_placement == "terminal":
                reward -= charge
            elif self.task.defers:
                reward -= charge
                self.lump = charge
        return reward

    def _worth(self, rows: NDArray[np.int64], reasons: dict[int, str]) -> dict[str, Column]:
        """Scores and penalties of the responses in `rows`, in one call of the reward model."""
        if len(rows) == 0:
            return {}
        slots = rows.tolist()
        outcome, parts = self.task.score(
            [self.prompts[s] for s in slots],
            [self.prompt_tokens(s) for s in slots],
            [self.response_ids(s) for s in slots],
        )
        ended = np.array([reasons[s] not in ("length", "context") for s in slots])
        penalties = self.task.penalties(ended, self.written[rows])
        named = {
            "score": outcome + self.process_score[rows],
            **{f"score_{name}": values for name, values in parts.items()},
            "penalty": sum(penalties.values(), np.zeros(len(rows))),
            **penalties,
        }
        where = np.zeros(self.num_slots, dtype=np.bool_)
        where[rows] = True
        return {name: (_spread(values, rows, self.num_slots), where) for name, values in named.items()}

    def _kl(self, finished: NDArray[np.int64], over: NDArray[np.bool_]) -> dict[str, Column]:
        """The KL of the episodes that just ended by each estimator, nats per sequence, where every log π was known."""
        known = over & (self.told == self.written)
        logp, ref_logp = torch.from_numpy(self.logp[finished]), torch.from_numpy(self.ref_logp[finished])
        sums = {  # beyond the end both are 0, and so is every estimator
            "kl": (logp - ref_logp).sum(1),
            "kl_k2": kl_k2(logp, ref_logp).sum(1),
            "kl_k3": kl_k3(logp, ref_logp).sum(1),
        }
        return {name: (_spread(values.numpy(), finished, self.num_slots), known) for name, values in sums.items()}

    def _tell_controller(self, kl: NDArray[np.float64]) -> None:
        """Of finished episodes, in nats each; NaN where nobody knows."""
        if self._controller is None:
            return
        self._finished_kl += kl.tolist()
        if len(self._finished_kl) >= self._controller.batch:
            self.observe_kl(self._finished_kl)
            self._finished_kl = []

    # --- reading the state ----------------------------------------------------------------------

    @property
    def num_actions(self) -> int:
        """How many actions there are: tokens, or ranks among the candidates."""
        return self.task.law.top_k if self.task.action == "candidate" else self.task.law.vocab_size

    def observation(self, slots: NDArray[np.int64] | None = None) -> Observation:
        """Fresh right-padded arrays [n, L] of all slots or of some.

        `input_ids` int64, `attention_mask` and `response_mask` int8; where the law truncates, also `candidates` int64
        and `candidate_logp` float32, [n, K].
        """
        names = ("input_ids", "attention_mask", "response_mask")
        names += ("candidates", "candidate_logp") if self.task.law.truncates else ()
        arrays = {name: getattr(self, name) for name in names}
        return {name: array.copy() if slots is None else array[slots] for name, array in arrays.items()}

    def prompt_tokens(self, slot: int) -> list[int]:
        """Token ids of one slot's prompt."""
        return self.input_ids[slot, : self.prompt_length[slot]].tolist()

    def response_ids(self, slot: int) -> list[int]:
        """Token ids that were written so far in one slot."""
        begin = self.prompt_length[slot]
        return self.input_ids[slot, begin : begin + self.written[slot]].tolist()

    def action_masks(self) -> NDArray[np.bool_]:
        """Which actions the sampling law allows, bool [N, `num_actions`]."""
        if self.task.action == "candidate":
            return self.candidates >= 0
        allowed = self.task.law.allowed(self.written)
        if self.task.law.truncates:
            named = np.zeros((self.num_slots, self.task.law.vocab_size + 1), dtype=np.bool_)
            np.put_along_axis(named, self.candidates, True, 1)  # −1 is the extra column
            allowed &= named[:, :-1]
        return allowed

    def token_ids(self, actions: Any) -> NDArray[np.int64]:
        """The token ids that actions [N] stand for in the present states; 0 in slots whose episode is over."""
        return self._tokens(np.asarray(actions, dtype=np.int64), self.active)

    def render(self, slot: int) -> str:
        """Prompt, response, per-token KL and reward of one slot, coloured for a terminal."""
        t, final = int(self.written[slot]), self._ended[slot]
        whole = self.input_ids[slot, : self.prompt_length[slot] + t].tolist()
        known = self._decoder is not None and self.task.kl_mode in ("reward", "observe")
        return render_ansi(
            self.prompts[slot],
            self.task.codec.pieces(whole)[int(self.prompt_length[slot]) :],
            kl=(self.logp[slot, :t] - self.ref_logp[slot, :t]).tolist() if known or "kl" in final else None,
            reward=self.reward[slot, :t].tolist(),
            footer={k: final[k] for k in ("score", "kl", "penalty", "beta", "stop_reason") if k in final},
        )


def _spread(values: NDArray[Any], rows: NDArray[np.int64], n: int) -> NDArray[np.float64]:
    """`values` at `rows` of an array [n] that is 0 elsewhere."""
    spread = np.zeros(n)
    spread[rows] = values
    return spread
