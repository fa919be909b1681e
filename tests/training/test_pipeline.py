"""The whole pipeline: its stages and what connects them, what stops it early, and that a kill changes nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_env.errors import ConfigError, DataError, RLHFEnvError
from rlhf_env.records.config import to_dict
from rlhf_env.records.run import Run
from rlhf_env.text.corpus import film_reviews
from rlhf_env.training.config import EnvConfig, PipelineConfig
from rlhf_env.training.pipeline import plan, run_pipeline
from tests.tiny_files import write_rows
from tests.tiny_pipeline import left_in, tiny_pipeline

STAGES = ["sft", "prefer", "reward", "train", "evaluate"]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> PipelineConfig:
    return tiny_pipeline(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory) -> Run:
    """The pipeline without interruption."""
    out = tmp_path_factory.mktemp("pipelines") / "straight"
    run_pipeline(config, out)
    return Run.open(out)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prompts_in(path: Path) -> list[str]:
    return [row["prompt"] for row in rows_of(path)]


# --- the plan

GIVEN = {"demonstrations": "d.txt", "gold": "vader"}


@pytest.mark.parametrize(
    ("given", "stages"),
    [
        (GIVEN, STAGES),
        (GIVEN | {"policy": "p"}, STAGES),
        ({"policy": "p", "prompts": "x.txt", "gold": "vader"}, STAGES[1:]),
        (GIVEN | {"comparisons": "c.jsonl"}, ["sft", "reward", "train", "evaluate"]),
        ({"demonstrations": "d.txt", "comparisons": "c.jsonl"}, ["sft", "reward", "train", "evaluate"]),
        ({"demonstrations": "d.txt", "reward_model": "vader"}, ["sft", "train", "evaluate"]),
        ({"policy": "p", "prompts": "x.txt", "reward_model": "vader"}, ["train", "evaluate"]),
    ],
)
def test_a_stage_whose_result_is_given_is_left_out(given, stages):
    assert [stage.name for stage in plan(PipelineConfig(**given), Path("out"))] == stages


def test_each_stage_gets_what_the_one_before_it_left():
    stages = {s.name: s.config for s in plan(PipelineConfig(**GIVEN, policy="p"), Path("out"))}
    sft, prefer, reward, train, evaluate = stages.values()
    assert (sft.demonstrations, sft.policy) == ("d.txt", "p")
    assert (prefer.policy, prefer.prompts, prefer.gold) == ("out/sft/model", "out/prompts/train.jsonl", "vader")
    assert (reward.comparisons, reward.body) == ("out/prefer/comparisons.jsonl", "out/sft/model")
    assert (reward.reference, reward.prompts, reward.gold) == ("out/sft/model", "out/prompts/train.jsonl", "vader")
    assert (train.policy, train.reference) == ("out/sft/model", None)  # none: the policy as it starts
    assert (train.prompts, train.eval_prompts) == ("out/prompts/train.jsonl", "out/prompts/eval.jsonl")
    assert (train.reward, train.gold) == ("out/reward/model", "vader")
    assert (evaluate.policy, evaluate.reference) == ("out/train/model", "out/sft/model")
    assert (evaluate.prompts, evaluate.reward, evaluate.gold) == ("out/prompts/eval.jsonl", "out/reward/model", "vader")


def test_what_is_given_takes_the_place_of_what_would_have_been_made():
    config = PipelineConfig(policy="p", prompts="x.txt", comparisons="c.jsonl")
    reward, train, evaluate = (stage.config for stage in plan(config, Path("out")))
    assert (reward.comparisons, reward.body, reward.reference) == ("c.jsonl", "p", "p")
    assert (train.policy, evaluate.reference, evaluate.policy) == ("p", "p", "out/train/model")
    assert (reward.gold, train.gold, evaluate.gold) == (None, None, None)
    train, evaluate = (s.config for s in plan(replace(config, reward_model="module:score"), Path("out")))
    assert (train.reward, evaluate.reward) == ("module:score", "module:score")


def test_settings_of_a_stage_win_over_shared_ones_and_shared_ones_over_defaults():
    config = PipelineConfig(
        **GIVEN,
        seed=7,
        num_envs=5,
        dtype="float64",
        env=EnvConfig(beta=0.2, max_new_tokens=9, chat_template="none"),
        prefer={"seed": 8, "env": {"temperature": 1.5}, "labeler": {"flip_rate": 0.1}},
        train={"num_envs": 3, "tokens": 100},
        evaluate={"best_of": 2},
    )
    sft, prefer, reward, train, evaluate = (stage.config for stage in plan(config, Path("out")))
    assert [c.seed for c in (sft, prefer, reward, train)] == [7, 8, 7, 7]
    assert evaluate.seed not in (7, 8)  # other random numbers than training met
    assert [c.num_envs for c in (prefer, reward, train, evaluate)] == [5, 5, 3, 5]
    assert {c.dtype for c in (sft, prefer, reward, train, evaluate)} == {"float64"}
    assert sft.chat_template == "none"  # the same as in the environment
    assert prefer.env == replace(config.env, temperature=1.5)
    assert {c.env for c in (reward, train, evaluate)} == {config.env}
    assert (prefer.labeler.flip_rate, train.budget, evaluate.best_of) == (0.1, {"tokens": 100}, 2)


@pytest.mark.parametrize(
    "key",
    [
        *("sft.demonstrations", "sft.policy", "prefer.policy", "prefer.prompts", "prefer.gold"),
        *("reward.comparisons", "reward.reference", "reward.prompts", "reward.gold"),
        *("train.policy", "train.reference", "train.prompts", "train.eval_prompts", "train.reward", "train.gold"),
        *("evaluate.policy", "evaluate.reference", "evaluate.prompts", "evaluate.reward", "evaluate.gold"),
    ],
)
def test_what_the_pipeline_connects_cannot_be_set_in_a_section(key):
    section, name = key.split(".")
    with pytest.raises(ConfigError, match=f"{key} is what the pipeline connects its stages by: leave it out"):
        plan(PipelineConfig(**GIVEN, **{section: {name: "x"}}), Path("out"))


@pytest.mark.parametrize(
    ("section", "given", "message"),
    [
        ("sft", {"fit": {"epocs": 1}}, "there is no setting sft.fit.epocs; did you mean sft.fit.epochs?"),
        ("prefer", {"comparison": 1}, "there is no setting prefer.comparison; did you mean prefer.comparisons?"),
        ("reward", {"learning_rate": 1}, "there is no setting reward.learning_rate; did you mean reward.fit.learn"),
        ("train", {"update": 1}, "there is no setting train.update; did you mean train.updates?"),
        ("evaluate", {"best_off": 1}, "there is no setting evaluate.best_off; did you mean evaluate.best_of?"),
        ("train", {"updates": "many"}, "train.updates must be a whole number or none, it is 'many'"),
        ("prefer", {"labeler": {"flip_rate": 2}}, "flip_rate must be between 0 and 1, it is 2"),
        ("train", {"tokens": 1, "updates": 1}, "a run has one budget, but tokens and updates are given"),
    ],
)
def test_a_mistake_in_a_section_is_named(section, given, message):
    with pytest.raises(ConfigError) as caught:
        plan(PipelineConfig(**GIVEN, **{section: given}), Path("out"))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gold": "vader", "prompts": "builtin:reviews"}, "needs a policy, or demonstrations to fine-tune one on"),
        ({"demonstrations": "builtin:reviews"}, r"comparisons \(a file\), gold .* or reward_model"),
        ({"policy": "p", "gold": "vader"}, "needs prompts, or demonstrations to take them from"),
    ],
)
def test_a_pipeline_without_a_beginning_says_what_is_missing(given, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run_pipeline(PipelineConfig(**given), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_with_a_judge_nobody_needs_to_know_gold():
    given = PipelineConfig(policy="p", prompts="builtin:reviews", prefer={"judge": {"model": "m"}})
    prefer, reward = (stage.config for stage in plan(given, Path("out"))[:2])
    assert (prefer.gold, prefer.judge.model, reward.gold) == (None, "m", None)
    with pytest.raises(ConfigError, match="the setting gold is missing: a simulated labeler"):
        plan(replace(given, prefer={"labelers": [{}]}), Path("out"))


# --- bad input


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"demonstrations": "bad.jsonl"}, DataError, r"bad\.jsonl:2"),
        ({"demonstrations": "none.txt"}, DataError, r"none\.txt: No such file"),
        ({"prompts": "bad.jsonl"}, DataError, r"bad\.jsonl:2"),
        ({"prompts": "builtin:review"}, DataError, "builtin:review"),
        ({"eval_prompts": "bad.jsonl"}, DataError, r"bad\.jsonl:2"),
        ({"comparisons": "bad.jsonl"}, DataError, r"bad\.jsonl:2"),
        ({"comparisons": "same.jsonl"}, DataError, r"same\.jsonl: at least two comparisons of responses that differ"),
        ({"gold": "vadr"}, ConfigError, "unknown reward model 'vadr'. Did you mean 'vader'"),
        ({"reward_model": "nowhere:score"}, ConfigError, "cannot import 'nowhere'"),
        ({"policy": "./nowhere"}, ConfigError, "there is no folder ./nowhere"),
        ({"device": "abacus"}, ConfigError, "device 'abacus' cannot be used"),
        ({"env": EnvConfig(max_new_tokens=6, chat_template="none.jinja")}, ConfigError, "chat_template must be"),
        ({"env": EnvConfig(max_new_tokens=100)}, RLHFEnvError, "exceed the model's context of 32"),
        ({"prompts": "long.txt"}, RLHFEnvError, r"long\.txt: .* exceed the model's context of 32"),
        ({"sft": {"new": {"tokenizer": "word", "n_positions": 4}}}, DataError, "do not fit the context of 4"),
        ({"sft": {"epochs": 2}}, ConfigError, "sft.epochs"),
        ({"prefer": {"biases": {"lenght": 1}}}, ConfigError, "'lenght' is no bias"),
        ({"prefer": {"labelers": [{"gold": "vadr"}]}}, ConfigError, "Did you mean 'vader'"),
        ({"prefer": {"judge": {"model": "./nowhere"}}}, ConfigError, "there is no folder ./nowhere"),
        ({"prefer": {"judge": {"by": "log_odds"}}}, ConfigError, "a judge needs a model"),
        ({"reward": {"kind": "ratings"}}, ConfigError, "ratings learns from files of its own"),
        ({"train": {"agent": "pppo"}}, ConfigError, "unknown agent 'pppo'; did you mean 'ppo'"),
        ({"train": {"agent": "sb3:DQN"}}, ConfigError, "DQN"),
        ({"train": {"settings": {"epocs": 2}}}, ConfigError, "epocs.*did you mean .*epochs"),
        ({"train": {"settings": {"learning_rate": -1}}}, ConfigError, "learning_rate"),
        ({"evaluate": {"text": "none.txt"}}, DataError, r"none\.txt: No such file"),
    ],
)
def test_what_is_wrong_shows_before_anything_is_written(config, wrong, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "bad.jsonl", {"prompt": "a", "response": "b"}, '{"prompt": "a", "respon')
    write_rows(tmp_path / "same.jsonl", *[{"prompt": "a", "chosen": "b", "rejected": r} for r in "bbc"])
    (tmp_path / "long.txt").write_text("the film is\n" + "the " * 40 + "\n")
    with pytest.raises(error, match=message):
        run_pipeline(replace(config, **wrong), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_else_is_left_alone(config, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="exists and is not an empty folder"):
        run_pipeline(config, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


# --- a whole pipeline


def test_the_summary_says_what_the_stages_say(straight):
    summary, said = straight.summary, {name: Run(straight.path / name).summary for name in STAGES}
    for name, stage, source in [
        ("gold_before", "evaluate", "reference_gold"),
        ("gold_after", "evaluate", "gold"),
        ("proxy_before", "evaluate", "reference_score"),
        ("proxy_after", "evaluate", "score"),
        ("kl", "evaluate", "kl"),
        ("win_rate", "evaluate", "win_rate"),
        ("length_before", "evaluate", "reference_length"),
        ("length_after", "evaluate", "length"),
        ("eos_rate_before", "evaluate", "reference_eos_rate"),
        ("eos_rate", "evaluate", "eos_rate"),
        ("reward_model_accuracy", "reward", "accuracy"),
        ("reward_model_gold_accuracy", "reward", "gold_accuracy"),
        ("label_agreement", "reward", "label_agreement"),
    ]:
        for end in ("", "_low", "_high"):
            assert summary[name + end] == said[stage][source + end], name + end
        assert summary[f"{name}_low"] <= summary[name] <= summary[f"{name}_high"], name
    for name in ("updates", "episodes", "tokens", "tokens_per_second", "beta", "agent"):
        assert summary[name] == said["train"][name]
    assert list(summary["seconds_by_stage"]) == STAGES
    assert summary["seconds"] == pytest.approx(sum(said[name]["seconds"] for name in STAGES))
    assert summary["seed"] == 0


def test_the_summary_is_about_the_samples_that_are_there(straight):
    rows = rows_of(straight.path / "evaluate" / "samples.jsonl")
    assert len(rows) == 16
    for name, key in [
        ("gold_before", "reference_gold"),
        ("gold_after", "gold"),
        ("proxy_before", "reference_score"),
        ("proxy_after", "score"),
        ("kl", "kl"),
    ]:
        mean = sum(row[key] for row in rows) / 16
        assert straight.summary[name] == pytest.approx(mean, abs=1e-6)


def test_a_pipeline_leaves_a_page(straight):
    page = (straight.path / "report.html").read_text(encoding="utf-8")
    for word in ("Calibration of the reward model", "Score for KL", "best of 4", "Fine-tuning"):
        assert word in page
    assert straight.summary["kl"] > 0.01  # the policy that was evaluated is another than the reference


def test_prompts_to_evaluate_on_are_met_in_no_stage_before(straight):
    train, held_out = (prompts_in(straight.path / "prompts" / f"{name}.jsonl") for name in ("train", "eval"))
    openings = dict.fromkeys(" ".join(text.split()[:4]) for text in film_reviews()[:200])
    assert sorted(train + held_out) == sorted(openings) and len(held_out) == len(openings) // 4
    compared = prompts_in(straight.path / "prefer" / "comparisons.jsonl")
    assert len(compared) == 40 and set(compared) <= set(train)
    assert set(prompts_in(straight.path / "evaluate" / "samples.jsonl")) <= set(held_out)
    assert set(prompts_in(straight.path / "train" / "samples.jsonl")) <= set(held_out)


def test_prompts_of_demonstrations_are_used_and_given_ones_go_first(config, tmp_path):
    rows = [{"prompt": f"the {noun} is", "response": f" {how}."} for noun in ("film", "plot") for how in "ab"]
    pairs = write_rows(tmp_path / "pairs.jsonl", *rows)
    short = replace(config, demonstrations=pairs, reward_model="vader", sft=config.sft | {"held_out": 0.25})
    run_pipeline(short, tmp_path / "one", until="sft")
    used = [prompts_in(tmp_path / "one" / "prompts" / f"{name}.jsonl") for name in ("train", "eval")]
    assert sorted(map(tuple, used)) == [("the film is",), ("the plot is",)]
    texts = tmp_path / "prompts.txt"
    texts.write_text("the film\nthe plot\n")
    given = replace(short, prompts=str(texts), eval_prompts=str(texts))
    run_pipeline(given, tmp_path / "two", until="sft")
    used = [prompts_in(tmp_path / "two" / "prompts" / f"{name}.jsonl") for name in ("train", "eval")]
    assert used == [["the film", "the plot"]] * 2


def test_the_same_seed_gives_the_same_bits_in_another_folder_and_another_seed_does_not(config, straight, tmp_path):
    run_pipeline(config, tmp_path / "again")
    assert left_in(tmp_path / "again") == left_in(straight.path)
    run_pipeline(replace(config, seed=1), tmp_path / "other", until="prefer")
    other, ours = left_in(tmp_path / "other"), left_in(straight.path)
    for file in ("prompts/eval.jsonl", "sft/model/model.safetensors", "prefer/comparisons.jsonl"):
        assert other[file] != ours[file]


def test_a_finished_pipeline_is_not_done_again(config, straight):
    def times() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for name in STAGES for path in (straight.path / name).rglob("*")}

    before, summary = times(), straight.summary
    assert run_pipeline(config, straight.path) == summary
    assert times() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"updates": 5}}, "train was begun with another .*updates.* delete \\S*/train \\S*/evaluate$"),
        ({"evaluate": {"episodes": 5}}, "evaluate was begun with another episodes.* delete \\S*/evaluate$"),
        ({"sft": {}}, "sft was begun .* delete \\S*/sft \\S*/prefer \\S*/reward \\S*/train \\S*/evaluate$"),
        ({"reward_model": "vader"}, "holds prefer, which these settings leave out"),
        ({"seed": 5}, "sft was begun with another seed"),
        ({"eval_share": 0.5}, "used other prompts than those of these settings"),
    ],
)
def test_what_a_stage_was_done_with_cannot_change(config, straight, change, message):
    before = left_in(straight.path)
    with pytest.raises(ConfigError, match=message):
        run_pipeline(replace(config, **change), straight.path)
    assert left_in(straight.path) == before


def test_a_stage_that_is_done_again_takes_with_it_what_was_made_from_it(config, straight, tmp_path):
    out = shutil.copytree(straight.path, tmp_path / "moved")
    assert run_pipeline(config, out)["gold_after"] == straight.summary["gold_after"]  # it may stand elsewhere
    shutil.rmtree(out / "reward")
    with pytest.raises(ConfigError, match=r"train was made from another reward; to go on, delete \S*/train \S*/eval"):
        run_pipeline(config, out)
    for stage in ("train", "evaluate"):
        shutil.rmtree(out / stage)
    run_pipeline(config, out, until="reward")
    assert not (out / "summary.json").exists() and not (out / "report.html").exists()  # they were of other stages
    run_pipeline(config, out)
    assert run_pipeline(config, out)["gold_after"] == straight.summary["gold_after"]


def test_a_folder_of_another_run_is_left_alone(config, straight):
    with pytest.raises(ConfigError, match="holds another run, not a pipeline: choose another folder"):
        run_pipeline(config, straight.path / "train")


def test_a_pipeline_leaves_a_card(straight):
    card = (straight.path / "README.md").read_text(encoding="utf-8")
    summary = straight.summary
    for name, before, after in [("gold", "gold_before", "gold_after"), ("score", "proxy_before", "proxy_after")]:
        assert re.search(rf"^\| {name} \| {summary[before]:.3f} \[.+\] \| {summary[after]:.3f} \[.+\] \|$", card, re.M)
    assert all(f"`{name}/`" in card for name in STAGES)


def test_results_of_stages_that_are_made_anew_do_not_stay(config, straight, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(straight.path, out)
    shutil.rmtree(out / "evaluate")

    def killed(name, stage):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_pipeline(config, out, watch=killed)
    assert not Run(out).finished and not (out / "report.html").exists()


def test_evaluation_is_under_the_law_that_training_was(config, tmp_path):
    stages = {s.name: s.config for s in plan(replace(config, train={**config.train, "env": {"beta": 5.0}}), tmp_path)}
    assert stages["evaluate"].env == stages["train"].env and stages["evaluate"].env.beta == 5.0
    assert stages["prefer"].env.beta == config.env.beta


def test_what_no_stage_has_used_yet_can_change(config, straight, tmp_path):
    """So a mistake in a later stage's settings does not cost the stages before it."""
    out = tmp_path / "out"
    wrong = replace(config, train=config.train | {"updates": 7}, evaluate={"episodes": 3})
    run_pipeline(wrong, out, until="reward")
    run_pipeline(config, out)
    assert left_in(out) == left_in(straight.path)


def test_until_stops_after_a_stage_and_the_same_pipeline_goes_on(config, straight, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="there is no stage 'rewrd' to stop after; this pipeline has sft, prefer, re"):
        run_pipeline(config, out, until="rewrd")
    summary = run_pipeline(config, out, until="reward")
    assert summary == Run(out / "reward").summary
    assert sorted(path.name for path in out.iterdir()) == ["config.yaml", "prefer", "prompts", "reward", "sft"]
    assert run_pipeline(config, out, until="evaluate")["gold_after"] == straight.summary["gold_after"]
    assert left_in(out) == left_in(straight.path)


def test_stages_can_be_given_as_files_of_another_pipeline(config, straight, tmp_path):
    """The same inputs by other ways come to the same."""
    ours, out = straight.path, tmp_path / "out"
    given = replace(
        config,
        demonstrations=None,
        policy=str(ours / "sft" / "model"),
        prompts=str(ours / "prompts" / "train.jsonl"),
        eval_prompts=str(ours / "prompts" / "eval.jsonl"),
        comparisons=str(ours / "prefer" / "comparisons.jsonl"),
    )
    summary = run_pipeline(given, out)
    assert not (out / "sft").exists() and not (out / "prefer").exists()
    for file in ("reward/model/model.safetensors", "train/model/model.safetensors", "evaluate/samples.jsonl"):
        assert (out / file).read_bytes() == (ours / file).read_bytes()
    for name in ("gold_before", "gold_after", "reward_model_accuracy", "kl"):
        assert summary[name] == straight.summary[name]


def test_a_reward_model_can_be_given_and_a_stage_its_own_beta(config, tmp_path):
    train = config.train | {"updates": 1, "env": {"beta": 0.25}}
    summary = run_pipeline(replace(config, reward_model="vader", train=train), tmp_path / "out")
    assert summary["beta"] == 0.25  # that which was trained with
    assert list(summary["seconds_by_stage"]) == ["sft", "train", "evaluate"]
    assert "reward_model_accuracy" not in summary and "label_agreement" not in summary
    assert summary["gold_after"] == pytest.approx(summary["proxy_after"], abs=1e-6)  # here it is the gold


def test_without_gold_nothing_is_said_of_it(config, straight, tmp_path):
    comparisons = str(straight.path / "prefer" / "comparisons.jsonl")
    summary = run_pipeline(replace(config, gold=None, comparisons=comparisons), tmp_path / "out")
    assert not any("gold" in name or "agreement" in name for name in summary)
    assert summary["reward_model_accuracy"] == straight.summary["reward_model_accuracy"]


def test_prompts_that_changed_meanwhile_are_refused(config, tmp_path):
    texts = tmp_path / "reviews.txt"
    shutil.copy(config.demonstrations, texts)
    changing = replace(config, demonstrations=str(texts))
    run_pipeline(changing, tmp_path / "out", until="sft")
    texts.write_text("\n".join(f"{word} it was a film" for word in "abcdefghij") + "\n")
    before = left_in(tmp_path / "out")
    with pytest.raises(ConfigError, match="sft used other prompts than those of these settings"):
        run_pipeline(changing, tmp_path / "out", until="prefer")
    assert left_in(tmp_path / "out") == before


# --- interruptions


class Killed(BaseException):
    """What no code catches."""


def test_interrupted_in_every_stage_it_becomes_the_pipeline_that_was_not(config, straight, tmp_path, monkeypatch):
    """Each stage is stopped midway and, begun again, before its summary; one pipeline survives all of it."""
    out, shown = tmp_path / "out", []
    calls = {"sft": 3, "prefer": 2, "reward": 2, "train": 3, "evaluate": 2}  # of the progress, when it is stopped

    def watch(stop: str | None):
        @contextmanager
        def watching(name, config):
            count = 0

            def show(*args):
                nonlocal count
                count += 1
                shown.append((name, args[0].get("update") if isinstance(args[0], dict) else None))
                if name == stop and count == calls[name]:
                    raise Killed

            yield show

        return watching

    write_summary = Run.write_summary

    def stop_before_the_summary(of: str) -> None:
        def write(run: Run, summary) -> None:
            if run.path.name == of:
                raise Killed
            write_summary(run, summary)

        monkeypatch.setattr(Run, "write_summary", write)

    for stage in STAGES:
        if stage != "sft":  # killed before it wrote its settings
            (out / stage).mkdir()
            (out / stage / "half").write_text("of something")
        with pytest.raises(Killed):
            run_pipeline(config, out, watch=watch(stage))
        assert not Run(out / stage).finished
        stop_before_the_summary(stage)
        shown.clear()
        with pytest.raises(Killed):
            run_pipeline(config, out, watch=watch(None))
        assert {name for name, _ in shown} == {stage}  # those before it are not done again
        if stage == "train":
            assert shown == [("train", 3), ("train", 4)]  # from the checkpoint of update 2
        assert not Run(out / stage).finished
        monkeypatch.setattr(Run, "write_summary", write_summary)
    stop_before_the_summary("out")
    with pytest.raises(Killed):
        run_pipeline(config, out)
    monkeypatch.setattr(Run, "write_summary", write_summary)
    monkeypatch.setattr("rlhf_env.training.pipeline.write_report", lambda out: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_pipeline(config, out)
    monkeypatch.undo()
    run_pipeline(config, out)
    assert left_in(out) == left_in(straight.path)
    assert (out / "report.html").is_file()


def test_an_agent_that_cannot_resume_begins_its_stage_anew(config, tmp_path):
    settings = {"n_steps": 8, "batch_size": 32, "n_epochs": 1}
    train = {"agent": "sb3:PPO", "updates": 2, "eval_episodes": 4, "num_envs": 4, "settings": settings}
    config, out = replace(config, reward_model="vader", train=train), tmp_path / "out"

    @contextmanager
    def stopping(name, config):
        def show(row):
            if name == "train":
                raise Killed

        yield show

    with pytest.raises(Killed):
        run_pipeline(config, out, watch=stopping)
    assert (out / "train" / "config.yaml").is_file()
    run_pipeline(config, out)
    straight = run_pipeline(config, tmp_path / "straight")
    assert straight["agent"] == "sb3:PPO" and left_in(out) == left_in(tmp_path / "straight")


@pytest.mark.slow
def test_killed_in_every_stage_it_becomes_the_pipeline_that_was_not(tmp_path):
    """The same with processes and kill -9, once while each stage is under way."""
    config = replace(
        tiny_pipeline(tmp_path),
        sft={"new": {"tokenizer": "word", "n_positions": 32}, "fit": {"epochs": 40, "batch_size": 32}},
        prefer={"comparisons": 3000},
        reward={"normalize_on": 256, "fit": {"epochs": 3}},
        train={"updates": 40, "checkpoint_every": 7, "eval_episodes": 64, "settings": {"batch_size": 128}},
        evaluate={"episodes": 1024, "best_of": 128},
    )
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "rlhf_env", "pipeline", str(file), "--out", str(out)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def under_way(out: Path, stage: str) -> bool:
        if stage == "train":  # some rows after a checkpoint
            rows = out / "train" / "metrics.jsonl"
            return rows.is_file() and rows.read_bytes().count(b"\n") >= 10
        if stage == "evaluate":  # its folder comes at its end
            return Run(out / "train").finished
        return (out / stage / "config.yaml").is_file()

    out = tmp_path / "out"
    for stage in STAGES:
        process = start(out)
        while process.poll() is None and not under_way(out, stage):
            time.sleep(0.005)
        time.sleep(0.3)
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, err.decode()
        assert not Run(out / stage).finished, f"{stage} was over before the kill: make it longer"
    for folder in (out, tmp_path / "straight"):
        process = start(folder)
        _, err = process.communicate()
        assert process.returncode == 0, err.decode()
    assert left_in(out) == left_in(tmp_path / "straight")
