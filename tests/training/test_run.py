"""A run from settings to a folder: what it leaves, that it repeats, and that it survives being interrupted."""

import json
import math
import re
import shlex
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from rlhf_env.errors import ConfigError, RewardError
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.records.checkpoint import latest_checkpoint, load_checkpoint
from rlhf_env.records.config import build, override_layer, read_layer
from rlhf_env.records.run import Run
from rlhf_env.training import run
from rlhf_env.training.config import EnvConfig, TrainConfig
from rlhf_env.training.run import run_training
from tests.tiny_files import without_times, write_tiny_files


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    folder = write_tiny_files(tmp_path_factory.mktemp("tiny"))
    return TrainConfig(
        policy=str(folder / "policy"),
        prompts=str(folder / "prompts.txt"),
        reward="vader",
        updates=6,
        num_envs=8,
        eval_episodes=12,
        checkpoint_every=2,
        env=EnvConfig(beta=0.1, target_kl=1.0, beta_horizon=100, max_new_tokens=8),
        settings={"learning_rate": 3e-3, "batch_size": 16, "epochs": 2, "minibatches": 2},
    )


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory) -> Run:
    """Six updates without interruption."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    run_training(replace(config, gold="vader", eval_every=4), out)
    return Run.open(out)


def test_a_run_leaves_its_settings_and_a_command_that_replays_it(config, straight):
    config = replace(config, gold="vader", eval_every=4)
    assert build(TrainConfig, read_layer(straight.path / "config.yaml")) == config
    (command,) = re.findall(
        r"^    rlhf-env train --out NEW_FOLDER (.+)$", (straight.path / "README.md").read_text(), re.M
    )
    assert build(TrainConfig, override_layer(shlex.split(command))) == config


def test_a_run_leaves_one_row_of_metrics_per_update(straight):
    rows = straight.metrics
    assert [row["update"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["episodes"] for row in rows] == [16, 32, 48, 64, 80, 96]
    for row in rows:
        assert {
            "score",
            "kl",
            "length",
            "eos_rate",
            "beta",
            "policy_loss",
            "seconds",
            "tokens_per_second",
        } <= row.keys()
        assert row["return"] == pytest.approx(row["score"] - row["beta"] * row["kl"], abs=1e-5)
    assert rows[2]["tokens_per_second"] == pytest.approx((rows[2]["tokens"] - rows[1]["tokens"]) / rows[2]["seconds"])
    assert [row["update"] for row in rows if "eval_score" in row] == [4]


def test_a_run_sums_itself_up(straight):
    summary, rows = straight.summary, straight.metrics
    samples = straight.samples
    assert (summary["updates"], summary["episodes"], summary["tokens"]) == (6, 96, rows[-1]["tokens"])
    updating = sum(row["seconds"] for row in rows)
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / updating)
    assert summary["seconds"] > updating  # loading and evaluating take time too
    for when in ("before", "after"):
        mean = sum(row[f"score_{when}"] for row in samples) / 12
        assert summary[f"score_{when}"] == pytest.approx(mean, abs=1e-6)
        assert summary[f"gold_{when}"] == pytest.approx(mean, abs=1e-6)  # here gold is the same reward
        assert summary[f"score_{when}_low"] < mean < summary[f"score_{when}_high"]
    assert summary["kl"] == pytest.approx(sum(row["kl"] for row in samples) / 12, abs=1e-5)
    assert summary["kl_before"] == pytest.approx(0, abs=1e-4)
    assert summary["win_rate_before"] == 0.5
    assert summary["beta"] != 0.1  # the last value of an adapting β
    assert (summary["train_prompts"], summary["eval_prompts"], summary["held_out"]) == (72, 7, True)
    assert summary["threads"] == 1 and summary["versions"]["torch"] == torch.__version__


def test_a_budget_of_reward_queries_ends_with_the_update_that_reaches_it(config, tmp_path):
    summary = run_training(replace(config, updates=None, queries=33), tmp_path / "run")
    assert [row["queries"] for row in Run.open(tmp_path / "run").metrics] == [16, 32, 48]
    assert (summary["updates"], summary["queries"]) == (3, 48)


def test_held_out_prompts_are_never_trained_on(config, straight, tmp_path):
    every = set((tmp_path / config.prompts).read_text().splitlines())
    held_out = {row["prompt"] for row in straight.samples}
    assert held_out < every and len(held_out) <= 7
    assert "prompts that training never saw" in (straight.path / "README.md").read_text()


def test_a_run_leaves_a_model_that_the_next_run_can_begin_from(config, straight, tmp_path):
    trained = straight.path / "model"
    again = run_training(replace(config, policy=str(trained), gold=None, updates=1), tmp_path / "next")
    weights = load_file(trained / "model.safetensors")
    start = load_file(f"{config.policy}/model.safetensors")
    assert any(not torch.equal(weights[name], start[name]) for name in start)
    assert again["score_before"] == pytest.approx(straight.summary["score_after"], abs=1e-6)
    assert again["kl_before"] == pytest.approx(0, abs=1e-4)  # its reference is what it began as
    assert latest_checkpoint(tmp_path / "next/checkpoints").name == "step-00000001"  # the last update always has one


def test_the_figure_is_drawn(straight):
    pytest.importorskip("matplotlib")
    assert (straight.plots / "training.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_gives_the_same_run(config, straight, tmp_path):
    run_training(replace(config, gold="vader", eval_every=4), tmp_path / "again")
    assert without_times(tmp_path / "again/metrics.jsonl") == without_times(straight.path / "metrics.jsonl")
    for file in ("model/model.safetensors", "samples.jsonl", "config.yaml"):
        assert (tmp_path / "again" / file).read_bytes() == (straight.path / file).read_bytes()


def test_another_seed_gives_another_run(config, straight, tmp_path):
    run_training(replace(config, seed=1, updates=1), tmp_path / "other")
    assert without_times(tmp_path / "other/metrics.jsonl")[0]["score"] != straight.metrics[0]["score"]


def test_a_resumed_run_is_bit_for_bit_the_one_that_was_not_interrupted(config, straight, tmp_path):
    config, out = replace(config, gold="vader", eval_every=4), tmp_path / "resumed"

    def interrupt(row):
        if row["update"] == 3:  # its row is logged, the newest checkpoint is that of update 2
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(config, out, on_update=interrupt)
    assert len(Run.open(out).metrics) == 3
    assert latest_checkpoint(out / "checkpoints").name == "step-00000002"
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"update": 4, "half a ro')  # a kill in the middle of a write

    shown = []
    run_training(config, out, resume=True, on_update=lambda row: shown.append(row["update"]))
    assert shown == [3, 4, 5, 6]
    second, third = Run.open(out).metrics[1:3]
    assert third["tokens_per_second"] == pytest.approx((third["tokens"] - second["tokens"]) / third["seconds"])
    assert without_times(out / "metrics.jsonl") == without_times(straight.path / "metrics.jsonl")
    last = "checkpoints/step-00000006"
    files = ("model.safetensors", "value_head.safetensors")
    for file in [*(f"model/{f}" for f in files), *(f"{last}/model/{f}" for f in files), f"{last}/agent.safetensors"]:
        assert (out / file).read_bytes() == (straight.path / file).read_bytes(), file
    assert (out / "samples.jsonl").read_bytes() == (straight.path / "samples.jsonl").read_bytes()
    times = ("seconds", "tokens_per_second")
    same = [{k: v for k, v in run.summary.items() if k not in times} for run in (Run.open(out), straight)]
    assert same[0] == same[1]


def test_a_run_without_a_checkpoint_resumes_from_its_start(config, straight, tmp_path):
    config, out = replace(config, gold="vader", eval_every=4), tmp_path / "early"

    def interrupt(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(config, out, on_update=interrupt)
    assert latest_checkpoint(out / "checkpoints") is None
    run_training(config, out, resume=True)
    assert without_times(out / "metrics.jsonl") == without_times(straight.path / "metrics.jsonl")


def test_a_run_is_resumed_as_it_was_begun_or_not_at_all(config, straight, tmp_path):
    with pytest.raises(ConfigError, match="was begun with another gold, seed"):
        run_training(replace(config, seed=9, eval_every=4), straight.path, resume=True)
    with pytest.raises(ConfigError, match="holds no run"):
        run_training(config, tmp_path, resume=True)
    with pytest.raises(ConfigError, match="not an empty folder"):
        run_training(config, straight.path)


@pytest.fixture
def reward_module(tmp_path, monkeypatch):
    """Rewards in a module of the current folder, as a user has them."""
    (tmp_path / "my_rewards.py").write_text(
        "calls = []\n"
        "def breaks(prompts, responses):\n"
        "    calls.append(1)\n"
        "    scores = [float(len(r)) for r in responses]\n"
        "    if len(calls) == 5:  # the policy and its reference before training, then updates 1, 2, 3\n"
        "        scores[7] = float('nan')\n"
        "    return scores\n"
    )
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("my_rewards", None)


def test_a_score_that_is_not_finite_stops_the_run_and_the_last_checkpoint_stays(config, tmp_path, reward_module):
    out = tmp_path / "broken"
    with pytest.raises(RewardError, match=r"my_rewards\.breaks.*the first is nan in row 7, for the response"):
        run_training(replace(config, reward="my_rewards:breaks", checkpoint_every=1), out)
    rows = Run.open(out).metrics
    assert [row["update"] for row in rows] == [1, 2]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    checkpoint = load_checkpoint(latest_checkpoint(out / "checkpoints"))
    assert checkpoint.step == 2 and checkpoint.state["spent"]["episodes"] == 32
    policy = CausalLM.from_pretrained(checkpoint.path / "model")
    assert all(torch.isfinite(p).all() for p in policy.parameters())
    assert not (out / "summary.json").exists()


def test_what_is_wrong_before_training_leaves_no_folder(config, tmp_path):
    for wrong in (
        {"settings": {"epocs": 1}},
        {"reward": "vadr"},
        {"agent": "pppo"},
        {"agent": "sb3:DQN", "settings": {}},
    ):
        with pytest.raises(ConfigError):
            run_training(replace(config, **wrong), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"agent": "online_dpo", "env": EnvConfig(beta=0.0, max_new_tokens=8)}, "needs the environment's beta above 0"),
        ({"agent": "nlpo", "env": EnvConfig(max_new_tokens=8, top_p=0.9)}, "NLPO's mask is a top-p of its own"),
        ({"settings": {"batch_size": 16}, "env": EnvConfig(max_new_tokens=8, group_size=3)}, "not a multiple of group"),
    ],
)
def test_what_is_refused_before_the_first_row_leaves_no_folder(config, wrong, message, tmp_path):
    config = replace(config, settings={}, updates=1)
    pytest.importorskip("tensorboard")
    with pytest.raises(ConfigError, match=message):
        run_training(replace(config, log_to=("tensorboard",), **wrong), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_refused_later_leaves_its_rows(config, tmp_path):
    def refuse(row):
        raise ConfigError("no more")

    with pytest.raises(ConfigError, match="no more"):
        run_training(config, tmp_path / "run", on_update=refuse)
    assert len(Run.open(tmp_path / "run").metrics) == 1


def test_one_prompt_is_used_for_both_and_the_card_says_so(config, tmp_path):
    prompts = tmp_path / "one.txt"
    prompts.write_text("the film is\n")
    summary = run_training(replace(config, prompts=str(prompts), updates=1), tmp_path / "one")
    assert (summary["train_prompts"], summary["eval_prompts"], summary["held_out"]) == (1, 1, False)
    assert "prompts that training used too" in (tmp_path / "one/README.md").read_text()


def test_hostile_text_cannot_leave_its_place_in_the_card(config, tmp_path):
    prompts = tmp_path / "hostile.jsonl"
    prompts.write_text(json.dumps({"prompt": "the film\n# is <b>\x1b[2J"}) + "\n")
    run_training(replace(config, prompts=str(prompts), updates=1), tmp_path / "hostile")
    (line, *_) = [line for line in (tmp_path / "hostile/README.md").read_text().splitlines() if "the film" in line]
    assert line == "    prompt  the film⏎# is <b>‹U+001B›[2J"


# --- the best of its evaluations


def test_the_best_evaluation_by_score_less_kl_keeps_its_model(config, tmp_path, monkeypatch):
    measured = {  # by the number of the evaluation: before training, after updates 2, 4, 6 and 8, at the end
        1: {"score": 9.0, "kl": 0.0, "gold": 9.0},
        2: {"score": 1.0, "kl": 0.0, "gold": 1.0},  # 1.0
        3: {"score": 3.0, "kl": 1.0, "gold": 0.0},  # 2.9, for β is 0.1
        4: {"score": 3.2, "kl": 5.0, "gold": 8.0},  # 2.7, though score and gold are the highest
        5: {"score": 3.1, "kl": 2.0, "gold": 1.0},  # 2.9 again
        6: {"score": 9.0, "kl": 0.0, "gold": 9.0},
    }
    calls, weights = [], {}

    def evaluate(*args, **kwargs):
        found = real(*args, **kwargs)
        calls.append(1)
        return replace(found, metrics=found.metrics | measured[len(calls)])

    def note(row):
        newest = latest_checkpoint(tmp_path / "run/checkpoints")
        weights[row["update"]] = (newest / "model/model.safetensors").read_bytes()

    real = run.evaluate
    monkeypatch.setattr(run, "evaluate", evaluate)
    config = replace(config, gold="vader", updates=8, eval_every=2, checkpoint_every=1)
    summary = run_training(replace(config, env=EnvConfig(beta=0.1, max_new_tokens=8)), tmp_path / "run", on_update=note)
    best = Run.open(tmp_path / "run").best
    assert (summary["best_update"], summary["best_score"]) == (4, 3.0)
    kept = json.loads((best / "metrics.json").read_text())
    assert kept["objective"] == pytest.approx(2.9) and (kept["update"], kept["eval_kl"], kept["eval_gold"]) == (4, 1, 0)
    assert (best / "model/model.safetensors").read_bytes() == weights[4] != weights[8]
    CausalLM.from_pretrained(best / "model")


def test_penalties_count_too(config, tmp_path):
    env = EnvConfig(beta=0.1, max_new_tokens=8, length_penalty=0.5)
    run_training(replace(config, updates=1, eval_every=1, env=env), tmp_path / "run")
    kept = json.loads((tmp_path / "run/best/metrics.json").read_text())
    assert kept["eval_penalty"] == pytest.approx(0.5 * kept["eval_length"])
    objective = kept["eval_score"] - 0.1 * kept["eval_kl"] - kept["eval_penalty"]
    assert kept["objective"] == pytest.approx(objective)


def test_without_evaluations_on_the_way_there_is_no_best(config, tmp_path):
    summary = run_training(replace(config, updates=1), tmp_path / "run")
    assert not Run.open(tmp_path / "run").best.exists() and "best_update" not in summary


# --- agents whose policy is another than the one they train

_OTHERS = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Config:
    pass

class Chooser:
    # Trains nothing, and chooses among three.
    best_of = 3
    def __init__(self, policy, config: Config, *, seed=0):
        self.policy, self.batch_size = policy, 4
    def update(self, rollout, progress=0.0):
        return {}
    def state_dict(self):
        return {}
    def load_state_dict(self, state):
        pass

class Louder(Chooser):
    # Its policy is another than the one it was given.
    best_of = 1
    def __init__(self, policy, config: Config, *, seed=0):
        self.given, self.batch_size = policy, 4
        self.policy = self.made_of(policy)
    def made_of(self, policy):
        louder = policy.frozen_copy()
        louder.model.transformer.ln_f.weight.data *= -30.0
        return louder

class Wrapped:
    def __init__(self, policy):
        self.policy = policy
    def decoder(self, num_rows, law):
        return self.policy.decoder(num_rows, law)
    def evaluate(self, rollout):
        return self.policy.evaluate(rollout)
    def parameters(self):
        return self.policy.parameters()

class LouderStill(Louder):
    # No language model that could be saved.
    def made_of(self, policy):
        return Wrapped(super().made_of(policy))
"""


@pytest.fixture
def others(tmp_path, monkeypatch, config):
    (tmp_path / "others.py").write_text(_OTHERS)
    monkeypatch.chdir(tmp_path)
    yield lambda name, **more: replace(config, agent=f"others:{name}", settings={}, updates=2, **more)
    sys.modules.pop("others", None)


def test_a_policy_that_chooses_is_measured_as_it_chooses(others, tmp_path):
    summary = run_training(others("Chooser", eval_every=1), tmp_path / "run")
    row = Run.open(tmp_path / "run").metrics[-1]
    assert summary["kl_bound"] == row["eval_kl_bound"] == pytest.approx(math.log(3) - 2 / 3)
    assert "kl" not in summary and "eval_kl" not in row and summary["kl_before"] == pytest.approx(0, abs=1e-4)
    assert summary["score_after"] == row["eval_score"] > summary["score_before"]  # the weights are the same
    card = (tmp_path / "run/README.md").read_text()
    assert "| kl_bound | – | 0.432 |" in card
    best = json.loads((tmp_path / "run/best/metrics.json").read_text())
    assert best["objective"] == pytest.approx(best["eval_score"] - 0.1 * (math.log(3) - 2 / 3))


@pytest.mark.parametrize(("name", "saved"), [("Louder", "policy"), ("LouderStill", "given")])
def test_what_is_measured_is_the_agents_policy_and_what_is_trained_is_kept(others, config, name, saved, tmp_path):
    summary = run_training(others(name, checkpoint_every=1), tmp_path / "run")
    assert summary["kl_before"] == pytest.approx(0, abs=1e-4) and summary["kl"] > 1  # far from the one that was given
    given, model, newest = (
        load_file(f"{folder}/model.safetensors")
        for folder in (config.policy, tmp_path / "run/model", tmp_path / "run/checkpoints/step-00000002/model")
    )
    assert all(torch.equal(newest[key], given[key]) for key in given)
    assert all(torch.equal(model[key], given[key]) for key in given) == (saved == "given")


def test_metrics_are_shown_where_they_are_wanted(config, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(config, log_to=("tensorboard",), updates=3)
    with pytest.raises(ZeroDivisionError):
        run_training(config, tmp_path / "run", on_update=lambda row: 1 / (row["update"] - 3))
    run_training(config, tmp_path / "run", resume=True)
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    for name in ("score", "kl", "policy_loss"):
        shown = {event.step: event.value for event in events.Scalars(name)}
        assert shown == {row["update"]: pytest.approx(row[name]) for row in Run.open(tmp_path / "run").metrics}
