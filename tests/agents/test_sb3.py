"""Stable-Baselines3, unmodified: the same environment, the same KL, the same weights however log π is told."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.wrappers.vector import RecordEpisodeStatistics, TransformReward
from stable_baselines3 import A2C
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor, VecNormalize

from rlhf_env.agents.sb3 import EpisodeRolloutBuffer, LMActorCriticPolicy, SB3VecEnv, attach_sb3
from rlhf_env.envs.single import TextGenerationEnv
from rlhf_env.errors import ConfigError, MissingLogProbError, TokenizerError
from rlhf_env.worlds.enumerable import EnumerableWorld
from tests.agents.sb3 import make_model, same, weights
from tests.builders import PROMPTS, letter_score, make_envs, random_model


def test_the_policy_starts_as_the_model_exactly():
    model = make_model(SB3VecEnv(make_envs(4)))
    for a, b in zip(model.policy.lm.parameters(), random_model(seed=1).parameters(), strict=True):
        assert torch.equal(a, b)


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
    model.learn(64 * 3 * 30)
    assert world.gain(model.policy.lm) > 0.8


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


def test_environments_that_sb3_cannot_step_are_refused():
    with pytest.raises(ConfigError, match="SAME_STEP"):
        SB3VecEnv(make_envs(2, autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP))
    with pytest.raises(ConfigError, match="wraps a TextGenerationVectorEnv"):
        SB3VecEnv(gym.make_vec("CartPole-v1", num_envs=2))
    for wrapper in (RecordEpisodeStatistics, lambda envs: TransformReward(envs, lambda r: 2 * r)):
        with pytest.raises(ConfigError, match="take it away, and wrap the SB3VecEnv with SB3's VecEnvWrapper"):
            SB3VecEnv(wrapper(make_envs(2)))
    with pytest.raises(TokenizerError, match="vocabulary has 11 tokens but this model's tokenizer 4"):
        world = EnumerableWorld.make(0, vocab_size=4, length=3)
        make_model(SB3VecEnv(make_envs(2)), policy_kwargs={"model": world.policy})


@pytest.mark.parametrize("wrap", [lambda env: env, VecMonitor], ids=["plain", "monitored"])
def test_sb3_evaluates_where_the_kl_is_off(wrap):
    """Score minus penalty, since `predict` tells nobody log π."""
    env = wrap(SB3VecEnv(make_envs(3, kl_mode="off")))
    model = make_model(SB3VecEnv(make_envs(3)))
    scores = []
    returns, lengths = evaluate_policy(
        model,
        env,
        n_eval_episodes=7,
        return_episode_rewards=True,
        warn=False,
        callback=lambda found, _: scores.extend([found["info"]["score"]] if found["done"] else []),
    )
    assert len(returns) == 7 and all(1 <= n <= 6 for n in lengths)  # type: ignore[arg-type]
    for value in returns:  # type: ignore[union-attr]
        assert any(value == pytest.approx(score, abs=1e-5) for score in scores)


def test_an_evaluation_between_the_steps_changes_nothing():
    """Also with as many rows as the training has, whose contexts it makes the policy forget."""
    alone = make_model(SB3VecEnv(make_envs(4))).learn(64)
    calls = []

    class Counted(EvalCallback):
        def _on_step(self) -> bool:
            state = torch.get_rng_state()
            going_on = super()._on_step()
            torch.set_rng_state(state)  # its sampling draws from the generator that the training draws from
            calls.append(self.last_mean_reward)
            return going_on

    env = VecMonitor(SB3VecEnv(make_envs(4, kl_mode="off")))
    watched = make_model(SB3VecEnv(make_envs(4))).learn(64, Counted(env, eval_freq=3, n_eval_episodes=4, verbose=0))
    assert np.isfinite(calls[-1]) and len(set(calls)) > 2
    for a, b in zip(weights(alone), weights(watched), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_attributes_are_set_for_all_or_not_at_all():
    env = SB3VecEnv(make_envs(3))
    env.set_attr("beta", 0.5)
    env.set_attr("beta", 0.6, indices=[2, 0, 1])
    assert env.get_attr("beta", indices=[0, 1]) == [0.6, 0.6]
    with pytest.raises(ConfigError, match="all environments share one beta"):
        env.set_attr("beta", 9.0, indices=[0])
    with pytest.raises(AttributeError, match="has no attribute 'betta'"):
        env.set_attr("betta", 9.0)
    assert env.get_attr("beta") == [0.6] * 3


def test_learning_goes_on_after_the_reward_model_failed():
    failures = iter([False, True])

    def flaky(prompts, responses):
        if next(failures, False):
            raise OSError("the server is gone")
        return letter_score(prompts, responses)

    model = make_model(SB3VecEnv(make_envs(4, reward_model=flaky)))
    with pytest.raises(OSError, match="the server is gone") as failed:
        model.learn(32)
    assert "model.set_env(model.get_env())" in failed.value.__notes__[0]
    with pytest.raises(RuntimeError, match="is over") as still:
        model.learn(32, reset_num_timesteps=False)
    assert "model.set_env(model.get_env())" in still.value.__notes__[0]
    done = model.num_timesteps
    model.set_env(model.get_env())
    assert model.learn(32, reset_num_timesteps=False).num_timesteps == done + 32


def test_normalised_rewards_keep_the_tokens():
    model = make_model(VecNormalize(SB3VecEnv(make_envs(4)), norm_obs=False)).learn(32)
    assert model.rollout_buffer.observations["input_ids"].dtype == np.int64
