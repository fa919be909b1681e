"""Runs of Stable-Baselines3's algorithms, which leave the same folder as ours."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from rlhf_env.errors import ConfigError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.records.checkpoint import latest_checkpoint, load_checkpoint
from rlhf_env.records.run import Run
from rlhf_env.training.config import EnvConfig, TrainConfig
from rlhf_env.training.interruption import Interrupted
from rlhf_env.training.run import run_training
from rlhf_env.training.sb3 import sb3_class
from tests.tiny_files import without_times, write_tiny_files


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    folder = write_tiny_files(tmp_path_factory.mktemp("tiny"))
    return TrainConfig(
        policy=str(folder / "policy"),
        prompts=str(folder / "prompts.txt"),
        reward="vader",
        agent="sb3:PPO",
        updates=3,
        num_envs=4,
        eval_episodes=8,
        checkpoint_every=2,
        env=EnvConfig(beta=0.1, temperature=0.8, max_new_tokens=6),
        settings={"n_steps": 12, "learning_rate": 1e-3, "n_epochs": 2},
    )


def test_ppo_trains_and_leaves_a_run(config, tmp_path):
    shown = []
    summary = run_training(config, tmp_path / "run", on_update=shown.append)
    run = Run.open(tmp_path / "run")
    assert [row["update"] for row in shown] == [1, 2, 3]
    assert [row["tokens"] for row in run.metrics] == [48, 96, 144]  # 4 environments × 12 steps
    for row in run.metrics:
        assert {
            "score",
            "kl",
            "length",
            "eos_rate",
            "approx_kl",
            "clip_fraction",
            "policy_loss",
            "entropy",
        } <= row.keys()
        assert 0 < row["length"] <= 6 and row["entropy"] > 0
        assert row["return"] == pytest.approx(row["score"] - 0.1 * row["kl"], abs=1e-6)
    assert run.metrics[0]["kl"] == pytest.approx(0, abs=1e-4)  # the policy is still its reference
    assert latest_checkpoint(run.checkpoints).name == "step-00000002"
    assert summary["kl_before"] == pytest.approx(0, abs=1e-4) and abs(summary["kl"]) > 1e-4
    start, end = (load_file(f"{path}/model.safetensors") for path in (config.policy, run.path / "model"))
    assert any(not torch.equal(start[name], end[name]) for name in start)
    assert CausalLM.from_pretrained(run.path / "model").value_head.weight.abs().sum() > 0


def test_a2c_repeats_itself(config, tmp_path):
    config = replace(config, agent="sb3:A2C", settings={"n_steps": 6}, updates=None, tokens=48)
    for name in ("a", "b"):
        run_training(config, tmp_path / name)
    rows = without_times(tmp_path / "a/metrics.jsonl")
    assert rows == without_times(tmp_path / "b/metrics.jsonl")
    assert [row["tokens"] for row in rows] == [24, 48]


@pytest.mark.parametrize("unit", ["episodes", "queries"])
def test_a_budget_of_episodes_ends_with_the_rollout_that_reaches_it(config, unit, tmp_path):
    run_training(replace(config, updates=None, **{unit: 9}), tmp_path / "run")
    rows = Run.open(tmp_path / "run").metrics
    assert rows[-1][unit] >= 9 and all(row[unit] < 9 for row in rows[:-1])
    assert all(row["queries"] == row["episodes"] for row in rows)  # each finished episode is scored once


def test_sb3_contrib_may_be_named_itself():
    from sb3_contrib import TRPO

    assert sb3_class("sb3-contrib:TRPO", {}) is sb3_class("sb3:TRPO", {}) is TRPO


def test_an_algorithm_of_sb3_contrib_trains(config, tmp_path):
    settings = {"n_steps": 6, "batch_size": 24}
    run_training(replace(config, agent="sb3-contrib:TRPO", settings=settings, updates=1), tmp_path / "run")
    assert Run.open(tmp_path / "run").summary["agent"] == "sb3-contrib:TRPO"


def test_an_interrupted_run_keeps_the_policy_of_its_last_update(config, tmp_path):
    def interrupt(row):
        raise Interrupted(15)

    with pytest.raises(Interrupted):
        run_training(config, tmp_path / "run", on_update=interrupt)
    checkpoint = load_checkpoint(latest_checkpoint(tmp_path / "run/checkpoints"))
    assert checkpoint.step == 1 and checkpoint.state["tokens"] == 48
    CausalLM.from_pretrained(checkpoint.path / "model")


@pytest.mark.parametrize(
    ("agent", "settings", "message"),
    [
        ("sb3:PPo", {}, "did you mean sb3:PPO"),
        ("sb3:DQN", {}, "no actor-critic algorithm for text called 'DQN'; there are .*sb3:PPO"),
        ("sb3-contrib:TRP", {}, "^sb3-contrib has no actor-critic .* called 'TRP'; did you mean sb3-contrib:TRPO"),
        ("sb3-contrib:A2C", {}, "^sb3-contrib has no .* called 'A2C'; there are sb3-contrib:TRPO"),
        ("sb3:PPO", {"nsteps": 1}, r"no setting settings\.nsteps to be given here; did you mean settings\.n_steps"),
        ("sb3:PPO", {"seed": 1}, r"no setting settings\.seed to be given here"),
    ],
)
def test_what_cannot_train_a_language_model_is_refused(agent, settings, message):
    with pytest.raises(ConfigError, match=message):
        sb3_class(agent, settings)


def test_settings_that_the_algorithm_refuses_are_reported(config, tmp_path):
    with pytest.raises(ConfigError, match="sb3:PPO refuses these settings"):
        run_training(replace(config, settings={"clip_range": "wide"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_of_others_is_nothing_to_them(config, tmp_path):
    with pytest.raises(ConfigError, match="sb3:PPO learns from what it samples itself: leave data out"):
        run_training(replace(config, data="pairs.jsonl"), tmp_path / "run")


def test_such_runs_cannot_be_resumed(config, tmp_path):
    with pytest.raises(ConfigError, match="sb3:PPO keeps its state to itself, so its runs cannot be resumed"):
        run_training(config, tmp_path, resume=True)


def test_a_learning_rate_may_fall_in_a_straight_line(config, tmp_path):
    settings = {**config.settings, "learning_rate": "lin_1e-3"}
    run_training(replace(config, settings=settings, updates=4), tmp_path / "run")
    rates = [row["learning_rate"] for row in Run.open(tmp_path / "run").metrics]
    assert rates == pytest.approx([1e-3 * (1 - done / 4) for done in (1, 2, 3, 4)])
    with pytest.raises(ConfigError, match="must be a number, or lin_ and a number, got 'cosine'"):
        run_training(replace(config, settings={"learning_rate": "cosine"}), tmp_path / "none")
