"""SB3's rollout buffer with minibatches of whole episodes, and with the KL of a deferred reference put in its place."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples
from torch import Tensor

from rlhf_env.envs.core import TokenMDP
from rlhf_env.models.scoring import teacher_forced_logp
from rlhf_env.types import Rollout

_CHUNK = 64  # episodes in one pass of the reference


class EpisodeStates(dict[str, Tensor]):
    """The states [n, …] of a minibatch's transitions, as any policy reads them, and the episodes that they lie in.

    A policy that reads whole episodes finds their `last` states [E, …] here; the state of transition i lies in episode
    `row[i]`, `before_end[i]` columns before its end.
    """

    def __init__(self, rows: Mapping[str, Tensor], last: dict[str, Tensor], row: Tensor, before_end: Tensor) -> None:
        super().__init__(rows)
        self.last, self.row, self.before_end = last, row, before_end


class EpisodeRolloutBuffer(DictRolloutBuffer):
    """SB3's rollout buffer with minibatches of whole episodes, or of their parts that this rollout saw.

    Observations are `EpisodeStates`: the rows that SB3's own policies read, and the episodes, which
    `LMActorCriticPolicy` reads once each instead of once per token, in SB3's own `train()`. `batch_size` still counts
    transitions; minibatches come as near to it as whole episodes allow.

    An environment with a deferred reference charges the KL of a whole episode at its end; once `relabel` has named it,
    the charge is moved to the tokens it belongs to before advantages are computed.
    """

    _by_transition = ("actions", "values", "log_probs", "advantages", "returns")
    _cores: Sequence[TokenMDP] = ()

    def relabel(self, cores: Sequence[TokenMDP]) -> None:
        """From here on move the KL that these environments charge in one lump to its tokens; () moves nothing."""
        self._cores = tuple(cores)

    def reset(self) -> None:
        """Empty the buffer."""
        super().reset()
        shape = (self.buffer_size, self.n_envs)
        self.lump, self.beta = np.zeros(shape), np.zeros(shape)  # [steps, envs]
        self._ended: dict[tuple[int, int], NDArray[np.float64]] = {}  # log ref [T], by (step, env) of the end

    def add(self, *args: Any, **kwargs: Any) -> None:
        """Keep one step of every environment, and what it was charged."""
        if self._cores:
            self.lump[self.pos] = np.concatenate([core.lump for core in self._cores])
            self.beta[self.pos] = np.concatenate([core.step_beta * charges_late(core) for core in self._cores])
            begin = np.cumsum([0, *(core.num_slots for core in self._cores)]).tolist()
            for first, core in zip(begin, self._cores, strict=False):
                self._ended |= {(self.pos, first + slot): logp for slot, logp in core.late_ref_logp.items()}
        super().add(*args, **kwargs)

    def compute_returns_and_advantage(self, last_values: Tensor, dones: np.ndarray) -> None:
        """Put the KL where it belongs, then compute advantages as SB3 does."""
        if self._cores:
            ref_logp = self._reference_logp()
            self.rewards += (self.lump - self.beta * (self.log_probs - ref_logp)).astype(np.float32)
        super().compute_returns_and_advantage(last_values, dones)

    def get(self, batch_size: int | None = None) -> Generator[Any, None, None]:  # type: ignore[override]
        """Shuffled minibatches of whole episodes, each transition exactly once."""
        if not self.generator_ready:
            self.observations = {k: self.swap_and_flatten(v) for k, v in self.observations.items()}
            for name in self._by_transition:
                setattr(self, name, self.swap_and_flatten(getattr(self, name)))
            self.generator_ready = True
        episodes = self._episodes()
        for chosen in _balanced(episodes, batch_size or self.buffer_size * self.n_envs):
            yield self._episode_samples(chosen)

    def _episodes(self) -> list[NDArray[np.int64]]:
        """The transitions of each episode, or of its part in this rollout, as indices of [envs · steps]."""
        first = self.episode_starts.astype(np.bool_)  # [steps, envs]
        first[0] = True  # an episode begun in an earlier rollout begins here for our purposes
        return np.split(np.arange(first.size), np.flatnonzero(first.T.reshape(-1))[1:])

    def _episode_samples(self, episodes: Sequence[NDArray[np.int64]]) -> DictRolloutBufferSamples:
        """One minibatch of these episodes, each given as its transitions' indices."""
        transitions = np.concatenate(episodes)
        samples = super()._get_samples(transitions)
        last = [episode[-1] for episode in episodes]
        states = EpisodeStates(
            samples.observations,
            {key: self.to_torch(values[last]) for key, values in self.observations.items()},
            self.to_torch(np.repeat(np.arange(len(episodes)), [len(e) for e in episodes])),
            self.to_torch(np.concatenate([np.arange(len(e))[::-1] for e in episodes])),
        )
        return samples._replace(observations=states)

    def _reference_logp(self) -> NDArray[np.float64]:
        """Log-probabilities [steps, envs] of the actions under the reference.

        Those of episodes that are over their environment has told; the others are read here, in one pass over each.
        """
        ref_logp, begin = np.zeros((self.buffer_size, self.n_envs)), 0
        written = self.observations["response_mask"].sum(-1, dtype=np.int64)  # [steps, envs]
        parts = [np.divmod(episode, self.buffer_size) for episode in self._episodes()]  # (environments, steps)
        for env, steps in parts:
            if (logp := self._ended.get((int(steps[-1]), int(env[0])))) is not None:
                ref_logp[steps, env] = logp[written[steps, env]]
        parts = [(env, steps) for env, steps in parts if (steps[-1], env[0]) not in self._ended]
        for core in self._cores:
            mine = [(int(env[0]), steps) for env, steps in parts if begin <= env[0] < begin + core.num_slots]
            begin += core.num_slots
            if not charges_late(core):
                continue
            mine.sort(key=lambda part: self.observations["attention_mask"][part[1][-1], part[0]].sum())
            for start in range(0, len(mine), _CHUNK):
                chunk = mine[start : start + _CHUNK]
                prompts, responses = zip(*(self._tokens(env, steps[-1]) for env, steps in chunk), strict=True)
                rollout = Rollout.of_tokens(prompts, responses, core.task.law)
                assert core.task.reference is not None
                logp = teacher_forced_logp(core.task.reference, rollout).double().cpu().numpy()
                for row, (env, steps) in enumerate(chunk):
                    ref_logp[steps, env] = logp[row, written[steps, env]]
        return ref_logp

    def _tokens(self, env: int, step: int) -> tuple[list[int], list[int]]:
        """The prompt, and all of the response up to the action of this step."""
        ids, attention, response = (
            self.observations[key][step, env] for key in ("input_ids", "attention_mask", "response_mask")
        )
        prompt = ids[(attention > 0) & (response == 0)].tolist()
        return prompt, [*ids[response > 0].tolist(), int(self.actions[step, env, 0])]


def charges_late(core: TokenMDP) -> bool:
    """Whether these environments charge KL that belongs to single tokens at the end of the episode."""
    task = core.task
    return task.defers and task.kl_mode == "reward" and task.kl_placement == "token"


def _balanced(episodes: Sequence[NDArray[np.int64]], size: int) -> Iterator[list[NDArray[np.int64]]]:
    """Episodes in random groups of about `size` transitions, as equal as whole episodes allow and never of one only.

    The longest first, each to the group that has least (Graham 1969, SIAM J. Appl. Math. 17(2)).
    """
    total = sum(map(len, episodes))
    order = np.random.permutation(len(episodes))
    order = order[np.argsort([-len(episodes[i]) for i in order], kind="stable")]
    count = min(max(1, round(total / size)), len(episodes))
    while True:
        groups: list[list[NDArray[np.int64]]] = [[] for _ in range(count)]
        lengths = np.zeros(count, dtype=np.int64)
        for i in order.tolist():
            least = int(lengths.argmin())
            groups[least].append(episodes[i])
            lengths[least] += len(episodes[i])
        if lengths.min() > 1 or count == 1:
            break
        count -= 1
    yield from (groups[i] for i in np.random.permutation(count).tolist())
