"""Stable-Baselines3, unmodified: the same environment, the same KL, the same weights however log π is told."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

from rlhf_env.agents.sb3 import EpisodeRolloutBuffer, LMActorCriticPolicy, SB3VecEnv, attach_sb3
from rlhf_env.envs.binding import bind_policy
from rlhf_env.envs.single import TextGenerationEnv
from rlhf_env.errors import ConfigError, MissingLogProbError, TokenizerError
from rlhf_env.text.tokenizers import char_tokenizer
from rlhf_env.worlds.enumerable import EnumerableWorld
from tests.builders import PROMPTS, letter_score, make_envs, random_model


def make_model(env: Any, *, attach: bool = True, policy: Any = LMActorCriticPolicy, **kwargs: Any) -> PPO:
    defaults = {
        "gamma": 1.0,
        "n_steps": 8,
        "batch_size": 16,
        "n_epochs": 2,
        "seed": 0,
        "policy_kwargs": {"model": lambda: random_model(seed=1)},
        "rollout_buffer_class": EpisodeRolloutBuffer,
        "device": "cpu",
    }
    model = PPO(policy, env, **(defaults | kwargs))
    if attach:
        attach_sb3(model)
    return model


def weights(model: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.policy.parameters()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_policy_starts_as_the_model_exactly():
    model = make_model(SB3VecEnv(make_envs(4)))
    for a, b in zip(model.policy.lm.parameters(), random_model(seed=1).parameters(), strict=True):
        assert torch.equal(a, b)


def test_trained_weights_are_bitwise_equal_through_hook_bind_and_push():
    class Pushing(LMActorCriticPolicy):
        def forward(self, obs, deterministic=False):
            actions, values, logp = super().forward(obs, deterministic)
            envs.push_logprobs(logp.numpy(), actions.numpy())
            return actions, values, logp

    hooked = make_model(SB3VecEnv(make_envs(4))).learn(64)

    envs = make_envs(4)
    bound = make_model(SB3VecEnv(envs), attach=False)

    def log_prob(obs, actions):
        with torch.no_grad():
            tensors = {k: torch.as_tensor(v) for k, v in obs.items()}
            return bound.policy.evaluate_actions(tensors, torch.as_tensor(actions))[1].numpy()

    bind_policy(envs, log_prob)
    bound.learn(64)

    envs = make_envs(4)
    pushed = make_model(SB3VecEnv(envs), attach=False, policy=Pushing).learn(64)
    assert same(weights(hooked), weights(bound))
    assert same(weights(hooked), weights(pushed))
    assert not same(weights(hooked), [p.detach() for p in make_model(SB3VecEnv(make_envs(4))).policy.parameters()])


def test_the_adapter_is_a_dummy_vec_env():
    """Same observations, same weights, bit for bit (KL off, since a batched reference rounds differently)."""

    def one() -> TextGenerationEnv:
        model = random_model()
        return TextGenerationEnv(
            prompts=PROMPTS, tokenizer=model.tokenizer, reward_model=letter_score, beta=0.0, max_new_tokens=6
        )

    batched = make_model(SB3VecEnv(make_envs(4, reference=None, beta=0.0))).learn(96)
    dummy = make_model(DummyVecEnv([one] * 4)).learn(96)
    assert same(weights(batched), weights(dummy))


def test_the_hook_reaches_every_environment_of_a_dummy_vec_env():
    model = random_model()
    kwargs = {"reference": model, "tokenizer": model.tokenizer, "prompts": PROMPTS, "reward_model": letter_score}
    env = make_vec_env("rlhf_env/TextGeneration-v0", n_envs=3, env_kwargs={**kwargs, "max_new_tokens": 6, "beta": 0.3})
    batched = make_model(SB3VecEnv(make_envs(3, reference=model)), batch_size=24).learn(24)
    looped = make_model(env, batch_size=24).learn(24)
    ours, theirs = batched.rollout_buffer, looped.rollout_buffer
    np.testing.assert_array_equal(ours.actions, theirs.actions)
    np.testing.assert_allclose(ours.rewards, theirs.rewards, atol=1e-4)
    assert (ours.rewards != 0).all(), "every token is charged"


def test_what_the_buffer_holds_adds_up():
    """Σ rewards of an episode = score − β·KL, through SB3's float32."""
    env = VecMonitor(SB3VecEnv(make_envs(4)), info_keywords=("score", "kl", "beta", "penalty"))
    episodes = []

    def keep(local, _):
        episodes.extend(info["episode"] | {"score": info["score"]} for info in local["infos"] if "episode" in info)
        return True

    make_model(env).learn(128, callback=keep)
    assert len(episodes) > 10
    for e in episodes:
        assert e["r"] == pytest.approx(e["score"] - e["beta"] * e["kl"] - e["penalty"], abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 16, 1000, None])
def test_minibatches_are_whole_episodes_and_each_transition_comes_once(batch_size):
    model = make_model(SB3VecEnv(make_envs(4)), n_steps=12)
    model.learn(48)
    buffer = model.rollout_buffer
    buffer.generator_ready = True
    seen, sizes = [], []
    for batch in buffer.get(batch_size):
        obs = batch.observations
        assert len(obs["row"]) == len(batch.actions)
        assert obs["row"].unique().tolist() == list(range(len(obs["input_ids"])))
        for row in range(len(obs["input_ids"])):  # within an episode: consecutive states up to the last
            ends = obs["before_end"][obs["row"] == row].tolist()
            assert ends == list(range(len(ends)))[::-1]
        seen.extend(zip(batch.old_log_prob.tolist(), batch.returns.tolist(), strict=True))
        sizes.append(len(batch.actions))
    assert sorted(seen) == sorted(
        zip(buffer.log_probs.flatten().tolist(), buffer.returns.flatten().tolist(), strict=True)
    )
    if batch_size == 16:
        assert max(sizes) - min(sizes) < 16


def test_whole_episodes_and_token_rows_give_the_same_numbers():
    model = make_model(SB3VecEnv(make_envs(4, temperature=0.7, min_new_tokens=2)), n_steps=12)
    torch.nn.init.normal_(model.policy.lm.value_head.weight)
    model.learn(48)
    buffer, policy = model.rollout_buffer, model.policy
    for indices in ([0, 1, 2], [12, 13], list(range(12, 24))):
        starts = buffer.episode_starts.astype(bool)
        starts[0] = True
        flat = starts.T.reshape(-1)
        episodes = [list(e) for e in np.split(np.arange(48), np.flatnonzero(flat)[1:])]
        chosen = [np.array(e) for e in episodes if e[0] in indices]
        by_episode = buffer._episode_samples(chosen)
        by_row = buffer._get_samples(np.concatenate(chosen))
        for a, b in zip(
            policy.evaluate_actions(by_episode.observations, by_episode.actions),
            policy.evaluate_actions(by_row.observations, by_row.actions),
            strict=True,
        ):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
        torch.testing.assert_close(
            policy.get_distribution(by_episode.observations).distribution.logits,
            policy.get_distribution(by_row.observations).distribution.logits,
            atol=1e-4,
            rtol=0,
        )
        torch.testing.assert_close(
            policy.predict_values(by_episode.observations),
            policy.predict_values(by_row.observations),
            atol=1e-4,
            rtol=0,
        )


def test_with_learning_rate_zero_ratios_stay_one():
    model = make_model(SB3VecEnv(make_envs(4, temperature=0.7, banned_tokens=(8, 10))), learning_rate=0.0)
    model.learn(64)
    logged = model.logger.name_to_value
    assert logged["train/clip_fraction"] == 0
    assert abs(logged["train/approx_kl"]) < 1e-7


def test_the_sampling_law_is_the_environments():
    """Banned tokens are never drawn, and a policy equal to the reference has no KL."""
    model = random_model(seed=1)
    env = SB3VecEnv(make_envs(4, reference=model, temperature=0.7, banned_tokens=(0, 8, 10), min_new_tokens=2))
    kls = []

    def keep(local, _):
        kls.extend(info["kl"] for info in local["infos"] if "kl" in info)
        assert not np.isin(local["actions"], [0, 8, 10]).any()
        return True

    make_model(env, learning_rate=0.0).learn(64, callback=keep)
    assert len(kls) > 5
    assert np.abs(kls).max() < 1e-4


def test_terminal_observations_and_truncation():
    env = SB3VecEnv(make_envs(2, kl_mode="off", length_limit="truncate", max_new_tokens=3))
    env.seed(0)
    env.reset()
    assert [i["prompt_length"] for i in env.reset_infos]
    for step in range(3):
        obs, reward, done, infos = env.step(np.array([1, 9 if step == 2 else 2]))
    assert reward.dtype == np.float32
    assert done.tolist() == [True, True]
    assert [i["TimeLimit.truncated"] for i in infos] == [True, False]
    assert infos[1]["terminal_observation"]["response_mask"].sum() == 3
    assert obs["response_mask"].sum() == 0
    assert infos[1]["stop_reason"] == "eos"


def test_a2c_learns_on_a_small_world():
    world = EnumerableWorld.make(0, vocab_size=4, length=3)
    envs = gym.make_vec("rlhf_env/Enumerable-v0", num_envs=64, world_seed=0, vocab_size=4, length=3)
    model = A2C(
        LMActorCriticPolicy,
        SB3VecEnv(envs),
        gamma=1.0,
        n_steps=3,
        learning_rate=1e-3,
        seed=0,
        device="cpu",
        use_rms_prop=False,
        policy_kwargs={"model": world.policy},
        rollout_buffer_class=EpisodeRolloutBuffer,
    )
    attach_sb3(model)
    model.learn(64 * 3 * 100)
    assert world.gain(model.policy.lm) > 0.8


def test_save_and_load_do_not_hold_the_language_model_twice(tmp_path):
    random_model(seed=1).save_pretrained(tmp_path / "lm")
    model = make_model(SB3VecEnv(make_envs(4)), policy_kwargs={"model": str(tmp_path / "lm")})
    model.learn(32)
    model.save(tmp_path / "model.zip")
    size = sum(p.numel() * p.element_size() for p in model.policy.parameters())
    assert (tmp_path / "model.zip").stat().st_size < 3.5 * size  # weights and Adam's two moments
    loaded = PPO.load(tmp_path / "model.zip", device="cpu")
    assert same(weights(model), weights(loaded))


def test_what_cannot_work_says_so():
    envs = SB3VecEnv(make_envs(2))
    with pytest.raises(ConfigError, match="norm_obs=False"):
        attach_sb3(make_model(VecNormalize(envs, norm_obs_keys=["input_ids"]), attach=False))
    with pytest.raises(ConfigError, match="SAME_STEP"):
        SB3VecEnv(make_envs(2, autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP))
    with pytest.raises(ConfigError, match="pretrained weights"):
        make_model(envs, policy_kwargs={"model": random_model, "ortho_init": True})
    with pytest.raises(ConfigError, match="kl_mode='reference'"):
        attach_sb3(DQN("MultiInputPolicy", envs, device="cpu", buffer_size=100))
    with pytest.raises(ConfigError, match="wraps a TextGenerationVectorEnv"):
        SB3VecEnv(gym.make_vec("CartPole-v1", num_envs=2))
    with pytest.raises(TokenizerError, match="vocabulary has 11 tokens but this model's tokenizer 4"):
        world = EnumerableWorld.make(0, vocab_size=4, length=3)
        make_model(envs, policy_kwargs={"model": world.policy})
    assert char_tokenizer("ab", special=False)


def test_masked_ppo_is_charged_its_own_masked_policy():
    """`attach_sb3` reaches a policy that is no `ActorCriticPolicy`, and no masked token is ever drawn."""
    contrib = pytest.importorskip("sb3_contrib")
    envs = make_envs(4, banned_tokens=(0, 8, 10), min_new_tokens=2)
    model = contrib.MaskablePPO("MultiInputPolicy", SB3VecEnv(envs), n_steps=8, batch_size=16, seed=0, device="cpu")
    attach_sb3(model)
    charged = []

    def keep(local, _):
        logp = local["log_probs"].numpy()
        charged.extend((p, i["logp"]) for p, i in zip(logp, local["infos"], strict=True) if "logp" in i)
        assert not np.isin(local["actions"], [0, 8, 10]).any()
        return True

    model.learn(64, callback=keep)
    assert len(charged) > 30
    assert all(told == pytest.approx(own) for own, told in charged)


def test_prompts_may_be_given_to_some_environments():
    env = SB3VecEnv(make_envs(2, kl_mode="off"))
    env.set_options([{"prompt": "abcabc"}, {}])
    env.seed(3)
    assert env.reset()["attention_mask"][0].sum() == 6
    env.seed(3)
    second = env.reset()["attention_mask"].sum(1)
    assert second[1] == env.venv_.reset(seed=3)[0]["attention_mask"][1].sum()


def test_prediction_needs_an_environment_without_kl():
    """`predict` samples outside the hook, so an attached environment says what to do instead of charging a guess."""
    model = make_model(SB3VecEnv(make_envs(2)))
    env = model.get_env()
    obs = env.reset()
    actions, _ = model.predict(obs)
    with pytest.raises(MissingLogProbError, match="kl_mode='off'"):
        env.step(actions)
