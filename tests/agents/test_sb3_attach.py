"""Mistakes with Stable-Baselines3 end in a message that says what to do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.wrappers import TimeLimit
from sb3_contrib import QRDQN, TRPO
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from rlhf_env.agents.sb3 import SB3VecEnv, attach_sb3
from rlhf_env.envs.binding import bind_policy
from rlhf_env.errors import ConfigError, MissingLogProbError, TokenizerError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.tiny import tiny_config
from rlhf_env.text.tokenizers import char_tokenizer
from tests.agents.sb3 import eager_model, make_model, tensors
from tests.builders import make_env, make_envs, random_model


class Reader(BaseFeaturesExtractor):
    """A features extractor around any module, read or not."""

    def __init__(self, observation_space: Any, make: Any) -> None:
        super().__init__(observation_space, 4)
        self.inner = make()

    def forward(self, observations: dict[str, torch.Tensor]) -> torch.Tensor:
        return observations["input_ids"][:, :4]


def small(make: Any, **policy: Any) -> PPO:
    kwargs = {"features_extractor_class": Reader, "features_extractor_kwargs": {"make": make}, **policy}
    return make_model(SB3VecEnv(make_envs(2)), policy="MultiInputPolicy", attach=False, policy_kwargs=kwargs)


@pytest.mark.parametrize(
    ("make", "where", "share"),
    [
        (lambda: torch.nn.Dropout(0.1), "features_extractor.inner", "0.1"),
        (lambda: torch.nn.LSTM(3, 3, num_layers=2, dropout=0.2), "features_extractor.inner", "0.2"),
        (lambda: torch.nn.TransformerEncoderLayer(4, 2, dropout=0.3), "features_extractor.inner", "0.3"),
    ],
)
def test_dropout_in_the_policy(make, where, share):
    with pytest.raises(ConfigError, match=rf"policy\.{where}.* has dropout {share}.*set it to 0"):
        attach_sb3(small(make, ortho_init=False))


def test_a_language_model_keeps_dropout_off_by_itself():
    def dropping() -> CausalLM:
        model = random_model(seed=1)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        return model

    model = make_model(SB3VecEnv(make_envs(2)), policy_kwargs={"model": dropping}, learning_rate=0.0).learn(16)
    assert abs(model.logger.name_to_value["train/approx_kl"]) < 1e-8


def test_orthogonal_initialisation_of_a_pretrained_extractor():
    def llama() -> Any:
        return random_model("llama").model

    before = llama().state_dict()
    model = small(llama)
    after = model.policy.features_extractor.inner.state_dict()
    assert sum(not torch.equal(before[name], after[name]) for name in before) > 10, "what the message is about"
    with pytest.raises(ConfigError, match=r"policy_kwargs=\{'ortho_init': False"):
        attach_sb3(model)
    with pytest.raises(ConfigError, match="ortho_init"):
        attach_sb3(small(random_model))
    attach_sb3(small(llama, ortho_init=False))
    with pytest.raises(ConfigError, match="pretrained weights"):
        make_model(SB3VecEnv(make_envs(2)), policy_kwargs={"model": random_model, "ortho_init": True})


def test_trpo_differentiates_twice_and_everything():
    def frozen() -> CausalLM:
        return eager_model().freeze_layers(1)

    env = SB3VecEnv(make_envs(2))
    make_model(env, TRPO)
    with pytest.raises(ConfigError, match="attention='eager'"):
        make_model(env, TRPO, policy_kwargs={"model": random_model})
    with pytest.raises(ConfigError, match="is frozen: train all layers, or use PPO"):
        make_model(env, TRPO, policy_kwargs={"model": frozen})
    make_model(env, policy_kwargs={"model": frozen})


def test_discounting_a_kl_that_comes_at_the_end():
    with pytest.warns(UserWarning, match=r"gamma=0\.99 discounts the KL.*use gamma=1\.0"):
        make_model(SB3VecEnv(make_envs(2, kl_placement="terminal")), gamma=0.99)


@pytest.mark.parametrize("algorithm", [DQN, QRDQN])
def test_algorithms_without_log_probabilities(algorithm):
    model = algorithm("MultiInputPolicy", SB3VecEnv(make_envs(2)), device="cpu", buffer_size=100)
    with pytest.raises(ConfigError, match=f"{algorithm.__name__}'s policy .* with kl_mode='reference'"):
        attach_sb3(model)


def test_environments_that_change_what_the_policy_sees_or_when_it_ends():
    envs = SB3VecEnv(make_envs(2))
    with pytest.raises(ConfigError, match="norm_obs=False"):
        attach_sb3(make_model(VecNormalize(envs, norm_obs_keys=["input_ids"]), attach=False))
    with pytest.raises(ConfigError, match="TimeLimit"):
        attach_sb3(make_model(DummyVecEnv([lambda: TimeLimit(make_env(), 3)]), attach=False, batch_size=8))
    model = make_model(envs, attach=False)
    model.env = None
    with pytest.raises(ConfigError, match="pass one to its constructor or set_env"):
        attach_sb3(model)


def test_models_with_another_vocabulary():
    def stranger() -> CausalLM:
        tokenizer = char_tokenizer("stuvwxyz")  # as many letters, and others
        config = tiny_config("gpt2", len(tokenizer), n_layer=1, n_embd=8, n_head=2)
        return CausalLM.from_config(config, tokenizer)

    with pytest.raises(TokenizerError, match="token ids mean other text"):
        make_model(SB3VecEnv(make_envs(2)), policy_kwargs={"model": stranger})


def test_environments_of_different_laws():
    def one(temperature: float) -> Any:
        return lambda: make_env(temperature=temperature)

    with pytest.raises(ConfigError, match="different sampling laws"):
        make_model(DummyVecEnv([one(1.0), one(2.0)]))


def rewards_after(env: SB3VecEnv, model: Any, **kwargs: Any) -> np.ndarray:
    """What the buffer holds after a rollout in `env` from given seeds, attached to it."""
    attach_sb3(model)
    env.seed(5)
    set_random_seed(6)
    return model.learn(32, **kwargs).rollout_buffer.rewards.copy()


@pytest.mark.parametrize("backends", [("deferred", "cached"), ("cached", "deferred")], ids="-then-".join)
def test_attaching_again_replaces_what_was_attached(backends):
    """The new environment is charged once, where it charges, and nothing is left of the old one."""
    first, second = (SB3VecEnv(make_envs(4, reference_backend=backend)) for backend in backends)
    model = make_model(first, learning_rate=0.0)
    model.learn(32)
    model.set_env(second)
    found = rewards_after(second, model, reset_num_timesteps=False)
    alike = SB3VecEnv(make_envs(4, reference_backend=backends[1]))
    fresh = make_model(alike, learning_rate=0.0, attach=False)
    np.testing.assert_allclose(found, rewards_after(alike, fresh), atol=1e-5)
    first.core.log_pi.push = second.core.log_pi.push = lambda *told: pushes.append(told)  # type: ignore[method-assign]
    pushes: list[Any] = []
    attach_sb3(model)
    model.policy(tensors(second.reset()))
    assert len(pushes) == 1


def test_another_environment_needs_another_attachment():
    model, other = make_model(SB3VecEnv(make_envs(4))), SB3VecEnv(make_envs(4))
    model.set_env(other)
    with pytest.raises(ConfigError, match=r"call attach_sb3\(model\) again after set_env"):
        model.learn(32)
    attach_sb3(model)
    model.learn(32)


def test_what_was_attached_can_be_removed():
    env = SB3VecEnv(make_envs(4, reference_backend="deferred"))
    model = make_model(env, attach=False, learning_rate=0.0)
    replaced, attachment = attach_sb3(model), attach_sb3(model)
    paid: list[np.ndarray] = []
    replaced.remove()
    model.learn(32, callback=lambda found, _: paid.append(found["rewards"].copy()) or True)
    assert not np.allclose(model.rollout_buffer.rewards, paid), "the present one goes on moving the charge"
    attachment.remove()
    attachment.remove()
    with pytest.raises(MissingLogProbError, match="bind_policy"):
        model.learn(32)
    bind_policy(env, lambda observation, actions: np.full(4, -2.0))
    paid.clear()
    model.learn(32, callback=lambda found, _: paid.append(found["rewards"].copy()) or True)
    np.testing.assert_array_equal(model.rollout_buffer.rewards, paid)


def test_the_policy_may_be_asked_about_other_states():
    """With another number of rows they are nobody's steps; nothing is told of them."""
    env = SB3VecEnv(make_envs(2))
    model = make_model(env)
    observation = tensors(env.reset())
    one = {key: value[:1] for key, value in observation.items()}
    actions, *_ = model.policy(observation)
    model.policy(one)
    env.step(actions.numpy())
    model.policy(one)
    with pytest.raises(MissingLogProbError, match="no log-probabilities were pushed"):
        env.step(actions.numpy())
