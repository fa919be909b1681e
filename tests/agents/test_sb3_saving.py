"""Saved models: the language model once, nothing pickled in our folders, and the same future after loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sb3_contrib import TRPO, MaskablePPO
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.utils import LinearSchedule, set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

from rlhf_env.agents.sb3 import (
    EpisodeRolloutBuffer,
    GRUExtractor,
    LMActorCriticPolicy,
    MaskableEpisodeRolloutBuffer,
    MaskableLMActorCriticPolicy,
    SB3VecEnv,
    attach_sb3,
    load_sb3,
    save_sb3,
)
from rlhf_env.agents.sb3.saving import _decoded
from rlhf_env.envs.beta import ScheduledBeta
from rlhf_env.envs.binding import find_cores
from rlhf_env.errors import ConfigError, DataError
from rlhf_env.models.adapters import add_lora
from tests.agents.sb3 import eager_model, make_model, same, weights
from tests.builders import make_env, make_envs, random_model


def go_on(model: Any, env: Any, attach: bool = True) -> list[torch.Tensor]:
    """Weights after training further in `env`, from given seeds."""
    model.set_env(env)
    if attach:
        attach_sb3(model)
    env.seed(5)
    set_random_seed(6)
    model.learn(32, reset_num_timesteps=False)
    return weights(model)


@pytest.mark.parametrize("factory", [True, False], ids=["factory", "folder"])
def test_sb3s_own_files_do_not_hold_the_language_model_twice(tmp_path, factory):
    random_model(seed=1).save_pretrained(tmp_path / "lm")
    source = (lambda: random_model(seed=1)) if factory else str(tmp_path / "lm")
    model = make_model(SB3VecEnv(make_envs(4)), policy_kwargs={"model": source}).learn(32)
    model.save(tmp_path / "model.zip")
    size = sum(p.numel() * p.element_size() for p in model.policy.parameters())
    size += sum(v.numel() * 4 for s in model.policy.optimizer.state.values() for v in s.values())
    assert (tmp_path / "model.zip").stat().st_size < 1.3 * size
    env = SB3VecEnv(make_envs(4))
    loaded = PPO.load(tmp_path / "model.zip", env=env, device="cpu")
    assert same(weights(model), weights(loaded))
    assert same(go_on(loaded, env), go_on(model, SB3VecEnv(make_envs(4))))


@pytest.mark.parametrize("algorithm", [PPO, A2C, TRPO, MaskablePPO])
def test_a_language_model_goes_on_from_a_folder_as_it_would_have(algorithm, tmp_path):
    masked = algorithm is MaskablePPO
    policy, buffer = (
        (MaskableLMActorCriticPolicy, MaskableEpisodeRolloutBuffer)
        if masked
        else (LMActorCriticPolicy, EpisodeRolloutBuffer)
    )
    extra = {"cg_max_steps": 3, "n_critic_updates": 2} if algorithm is TRPO else {}
    model = make_model(
        SB3VecEnv(make_envs(4)), algorithm, policy=policy, rollout_buffer_class=buffer, learning_rate=1e-3, **extra
    ).learn(32)
    path = save_sb3(model, tmp_path / "saved")
    assert (path / "model" / "model.safetensors").is_file()
    assert {file.suffix for file in path.rglob("*") if file.is_file()} <= {".safetensors", ".json", ".jinja"}

    env = SB3VecEnv(make_envs(4))
    loaded = load_sb3(algorithm, tmp_path / "saved", env, device="cpu")
    assert type(loaded.policy) is policy and type(loaded.rollout_buffer) is buffer
    assert loaded.num_timesteps == 32 and loaded.gamma == 1.0 and loaded.n_steps == 8
    assert same(weights(model), weights(loaded))
    assert same(go_on(loaded, env), go_on(model, SB3VecEnv(make_envs(4))))
    assert not same(weights(model), weights(make_model(env, algorithm, policy=policy, rollout_buffer_class=buffer)))


@pytest.mark.parametrize("single", [False, True], ids=["batched", "single"])
def test_a_saved_model_goes_on_with_its_random_numbers_and_prompts(single, tmp_path):
    """Bit for bit, with nothing seeded anew: the same prompts, samples, β and weights as without the interruption."""

    def env() -> Any:
        kwargs = {"beta": ScheduledBeta(((0, 0.3), (100, 0.1))), "group_size": 3}
        return VecMonitor(
            DummyVecEnv([lambda: make_env(**kwargs)] * 4) if single else SB3VecEnv(make_envs(4, **kwargs))
        )

    def betas(model: Any) -> list[float]:
        return [core.beta for core in find_cores(model.get_env())]

    model = make_model(env(), learning_rate=1e-3).learn(64)
    save_sb3(model, tmp_path)
    before = betas(model)
    model.set_env(model.get_env())  # running episodes are begun anew, as they are after loading
    model.learn(64, reset_num_timesteps=False)

    set_random_seed(77)
    loaded = load_sb3(PPO, tmp_path, env(), device="cpu")
    assert betas(loaded) == before and 0.1 < before[0] < 0.3
    attach_sb3(loaded)
    loaded.learn(64, reset_num_timesteps=False)
    for name in ("input_ids", "response_mask"):
        np.testing.assert_array_equal(*(m.rollout_buffer.observations[name] for m in (loaded, model)))
    np.testing.assert_array_equal(loaded.rollout_buffer.actions, model.rollout_buffer.actions)
    assert betas(loaded) == betas(model)
    assert same(weights(loaded), weights(model))


def test_what_is_asked_for_goes_before_what_was_saved(tmp_path):
    """A seed begins all randomness anew, a fixed β is the environment's own, and more of them start afresh."""
    save_sb3(make_model(SB3VecEnv(make_envs(4))).learn(32), tmp_path)
    env = SB3VecEnv(make_envs(4, beta=0.1))
    load_sb3(PPO, tmp_path, env, device="cpu")
    assert env.core.beta == 0.1

    def firsts(**seed: int) -> list[Any]:
        env = SB3VecEnv(make_envs(4, prompts=[letter * length for letter in "abcdefgh" for length in (1, 2, 3, 4)]))
        load_sb3(PPO, tmp_path, env, device="cpu", **seed)
        return [torch.rand(1).item(), np.random.rand(), env.reset()["input_ids"].tolist()]

    saved, three, four = firsts(), firsts(seed=3), firsts(seed=4)
    assert saved == firsts() and three == firsts(seed=3)
    for a, b in ((saved, three), (three, four)):
        assert all(x != y for x, y in zip(a, b, strict=True))
    fewer = SB3VecEnv(make_envs(2))
    load_sb3(PPO, tmp_path, fewer, device="cpu", batch_size=8)
    fewer.reset()


def test_frozen_layers_stay_frozen(tmp_path):
    def frozen() -> Any:
        return eager_model().freeze_layers(1)

    model = make_model(SB3VecEnv(make_envs(4)), policy_kwargs={"model": frozen}).learn(32)
    save_sb3(model, tmp_path)
    env = SB3VecEnv(make_envs(4))
    loaded = load_sb3(PPO, tmp_path, env, device="cpu")
    names = [[n for n, p in m.policy.named_parameters() if p.requires_grad] for m in (model, loaded)]
    assert names[0] == names[1] and 0 < len(names[0]) < len(list(model.policy.parameters()))
    assert same(go_on(loaded, env), go_on(model, SB3VecEnv(make_envs(4))))


@pytest.mark.parametrize("algorithm", [PPO, A2C, DQN])
def test_small_agents_are_saved_too(algorithm, tmp_path):
    def env() -> SB3VecEnv:
        return SB3VecEnv(make_envs(4, kl_mode="reference" if algorithm is DQN else "reward"))

    extra = {"buffer_size": 64, "learning_starts": 8} if algorithm is DQN else {"n_steps": 8}
    extra |= {"batch_size": 16} if algorithm is PPO else {}
    kwargs = {"features_extractor_class": GRUExtractor, "net_arch": [16], "activation_fn": torch.nn.ReLU}
    model = algorithm("MultiInputPolicy", env(), policy_kwargs=kwargs, seed=0, device="cpu", **extra)
    if algorithm is not DQN:
        attach_sb3(model)
    save_sb3(model.learn(32), tmp_path)
    loaded = load_sb3(algorithm, tmp_path, env(), device="cpu")
    assert same(weights(model), weights(loaded))
    assert loaded.policy_kwargs == model.policy_kwargs and type(loaded.policy) is type(model.policy)
    if algorithm is DQN:
        assert loaded.train_freq == model.train_freq
    else:
        assert same(go_on(loaded, env()), go_on(model, env()))


def test_adapters_are_not_merged_unasked(tmp_path):
    pytest.importorskip("peft")

    def adapted() -> Any:
        return add_lora(random_model(seed=1))

    model = make_model(SB3VecEnv(make_envs(2)), policy_kwargs={"model": adapted})
    with pytest.raises(ConfigError, match="adapters would be merged"):
        save_sb3(model, tmp_path)


def test_only_the_newest_is_kept(tmp_path):
    model = make_model(SB3VecEnv(make_envs(4)))
    for total in (32, 64):
        save_sb3(model.learn(32, reset_num_timesteps=False), tmp_path)
        assert [path.name for path in tmp_path.glob("step-*")] == [f"step-{total:08d}"]


def test_what_json_cannot_say_is_asked_for(tmp_path):
    model = make_model(SB3VecEnv(make_envs(2)), learning_rate=LinearSchedule(1e-3, 0, 1))
    save_sb3(model, tmp_path)
    env = SB3VecEnv(make_envs(2))
    with pytest.raises(ConfigError, match="could not hold learning_rate: give load_sb3 the same"):
        load_sb3(PPO, tmp_path, env)
    loaded = load_sb3(PPO, tmp_path, env, device="cpu", learning_rate=LinearSchedule(1e-3, 0, 1))
    assert loaded.lr_schedule(0.5) == pytest.approx(5e-4)


def test_folders_that_are_not_what_is_asked_for(tmp_path):
    env = SB3VecEnv(make_envs(2))
    with pytest.raises(ConfigError, match="no complete checkpoint in .*save_sb3"):
        load_sb3(PPO, tmp_path, env)
    path = save_sb3(make_model(env), tmp_path)
    with pytest.raises(ConfigError, match="holds a model of PPO, not of A2C"):
        load_sb3(A2C, tmp_path, env)
    (path / "state.json").write_text("{}")
    with pytest.raises((DataError, ConfigError)):
        load_sb3(PPO, tmp_path, env)


def test_a_folder_cannot_name_code_to_run():
    for module, name in (("os", "system"), ("rlhf_env.agents.sb3", "load_sb3"), ("torch.nn", "functional")):
        with pytest.raises(DataError, match="no class that a saved model may name"):
            _decoded({"class": [module, name]}, Path("x"))
