"""From settings to prompts, models and environments."""

from dataclasses import replace

import pytest

from rlhf_env.errors import ConfigError, DataError, PromptTooLongError
from rlhf_env.training.assemble import assemble, parse_device, split_prompts
from rlhf_env.training.config import EnvConfig, TrainConfig
from tests.tiny_files import write_tiny_files


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    folder = write_tiny_files(tmp_path_factory.mktemp("tiny"))
    return TrainConfig(policy=str(folder / "policy"), prompts=str(folder / "prompts.txt"), reward="vader")


def test_a_tenth_of_the_distinct_prompts_is_held_out():
    prompts = [str(i) for i in range(40)]
    train, held_out = split_prompts(prompts, seed=0)
    assert (len(train), len(held_out)) == (36, 4)
    assert sorted(train + held_out) == sorted(prompts)
    assert split_prompts(prompts, seed=0) == (train, held_out)
    assert split_prompts(prompts, seed=1) != (train, held_out)


@pytest.mark.parametrize(("size", "held_out"), [(2, 1), (9, 1), (29, 2), (1280, 128), (5000, 128)])
def test_at_least_one_prompt_is_held_out_and_at_most_128(size, held_out):
    assert len(split_prompts([str(i) for i in range(size)], seed=3)[1]) == held_out


def test_a_repeated_prompt_is_on_one_side_only():
    train, held_out = split_prompts(["a", "b", "a", "a", "b"], seed=0)
    assert {*train} | {*held_out} == {"a", "b"} and not {*train} & {*held_out}
    assert len(held_out) == 1


def test_a_single_prompt_is_trained_and_evaluated_on():
    assert split_prompts(["a", "a"], seed=0) == (["a", "a"], ["a"])


def test_the_settings_reach_the_environment(config):
    env = EnvConfig(beta=0.2, target_kl=3.0, beta_horizon=77, max_new_tokens=9, min_new_tokens=2, temperature=0.5)
    env = replace(env, stop_strings=("!",), missing_eos_penalty=1.5, kl_placement="terminal", max_prompt_tokens=11)
    parts = assemble(replace(config, env=env, num_envs=3, freeze_layers=1))
    for envs in (parts.envs, parts.eval_envs):
        task = envs.task
        assert (task.law.temperature, task.law.min_new_tokens, task.stop_strings) == (0.5, 2, ("!",))
        assert (task.max_new_tokens, task.max_prompt_tokens, task.kl_placement) == (9, 11, "terminal")
        assert (task.missing_eos_penalty, envs.beta, envs.num_envs) == (1.5, 0.2, 3)
    parts.envs.core.observe_kl([30.0] * 77)  # far above the target: β grows by the largest factor, 1.2, in a horizon
    assert (parts.envs.beta, parts.eval_envs.beta) == (pytest.approx(0.24), 0.2)
    assert (len(parts.envs.task.prompts), len(parts.eval_envs.task.prompts), parts.held_out) == (72, 7, True)
    frozen = [name for name, p in parts.policy.model.named_parameters() if not p.requires_grad]
    assert any("h.0." in name for name in frozen) and not any("h.1." in name for name in frozen)


def test_only_the_rewards_of_training_may_lack_the_kl(config):
    assert [e.task.kl_mode for p in [assemble(config)] for e in (p.envs, p.eval_envs)] == ["reward", "reward"]
    parts = assemble(config, kl_mode="reference")
    assert (parts.envs.task.kl_mode, parts.eval_envs.task.kl_mode) == ("reference", "reward")


def test_evaluation_prompts_may_come_from_a_file_of_their_own(config, tmp_path):
    (tmp_path / "eval.jsonl").write_text('{"prompt": "the film is"}\n{"prompt": "a film"}\n')
    parts = assemble(replace(config, eval_prompts=str(tmp_path / "eval.jsonl")))
    assert parts.eval_envs.task.prompts == ("the film is", "a film")
    assert len(parts.envs.task.prompts) == 79
    assert not parts.held_out  # "the film is" is trained on too


def test_a_prompt_that_does_not_fit_is_named_with_its_file(config):
    with pytest.raises(PromptTooLongError, match=r"prompts\.txt: .*context of 128.*begins \"we watched it"):
        assemble(replace(config, env=EnvConfig(max_new_tokens=126)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompts": "none.txt"}, DataError, "none.txt: No such file"),
        ({"reward": "vadr"}, ConfigError, "Did you mean 'vader'"),
        ({"policy": "./nowhere"}, ConfigError, "there is no folder"),
        ({"device": "abacus"}, ConfigError, "device 'abacus' cannot be used"),
        ({"freeze_layers": 9}, ConfigError, "cannot freeze 9 of 2 layers"),
        (
            {"env": EnvConfig(chat_template="no.jinja")},
            ConfigError,
            "chat_template must be auto, none or a Jinja file",
        ),
    ],
)
def test_what_cannot_be_had_is_named(config, change, error, message):
    with pytest.raises(error, match=message):
        assemble(replace(config, **change))


def test_the_cpu_is_always_there():
    assert parse_device("cpu").type == "cpu"


def test_a_run_has_one_budget():
    paths = {"policy": "p", "prompts": "p", "reward": "r"}
    assert TrainConfig(**paths).budget == {"tokens": 200_000}
    for unit in ("tokens", "episodes", "updates", "queries"):
        assert TrainConfig(**paths, **{unit: 3}).budget == {unit: 3}
        with pytest.raises(ConfigError, match=f"{unit} must be at least 1, it is 0"):
            TrainConfig(**paths, **{unit: 0})
    assert TrainConfig(**paths, data="pairs.jsonl").budget == {}  # as long as the agent's own settings say
    assert TrainConfig(**paths, data="pairs.jsonl", updates=3).budget == {"updates": 3}
    with pytest.raises(ConfigError, match="tokens and updates are given"):
        TrainConfig(**paths, tokens=10, updates=3)
    with pytest.raises(ConfigError, match="episodes must be at least 1, it is 0"):
        TrainConfig(**paths, episodes=0)
