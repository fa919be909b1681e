"""The language model as SB3's policy: the environment's law, contexts read once, and the same numbers everywhere."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO

from rlhf_env.agents.sb3 import LMActorCriticPolicy, SB3VecEnv, attach_sb3
from rlhf_env.agents.sb3.contexts import SeenContexts
from rlhf_env.errors import ConfigError
from rlhf_env.functional import gather_logp, restrict
from rlhf_env.models.decoding import BlockDecoder
from tests.agents.sb3 import make_model, tensors
from tests.builders import make_envs, random_model

LAWS = {
    "plain": {},
    "shaped": {"temperature": 0.7, "min_new_tokens": 2, "banned_tokens": (8, 10)},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.8, "temperature": 1.3},
}


def visited(law: dict, steps: int = 12, n: int = 4) -> list[dict[str, np.ndarray]]:
    """Observations of `n` environments over a few episodes, each later than the one before."""
    env, rng = SB3VecEnv(make_envs(n, kl_mode="off", **law)), np.random.default_rng(0)
    env.seed(0)
    seen = [env.reset()]
    for _ in range(steps):
        allowed = env.env_method("action_masks")
        seen.append(env.step(np.array([rng.choice(np.flatnonzero(mask)) for mask in allowed]))[0])
    return seen


def policy_of(law: dict, dtype: str = "float32", **kwargs) -> LMActorCriticPolicy:
    env = SB3VecEnv(make_envs(4, reference=random_model(dtype=dtype), **law))
    kwargs = {"policy_kwargs": {"model": lambda: random_model(seed=1, dtype=dtype)}} | kwargs
    policy = make_model(env, attach=False, **kwargs).policy
    torch.nn.init.normal_(policy.lm.value_head.weight)  # values that differ from state to state
    policy.set_training_mode(False)
    return policy


def alone(policy: LMActorCriticPolicy, observation: dict[str, np.ndarray], row: int) -> tuple[torch.Tensor, float]:
    """Next-token log-probabilities and value of one row, from its tokens and nothing but a plain forward pass."""
    ids = observation["input_ids"][row][observation["attention_mask"][row] > 0]
    with torch.no_grad():
        logits, values = policy.lm(torch.as_tensor(ids)[None], torch.ones(1, len(ids), dtype=torch.bool))
    position = torch.tensor(int(observation["response_mask"][row].sum()))
    log_probs = policy.law.log_probs(logits[0, -1], position)
    if policy.law.truncates:
        log_probs = restrict(log_probs, torch.as_tensor(observation["candidates"][row]))
    return log_probs, float(values[0, -1])


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-4)])
def test_contexts_read_step_by_step_give_what_they_give_alone(law, dtype, tolerance):
    policy = policy_of(law, dtype)
    for observation in visited(law):
        with torch.no_grad():
            actions, values, logp = policy(tensors(observation))
        for row in range(4):
            expected, value = alone(policy, observation, row)
            assert float(logp[row]) == pytest.approx(float(expected[actions[row]]), abs=tolerance)
            assert float(values[row]) == pytest.approx(value, abs=tolerance)


def test_only_new_tokens_are_read():
    policy, columns = policy_of({}), []
    policy.lm.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: columns.append(1 if args[0].dim() == 1 else args[0].shape[1])
    )
    env = SB3VecEnv(make_envs(4, kl_mode="off", stop_at_eos=False))
    observation = env.reset()
    with torch.no_grad():
        for _ in range(6):
            policy(tensors(observation))
            policy.predict_values(tensors(observation))  # the same states again cost nothing
            observation = env.step(np.zeros(4, dtype=np.int64))[0]
    assert columns == [int(columns[0]), 1, 1, 1, 1, 1]


def test_the_same_context_gives_the_same_bits_however_many_rows_went_on():
    policy, (first, second, *_) = policy_of({}), visited({"stop_at_eos": False})
    mixed = {key: np.where(np.array([True, False, True, False])[:, None], second[key], first[key]) for key in first}
    with torch.no_grad():
        before = policy.predict_values(tensors(first))
        partly = policy.predict_values(tensors(mixed))  # rows 0 and 2 grew, 1 and 3 did not
        after = policy.predict_values(tensors(second))
    assert torch.equal(before[[1, 3]], partly[[1, 3]])
    assert torch.equal(partly[[0, 2]], after[[0, 2]])
    for row in range(4):
        assert float(after[row]) == pytest.approx(alone(policy, second, row)[1], abs=1e-5)


@pytest.mark.parametrize("part", ["start", "append"])
def test_an_interrupted_reading_leaves_nothing_half_read(part, monkeypatch):
    policy, (first, second, *_) = policy_of({}), visited({"stop_at_eos": False})
    whole = getattr(BlockDecoder, part)

    def interrupted(*args):
        whole(*args)
        raise KeyboardInterrupt

    with torch.no_grad():
        if part == "append":
            policy.predict_values(tensors(first))
        monkeypatch.setattr(BlockDecoder, part, interrupted)
        with pytest.raises(KeyboardInterrupt):
            policy.predict_values(tensors(second))
        monkeypatch.undo()
        values = policy.predict_values(tensors(second))
    for row in range(4):
        assert float(values[row]) == pytest.approx(alone(policy, second, row)[1], abs=1e-5)


def test_forward_and_a_bound_evaluate_actions_agree_bit_for_bit():
    policy = policy_of({"top_k": 3, "temperature": 0.7})
    for observation in visited({"top_k": 3, "temperature": 0.7}):
        with torch.no_grad():
            actions, values, logp = policy(tensors(observation))
            again = policy.evaluate_actions(tensors(observation), actions)
        assert torch.equal(again[0], values) and torch.equal(again[1], logp)


@pytest.mark.parametrize("change", ["step", "load", "replace", "data"])
def test_changed_weights_are_read_anew(change):
    """Also by TRPO, which hangs new tensors into the parameters; what torch does not count needs to be told."""
    policy, observation = policy_of({}), visited({})[3]
    with torch.no_grad():
        before = policy(tensors(observation), deterministic=True)[2]
        if change == "step":
            next(policy.lm.model.parameters()).add_(0.1)
        elif change == "load":
            policy.load_state_dict({name: value + 0.1 for name, value in policy.state_dict().items()})
        elif change == "replace":
            weight = next(policy.lm.model.parameters())
            weight.data = weight.data + 0.1
        else:
            next(policy.lm.model.parameters()).data.add_(0.1)
            policy.forget_contexts()
        log_probs = policy.get_distribution(tensors(observation)).distribution.logits
    assert not torch.equal(before, log_probs.max(1).values)
    for row in range(4):
        torch.testing.assert_close(log_probs[row], alone(policy, observation, row)[0], atol=1e-5, rtol=0)


def test_an_evaluation_with_fewer_rows_beside_the_training_disturbs_neither():
    policy, states = policy_of({}), visited({})
    for observation in states:
        with torch.no_grad():
            values = policy.predict_values(tensors(observation))
            few = policy.predict_values(tensors({key: value[:2] for key, value in observation.items()}))
        torch.testing.assert_close(few, values[:2], atol=1e-5, rtol=0)


def test_copies_of_the_policy_remember_nothing():
    policy = policy_of({})
    with torch.no_grad():
        policy(tensors(visited({})[0]))
    assert policy._seen._by_size
    for twin in (copy.deepcopy(policy._seen), pickle.loads(pickle.dumps(policy._seen))):
        assert isinstance(twin, SeenContexts) and not twin._by_size
    assert not any("seen" in name for name in policy.state_dict())


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_whole_episodes_and_token_rows_give_the_same_numbers(law):
    model = make_model(SB3VecEnv(make_envs(4, **law)), n_steps=12)
    torch.nn.init.normal_(model.policy.lm.value_head.weight)
    model.learn(48)
    buffer, policy = model.rollout_buffer, model.policy
    chosen = buffer._episodes()[::2]
    assert len(chosen) > 2
    by_episode, by_row = buffer._episode_samples(chosen), buffer._get_samples(np.concatenate(chosen))
    assert len(by_episode.observations.last["input_ids"]) == len(chosen)
    for a, b in zip(
        policy.evaluate_actions(by_episode.observations, by_episode.actions),
        policy.evaluate_actions(by_row.observations, by_row.actions),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    a, b = (policy.get_distribution(batch.observations).distribution for batch in (by_episode, by_row))
    torch.testing.assert_close(a.probs, b.probs, atol=1e-5, rtol=0)
    a, b = (policy.predict_values(batch.observations) for batch in (by_episode, by_row))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_a_policy_equal_to_the_reference_has_no_kl_under_any_law():
    for law in LAWS.values():
        env, kls = SB3VecEnv(make_envs(4, reference=random_model(seed=1), **law)), []
        model = make_model(env, learning_rate=0.0, policy_kwargs={"model": lambda: random_model(seed=1)})

        def keep(found, _, kls=kls):
            kls.extend(info["kl"] for info in found["infos"] if "kl" in info)
            return True

        model.learn(64, callback=keep)
        assert len(kls) > 5 and np.abs(kls).max() < 1e-4


def test_what_top_k_leaves_out_is_never_predicted():
    env = SB3VecEnv(make_envs(4, kl_mode="off", top_k=2))
    model = make_model(env, attach=False)
    observation = env.reset()
    for _ in range(20):
        actions, _ = model.predict(observation)
        assert all(action in row for action, row in zip(actions, observation["candidates"], strict=True))
        observation = env.step(actions)[0]


def test_the_law_is_there_without_attaching_and_after_loading(tmp_path):
    random_model(seed=1).save_pretrained(tmp_path / "lm")
    env = SB3VecEnv(make_envs(2, temperature=0.5, banned_tokens=(0, 8)))
    model = make_model(env, attach=False, policy_kwargs={"model": str(tmp_path / "lm")})
    assert model.policy.law == env.core.task.law
    model.save(tmp_path / "model")
    loaded = PPO.load(tmp_path / "model", device="cpu")
    assert loaded.policy.law == env.core.task.law
    other = SB3VecEnv(make_envs(2, temperature=2.0))
    loaded = PPO.load(tmp_path / "model", env=other, device="cpu")
    attach_sb3(loaded)
    assert loaded.policy.law.temperature == 2.0, "what it is trained in decides"


def test_spaces_that_are_not_the_environments_are_refused():
    space, action = make_envs(1).single_observation_space, spaces.Discrete(11)

    def build(observation_space, action_space=action):
        LMActorCriticPolicy(observation_space, action_space, lambda _: 0.0, model=random_model)

    build(space)
    with pytest.raises(ConfigError, match="is a Box, but tokens are read from the Dict of input_ids"):
        build(spaces.Box(0, 10, (12,)))
    with pytest.raises(ConfigError, match="lacks response_mask; it has attention_mask, input_ids"):
        build(spaces.Dict({key: part for key, part in space.items() if key != "response_mask"}))
    with pytest.raises(ConfigError, match="does not say under which law"):
        build(spaces.Dict(dict(space.items())))
    with pytest.raises(ConfigError, match="make it with action='token'"):
        build(space, spaces.Discrete(3))
    with pytest.raises(ConfigError, match="a function that makes it"):
        LMActorCriticPolicy(space, action, lambda _: 0.0, model=random_model())  # type: ignore[arg-type]


def test_observations_that_something_rescaled_are_refused():
    policy, observation = policy_of({}), tensors(visited({})[0])
    with torch.no_grad(), pytest.raises(ConfigError, match="not a whole number"):
        policy({**observation, "input_ids": observation["input_ids"] / 10})


def test_log_probabilities_are_those_of_the_actions_drawn():
    policy, observation = policy_of({}), tensors(visited({})[2])
    with torch.no_grad():
        actions, _, logp = policy(observation)
        distribution = policy.get_distribution(observation)
    torch.testing.assert_close(logp, gather_logp(distribution.distribution.logits, actions))
