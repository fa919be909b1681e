"""Stable-Baselines3, unmodified, on the token MDP: the VecEnv view, a language-model policy, a buffer of episodes.

envs = SB3VecEnv(gym.make_vec("rlhf_env/TextGeneration-v0", num_envs=32))
model = PPO(LMActorCriticPolicy, envs, gamma=1.0, n_steps=32, policy_kwargs={"model": "folder"},
            rollout_buffer_class=EpisodeRolloutBuffer)
attach_sb3(model)  # from here the environment's KL is this policy's
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.distributions import CategoricalDistribution, Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples, Schedule
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_wrapper
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from rlhf_env.envs.binding import find_cores, push_to
from rlhf_env.envs.core import Observation, TokenMDP
from rlhf_env.envs.vector import TextGenerationVectorEnv
from rlhf_env.errors import ConfigError, TokenizerError
from rlhf_env.functional import entropy, gather_logp, inverse_cdf_sample
from rlhf_env.models.causal_lm import CausalLM, left_padded
from rlhf_env.text.codec import Codec
from rlhf_env.types import SamplingLaw


class SB3VecEnv(VecEnv):
    """A batched text-generation environment as Stable-Baselines3 sees environments."""

    def __init__(self, envs: Any) -> None:
        inner = envs.unwrapped
        if not isinstance(inner, TextGenerationVectorEnv):
            raise ConfigError(f"SB3VecEnv wraps a TextGenerationVectorEnv (gym.make_vec), got {type(inner).__name__}")
        if inner.autoreset_mode != AutoresetMode.SAME_STEP:
            raise ConfigError(
                f"Stable-Baselines3 resets in the same step, but autoreset_mode is {inner.autoreset_mode.name}: make "
                "the environment with autoreset_mode=AutoresetMode.SAME_STEP, the default"
            )
        self.venv_ = inner
        self.render_mode = inner.render_mode
        self._actions = np.zeros(inner.num_envs, dtype=np.int64)
        super().__init__(inner.num_envs, inner.single_observation_space, inner.single_action_space)

    @property
    def core(self) -> TokenMDP:
        """The state machine."""
        return self.venv_.core

    def reset(self) -> Observation:  # type: ignore[override]
        """Begin an episode in every environment, with the seeds and options given to `seed` and `set_options`."""
        seeds = None if all(s is None for s in self._seeds) else self._seeds
        prompts = [options.get("prompt") if options else None for options in self._options]
        observation, infos = self.venv_.reset(seed=seeds, options={"prompt": prompts})
        self.reset_infos = _info_list(infos, self.num_envs)
        self._reset_seeds()
        self._reset_options()
        return observation

    def step_async(self, actions: np.ndarray) -> None:
        """Keep the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> Any:
        """Write one token in every environment; what a finished episode leaves is in its info."""
        observation, reward, terminated, truncated, infos = self.venv_.step(np.asarray(self._actions).reshape(-1))
        done = terminated | truncated
        listed = _info_list(infos, self.num_envs)
        for i in np.flatnonzero(done).tolist():
            self.reset_infos[i] = {k: v for k, v in listed[i].items() if k not in ("final_obs", "final_info")}
            listed[i] = {
                **listed[i]["final_info"],
                "terminal_observation": listed[i]["final_obs"],
                "TimeLimit.truncated": bool(truncated[i] and not terminated[i]),
            }
        return observation, reward.astype(np.float32), done, listed

    def close(self) -> None:
        """Nothing to release."""
        self.venv_.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The batched environment's attribute, once for each index."""
        return [getattr(self.venv_, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Set an attribute of the batched environment, which all of them share."""
        setattr(self.venv_, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Call a method of the batched environment once; a result with one entry per environment is split."""
        result = getattr(self.venv_, method_name)(*method_args, **method_kwargs)
        rows = list(self._get_indices(indices))
        return [result[i] for i in rows] if np.ndim(result) else [result] * len(rows)

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        """Single environments do not exist here, so none is wrapped."""
        return [False] * len(list(self._get_indices(indices)))

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Text has no image."""
        return [None] * self.num_envs


def _info_list(infos: dict[str, Any], n: int) -> list[dict[str, Any]]:
    """Gymnasium's dict of arrays with masks as one dict per environment."""
    listed: list[dict[str, Any]] = [{} for _ in range(n)]
    for key, values in infos.items():
        if key.startswith("_"):
            continue
        rows = _info_list(values, n) if isinstance(values, dict) else values
        for i in np.flatnonzero(infos[f"_{key}"]).tolist():
            value = rows[i]
            listed[i][key] = value.item() if isinstance(value, np.generic) else value
    return listed


class LMActorCriticPolicy(ActorCriticPolicy):
    """A `CausalLM` as actor and critic of PPO, A2C and their kin.

    `model` is a Hugging Face folder or hub name, or a function that makes a `CausalLM`; never a module, which SB3
    would pickle into its checkpoint. The policy starts as that model exactly, and dropout stays off.
    """

    def __init__(
        self,
        observation_space: spaces.Dict,
        action_space: spaces.Discrete,
        lr_schedule: Schedule,
        *,
        model: str | Callable[[], CausalLM],
        ortho_init: bool = False,
        **kwargs: Any,
    ) -> None:
        if ortho_init:
            raise ConfigError("ortho_init=True would overwrite the pretrained weights: leave it off")
        self._model = model
        super().__init__(observation_space, action_space, lr_schedule, ortho_init=False, **kwargs)

    def _build(self, lr_schedule: Schedule) -> None:
        self.lm = self._model() if callable(self._model) else CausalLM.from_pretrained(self._model)
        size = int(self.action_space.n)  # type: ignore[attr-defined]
        if (own := Codec.of(self.lm.tokenizer).vocab_size) != size:
            raise TokenizerError(
                f"the environment's vocabulary has {size} tokens but this model's tokenizer {own}: "
                "the policy must use the tokenizer that the environment was made with"
            )
        #: The environment's sampling law; `attach_sb3` puts the real one here.
        self.law = SamplingLaw(size, self.lm.tokenizer.eos_token_id)
        trainable = [p for p in self.lm.parameters() if p.requires_grad]
        self.optimizer = self.optimizer_class(trainable, lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def forward(self, obs: dict[str, Tensor], deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Sample one token for each row: actions [N], values [N, 1], log-probabilities [N]."""
        log_probs, values = self._last(obs)
        if deterministic:
            actions = log_probs.argmax(-1)
        else:
            actions = inverse_cdf_sample(log_probs, torch.rand(len(log_probs), device=log_probs.device))
        return actions, values.unsqueeze(1), gather_logp(log_probs, actions)

    def evaluate_actions(self, obs: dict[str, Tensor], actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Values [n, 1], log-probabilities [n] and entropies [n] of actions in states.

        States are rows of observations, or those of an `EpisodeRolloutBuffer`: whole sequences and, for each
        transition, the sequence and the column where its state ends, so that one pass serves a whole episode.
        """
        log_probs, values = self._states(obs) if "row" in obs else self._last(obs)
        return values.unsqueeze(1), gather_logp(log_probs, actions.long().flatten()), entropy(log_probs)

    def get_distribution(self, obs: dict[str, Tensor]) -> Distribution:  # type: ignore[override]
        """The next-token distribution of each row."""
        log_probs, _ = self._states(obs) if "row" in obs else self._last(obs)
        return CategoricalDistribution(log_probs.shape[-1]).proba_distribution(action_logits=log_probs)

    def predict_values(self, obs: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        """The value of each row's state, [N, 1]."""
        _, values = self._states(obs) if "row" in obs else self._last(obs)
        return values.unsqueeze(1)

    def _last(self, obs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log-probabilities [N, V] and values [N] in the states that the rows of `obs` end with."""
        ids, mask = left_padded(obs["input_ids"].long(), obs["attention_mask"].bool())
        logits, values = self.lm(ids, mask, keep=1)
        return self.law.log_probs(logits[:, -1], obs["response_mask"].long().sum(1)), values[:, -1]

    def _states(self, obs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log-probabilities [n, V] and values [n] in states inside the sequences of `obs`."""
        ids, mask = left_padded(obs["input_ids"].long(), obs["attention_mask"].bool())
        row, before_end = obs["row"].long(), obs["before_end"].long()
        keep = int(before_end.max()) + 1
        logits, values = self.lm(ids, mask, keep=keep)
        column = keep - 1 - before_end
        return self.law.log_probs(logits[row, column], obs["position"].long()), values[row, column]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        return {**data, "model": self._model}


class EpisodeRolloutBuffer(DictRolloutBuffer):
    """SB3's rollout buffer with minibatches of whole episodes.

    A minibatch's observations are the last state of each episode (or of its part that this rollout saw) and, for each
    transition, where its state lies in it: SB3's own `train()` then encodes each episode once instead of once per
    token. `batch_size` still counts transitions; minibatches come as near to it as whole episodes allow.
    """

    def get(self, batch_size: int | None = None) -> Generator[DictRolloutBufferSamples, None, None]:  # type: ignore[override]
        """Shuffled minibatches of whole episodes, each transition exactly once."""
        if not self.generator_ready:
            self.observations = {k: self.swap_and_flatten(v) for k, v in self.observations.items()}
            for name in ("actions", "values", "log_probs", "advantages", "returns"):
                setattr(self, name, self.swap_and_flatten(getattr(self, name)))
            self.generator_ready = True
        total = self.buffer_size * self.n_envs
        first = self.episode_starts.astype(np.bool_)  # [steps, envs]
        first[0] = True  # an episode begun in an earlier rollout begins here for our purposes
        episodes = np.split(np.arange(total), np.flatnonzero(first.T.reshape(-1))[1:])
        order = np.random.permutation(len(episodes))
        count = max(1, round(total / (batch_size or total)))
        middle = np.cumsum([len(episodes[i]) for i in order]) - np.array([len(episodes[i]) / 2 for i in order])
        share = np.minimum((middle * count / total).astype(int), count - 1)
        for number in range(count):
            if chosen := [episodes[i] for i in order[share == number]]:
                yield self._episode_samples(chosen)

    def _episode_samples(self, episodes: list[np.ndarray]) -> DictRolloutBufferSamples:
        """One minibatch of these episodes, each given as its transitions' indices."""
        samples = super()._get_samples(np.concatenate(episodes))
        last = [episode[-1] for episode in episodes]
        states = {
            **{key: values[last] for key, values in self.observations.items()},
            "row": np.repeat(np.arange(len(episodes)), [len(e) for e in episodes]),
            "before_end": np.concatenate([np.arange(len(e))[::-1] for e in episodes]),
            "position": self.observations["response_mask"][np.concatenate(episodes)].astype(np.int64).sum(1),
        }
        return samples._replace(observations={key: self.to_torch(values) for key, values in states.items()})


def attach_sb3(model: Any) -> RemovableHandle:
    """Charge the KL of an SB3 model's own policy from here on.

    A forward hook on `model.policy` pushes the log-probability of every action it samples: exactly the stepped ones,
    for PPO, A2C, TRPO, MaskablePPO and RecurrentPPO alike. Returns a handle whose `remove()` detaches. Raises
    `ConfigError` where the environment or the algorithm cannot be attached.
    """
    env = model.get_env()
    if env is None:
        raise ConfigError("the model has no environment: pass one to its constructor or set_env before attach_sb3")
    normalizer = unwrap_vec_wrapper(env, VecNormalize)
    if normalizer is not None and normalizer.norm_obs:
        raise ConfigError("VecNormalize would turn token ids into small floats: use norm_obs=False")
    if not hasattr(model.policy, "evaluate_actions"):  # as all actor-critic policies have, MaskablePPO's included
        raise ConfigError(
            f"{type(model).__name__}'s policy does not give log-probabilities of its actions: make the environment "
            "with kl_mode='reference' (exact for deterministic policies)"
        )
    cores = find_cores(env)
    if isinstance(model.policy, LMActorCriticPolicy):
        model.policy.law = cores[0].task.law
    for core in cores:
        core.expect_push()

    def push(module: torch.nn.Module, args: Any, output: tuple[Tensor, ...]) -> None:
        push_to(cores, output[2], output[0])

    return model.policy.register_forward_hook(push)
