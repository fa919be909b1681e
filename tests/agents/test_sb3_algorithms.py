"""PPO, A2C, TRPO, MaskablePPO and RecurrentPPO as they are: one KL, one update, however log π and states come."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sb3_contrib import QRDQN, TRPO, MaskablePPO, RecurrentPPO
from sb3_contrib.common.maskable.buffers import MaskableDictRolloutBuffer
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.buffers import DictRolloutBuffer

from rlhf_env.agents.sb3 import (
    EpisodeRolloutBuffer,
    GRUExtractor,
    LMActorCriticPolicy,
    MaskableEpisodeRolloutBuffer,
    MaskableLMActorCriticPolicy,
    SB3VecEnv,
    attach_sb3,
)
from rlhf_env.envs.binding import bind_policy
from rlhf_env.errors import ConfigError, MissingLogProbError
from tests.agents.sb3 import eager_model, furthest, make_model, same, tensors, weights
from tests.builders import make_envs

SMALL = {"features_extractor_class": GRUExtractor, "features_extractor_kwargs": {"features_dim": 16}}
RECURRENT = {**SMALL, "lstm_hidden_size": 16}


def make(algorithm: Any, env: Any, **kwargs: Any) -> Any:
    """The algorithm with the policy it is meant to have."""
    if algorithm is MaskablePPO:
        buffer = kwargs.pop("rollout_buffer_class", MaskableEpisodeRolloutBuffer)
        kwargs |= {"policy": MaskableLMActorCriticPolicy, "rollout_buffer_class": buffer}
    elif algorithm in (RecurrentPPO, DQN, QRDQN):
        alias = "MultiInputLstmPolicy" if algorithm is RecurrentPPO else "MultiInputPolicy"
        kwargs = {"policy": alias, "policy_kwargs": dict(RECURRENT if algorithm is RecurrentPPO else SMALL)} | kwargs
    elif algorithm is TRPO:
        kwargs |= {"cg_max_steps": 2, "n_critic_updates": 2}
    return make_model(env, algorithm, **kwargs)


def log_prob_of(model: Any, env: Any) -> Any:
    """log π as `bind_policy` wants it, of a policy that may have masks or a memory."""

    def log_prob(observation: dict[str, np.ndarray], actions: np.ndarray) -> np.ndarray:
        extra: tuple = ()
        if isinstance(model, MaskablePPO):
            extra = (get_action_masks(env),)
        if isinstance(model, RecurrentPPO):  # not yet replaced while the environment steps
            starts = torch.as_tensor(model._last_episode_starts, dtype=torch.float32)
            extra = (RNNStates(*model._last_lstm_states), starts)
        with torch.no_grad():
            found = model.policy.evaluate_actions(tensors(observation), torch.as_tensor(actions), *extra)
        return found[1].numpy()

    return log_prob


@pytest.mark.parametrize("algorithm", [PPO, A2C, TRPO, MaskablePPO, RecurrentPPO])
@pytest.mark.parametrize("law", [{}, {"top_k": 4}], ids=["plain", "top_k"])
def test_trained_weights_are_bitwise_equal_through_hook_bind_and_push(algorithm, law):
    if law and algorithm is RecurrentPPO:  # it knows no masks: what it may do must be all there is
        law = {**law, "action": "candidate"}
    hooked = make(algorithm, SB3VecEnv(make_envs(4, **law)), n_steps=4).learn(32)

    env = SB3VecEnv(make_envs(4, **law))
    bound = make(algorithm, env, n_steps=4, attach=False)
    bind_policy(env, log_prob_of(bound, env))
    bound.learn(32)

    envs = make_envs(4, **law)
    pushed = make(algorithm, SB3VecEnv(envs), n_steps=4, attach=False)
    forward = pushed.policy.forward

    def pushing(*args, **kwargs):
        output = forward(*args, **kwargs)
        envs.push_logprobs(output[2].numpy(), output[0].numpy())
        return output

    pushed.policy.forward = pushing
    pushed.learn(32)
    assert same(weights(hooked), weights(bound))
    assert same(weights(hooked), weights(pushed))
    assert not same(weights(hooked), weights(make(algorithm, SB3VecEnv(make_envs(4, **law)), n_steps=4)))


@pytest.mark.parametrize("law", [{}, {"top_k": 4, "banned_tokens": (0, 8), "min_new_tokens": 2}], ids=str)
@pytest.mark.parametrize(
    ("algorithm", "rows"),
    [
        (PPO, DictRolloutBuffer),
        (A2C, DictRolloutBuffer),
        (TRPO, DictRolloutBuffer),
        (MaskablePPO, MaskableDictRolloutBuffer),
    ],
)
def test_one_update_is_the_same_by_token_rows_and_by_whole_episodes(algorithm, rows, law):
    """In one minibatch, so that both see the same transitions."""
    settings = {"batch_size": 64} if algorithm is not A2C else {"use_rms_prop": False}
    settings |= {"n_epochs": 1} if "PPO" in algorithm.__name__ else {}
    # TRPO's critic updates leave shared weights alone; a step of SGD says what the gradient was, Adam only its sign.
    kwargs = {"model": eager_model, "optimizer_class": torch.optim.SGD}
    models = []
    for buffer in (rows, MaskableEpisodeRolloutBuffer if algorithm is MaskablePPO else EpisodeRolloutBuffer):
        env = SB3VecEnv(make_envs(8, **law))
        settings |= {"rollout_buffer_class": buffer, "policy_kwargs": kwargs, "learning_rate": 0.05, "n_steps": 8}
        model = make(algorithm, env, **settings)
        start = weights(model)
        models.append(model.learn(64))
    assert furthest(*models) < 1e-4
    assert furthest(start, models[1]) > 1e-3
    assert all(torch.isfinite(w).all() for w in weights(models[0])), "also where tokens are impossible"


def test_masks_of_ones_own_narrow_what_the_law_allows():
    env = SB3VecEnv(make_envs(4, banned_tokens=(0, 8), kl_mode="off"))
    assert is_masking_supported(env)
    masks = get_action_masks(env)
    assert masks.shape == (4, 11) and masks.dtype == bool and not masks[:, [0, 8]].any()
    policy = make(MaskablePPO, env, attach=False).policy
    policy.set_training_mode(False)
    observation = tensors(env.reset())
    with torch.no_grad():
        plain = policy.get_distribution(observation).distribution.probs
        same_bits = policy.get_distribution(observation, masks).distribution.probs
        masks[:, 3:] = False
        narrowed = policy.get_distribution(observation, masks).distribution.probs
    assert torch.equal(plain, same_bits), "a mask that says what the law says changes nothing"
    assert (narrowed[:, [0, 3, 4, 5, 6, 7, 8, 9, 10]] == 0).all()
    torch.testing.assert_close(narrowed[:, 1] / narrowed[:, 2], plain[:, 1] / plain[:, 2])
    actions, _ = policy.predict({k: v.numpy() for k, v in observation.items()}, action_masks=masks)
    assert set(actions.tolist()) <= {1, 2}
    with pytest.raises(ConfigError, match="the action mask of row 0 leaves no token"):
        policy(observation, action_masks=np.zeros((4, 11), dtype=bool))


def test_minibatches_carry_the_masks_of_their_transitions():
    env = SB3VecEnv(make_envs(4, min_new_tokens=3))
    model = make(MaskablePPO, env).learn(32)
    for batch in model.rollout_buffer.get(16):
        early = batch.observations["response_mask"].sum(1) < 3
        assert early.any() and not early.all()
        assert (batch.action_masks[:, 9] == 0).equal(early), "EOS is forbidden for three tokens"


@pytest.mark.parametrize("algorithm", [PPO, A2C, TRPO, MaskablePPO, RecurrentPPO, DQN, QRDQN])
@pytest.mark.parametrize("law", [{}, {"top_k": 3, "action": "candidate"}], ids=["tokens", "candidates"])
def test_small_agents_read_tokens_through_the_extractor(algorithm, law):
    q = algorithm in (DQN, QRDQN)
    env = SB3VecEnv(make_envs(4, kl_mode="reference" if q else "reward", **law))
    alias = "MultiInputLstmPolicy" if algorithm is RecurrentPPO else "MultiInputPolicy"
    extra = {"buffer_size": 200, "learning_starts": 8, "target_update_interval": 16} if q else {"n_steps": 8}
    extra |= {} if algorithm is A2C else {"batch_size": 16}
    policy = dict(RECURRENT if algorithm is RecurrentPPO else SMALL)
    model = algorithm(alias, env, policy_kwargs=policy, seed=0, device="cpu", gamma=1.0, **extra)
    start = model.policy.state_dict()
    start = {name: value.clone() for name, value in start.items()}
    if not q:
        attach_sb3(model)
    model.learn(32)
    names = [name for name in start if "gru" in name and "target" not in name]
    assert names and any(not torch.equal(start[name], model.policy.state_dict()[name]) for name in names)
    assert all(torch.isfinite(value).all() for value in model.policy.state_dict().values())


def test_the_extractor_sees_tokens_position_and_candidates_but_no_padding():
    envs = make_envs(3, kl_mode="off", top_k=3)
    torch.manual_seed(0)
    extractor = GRUExtractor(envs.single_observation_space, features_dim=8, embedding_dim=4)  # type: ignore[arg-type]
    observation = {k: v.float() for k, v in tensors(envs.reset(seed=0)[0]).items()}
    features = extractor(observation)
    assert features.shape == (3, 8)

    padding = observation["attention_mask"] == 0
    noisy = {**observation, "input_ids": torch.where(padding, 7.0, observation["input_ids"])}
    assert torch.equal(extractor(noisy), features)
    for row in range(3):  # shorter company means fewer columns
        one = extractor({k: v[row : row + 1] for k, v in observation.items()})
        torch.testing.assert_close(one[0], features[row], atol=1e-6, rtol=0)

    for key, value in (
        ("input_ids", (observation["input_ids"] + ~padding) % 8),
        ("response_mask", observation["attention_mask"]),
        ("candidates", observation["candidates"].flip(1)),
        ("candidate_logp", observation["candidate_logp"] - 1),
    ):
        assert not torch.allclose(extractor({**observation, key: value}), features, atol=1e-4), key
    none = {**observation, "candidate_logp": torch.full_like(observation["candidate_logp"], -3e38)}
    assert torch.isfinite(extractor(none)).all()


def test_a_step_that_was_not_sampled_by_the_policy_is_an_error():
    for algorithm in (PPO, MaskablePPO, RecurrentPPO):
        env = SB3VecEnv(make_envs(2))
        model = make(algorithm, env)
        env.reset()
        with pytest.raises(MissingLogProbError, match="kl_mode='off'"):
            env.step(np.array([1, 2]))
        model.learn(16)
        observation = env.reset()
        with torch.no_grad():
            if algorithm is RecurrentPPO:
                model.policy(tensors(observation), model._last_lstm_states, torch.ones(2))
            else:
                model.policy(tensors(observation))
        told = env.core.log_pi._pushed[1]
        with pytest.raises(MissingLogProbError, match="was told action"):
            env.step((told + 1) % 8)


def test_the_policies_are_what_the_algorithms_ask_for():
    assert issubclass(MaskableLMActorCriticPolicy, LMActorCriticPolicy)
    assert issubclass(MaskableEpisodeRolloutBuffer, EpisodeRolloutBuffer)
    assert issubclass(MaskableEpisodeRolloutBuffer, MaskableDictRolloutBuffer)
