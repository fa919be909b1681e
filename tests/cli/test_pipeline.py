"""`rlhf-env pipeline`, `demo`, `inspect` and `worlds build`."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from rlhf_env.cli.pipeline import print_seeds
from rlhf_env.records.config import to_dict
from rlhf_env.records.run import Run
from rlhf_env.worlds import reviews
from tests.processes import signalled, slow_command, start
from tests.tiny_pipeline import left_in, tiny_pipeline

pytestmark = pytest.mark.xdist_group("pipeline")  # so that two of pytest's do not both run it


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """The settings of a tiny pipeline."""
    folder = tmp_path_factory.mktemp("pipeline")
    config = tiny_pipeline(folder)
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
    return folder / "pipeline.yaml"


@pytest.fixture(scope="module")
def done(file, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One whole pipeline, as a process of its own: what the user sees is what transformers and torch print too."""
    out = tmp_path_factory.mktemp("runs") / "one"
    command = [sys.executable, "-m", "rlhf_env", "pipeline", str(file), "--out", str(out)]
    return out, subprocess.run(command, capture_output=True, text=True)


def table_rows(text: str) -> dict[str, list[str]]:
    """The cells of the tables in `text`, by the first cell of their row."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    return {row[0]: row[1:] for row in rows}


def test_progress_is_plain_lines_on_stderr_and_nothing_else_is_printed(done):
    _, process = done
    assert process.returncode == 0, process.stderr
    known = re.compile(
        r"(sft|prefer|reward|train|evaluate) …|[\d,]+/[\d,]+ steps  loss .* left|updates [\d,]+/[\d,]+  update .* left"
        r"|[\d,]+/[\d,]+ responses  .* left"
    )
    assert [line for line in process.stderr.splitlines() if not known.fullmatch(line)] == []
    stages = [line.removesuffix(" …") for line in process.stderr.splitlines() if line.endswith(" …")]
    assert stages == ["sft", "prefer", "reward", "train", "evaluate"]
    for word in ("Loading weights", "Writing model", "[transformers]", "Warning", "\x1b"):
        assert word not in process.stdout + process.stderr


def test_the_result_is_shown(done):
    out, process = done
    rows, found = table_rows(process.stdout), Run(out / "evaluate").summary
    number = r"-?\d+\.\d{3} \[-?\d+\.\d{3}, -?\d+\.\d{3}\]"
    assert [name for name in rows if name in Run(out).summary["seconds_by_stage"]] == [
        *("sft", "prefer", "reward", "train", "evaluate")
    ]
    for name in ("score", "gold", "length", "eos_rate"):
        before, after = rows[name]
        assert re.fullmatch(number, before) and re.fullmatch(number, after)
        assert before.startswith(f"{found[f'reference_{name}']:.3f} [")
        assert after.startswith(f"{found[name]:.3f} [")
    assert rows["kl"][0] == "–" and rows["kl"][1].startswith(f"{found['kl']:.3f} [")
    assert f"16 responses to {found['prompts']} held-out prompts" in process.stdout
    assert f"report: {out / 'report.html'}" in process.stdout


def test_inspect_writes_the_page_anew_for_a_pipeline_and_for_a_training_run(command, done):
    out, _ = done
    page = (out / "report.html").read_text(encoding="utf-8")
    (out / "report.html").unlink()
    code, shown, _ = command("inspect", out)
    assert (code, shown) == (0, f"{out / 'report.html'}\n")
    assert (out / "report.html").read_text(encoding="utf-8") == page
    code, shown, _ = command("inspect", out / "train")
    assert (code, shown) == (0, f"{out / 'train' / 'report.html'}\n")


def test_inspect_refuses_what_has_no_page(command, done, tmp_path):
    out, _ = done
    for folder, message in [
        (tmp_path, "holds no run: there is no config.yaml in it"),
        (out / "sft", "only a training run and a whole pipeline have a report"),
    ]:
        code, shown, err = command("inspect", folder)
        assert (code, shown, err.count("\n")) == (1, "", 1) and message in err
    (tmp_path / "config.yaml").write_text("{}")
    assert "is not finished" in command("inspect", tmp_path)[2]


def test_overrides_and_seed_win_over_the_file_and_until_stops(command, file, tmp_path):
    out = tmp_path / "out"
    words = ["pipeline", file, "--out", out, "--seed", 3, "prefer.comparisons=12", "prefer.labeler.flip_rate=0.5"]
    code, shown, err = command(*words, "--until", "prefer")
    assert code == 0, err
    assert shown.startswith("12 comparisons of 2; labels agree with gold ")
    assert f"in {out / 'prefer'}; the same command without --until goes on" in shown
    config = Run(out).config
    assert config["seed"] == 3 and config["prefer"]["labeler"] == {"temperature": 0.1, "flip_rate": 0.5}
    code, shown, err = command(*words, "prefer.comparisons=13")
    assert (code, shown) == (1, "") and "prefer was begun with another comparisons" in err
    code, shown, err = command(*words)
    assert code == 0 and "held-out prompts" in shown
    assert [line for line in err.splitlines() if line.endswith(" …")] == ["reward …", "train …", "evaluate …"]


def test_seeds_are_pipelines_of_their_own_and_a_table_of_them(command, file, done, tmp_path):
    short = ["reward_model=vader", "train.updates=1"]
    code, shown, err = command("pipeline", file, "--out", tmp_path / "many", "--seeds", "0,2", *short)
    assert code == 0, err
    code, _, _ = command("pipeline", file, "--out", tmp_path / "one", "--seed", 2, *short)
    assert code == 0
    assert left_in(tmp_path / "many" / "seed-2") == left_in(tmp_path / "one")
    rows = table_rows(shown)
    after = [Run(tmp_path / "many" / f"seed-{seed}").summary["gold_after"] for seed in (0, 2)]
    assert rows["gold after"][:2] == [f"{value:.3f}" for value in after]
    # Two values have the standard error |a − b| / 2, and Student's t with one degree of freedom is 12.706.
    mean, half = sum(after) / 2, 12.706205 * abs(after[0] - after[1]) / 2
    low, high = re.fullmatch(rf"{mean:.3f} \[(.+), (.+)\]", rows["gold after"][2]).groups()
    assert float(low) == pytest.approx(mean - half, abs=1e-3) and float(high) == pytest.approx(mean + half, abs=1e-3)
    assert err.splitlines()[0] == "seed 0" and (tmp_path / "many" / "seed-0" / "report.html").is_file()


def test_a_table_of_seeds_has_means_with_students_t(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    print_seeds({s: {"gold_before": 0.1 * s, "gold_after": 0.1 + 0.2 * s, "kl": 2.0} for s in (0, 1, 2)})
    rows = table_rows(capsys.readouterr().out)
    # 0.1, 0.3, 0.5: mean 0.3, standard error 0.2 / √3 = 0.11547, t with two degrees of freedom 4.302653 → ± 0.49683
    assert rows == {
        "gold before": ["0.000", "0.100", "0.200", "0.100 [-0.148, 0.348]"],
        "gold after": ["0.100", "0.300", "0.500", "0.300 [-0.197, 0.797]"],
        "KL": ["2.000", "2.000", "2.000", "2.000 [2.000, 2.000]"],
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.yaml", "--out", "x"], "none.yaml: No such file"),
        (["FILE"], "--out is missing: the folder to leave the pipeline in"),
        (["FILE", "--out", "x", "sfft.epochs=1"], "the command line: there is no setting sfft"),
        (
            ["FILE", "--out", "x", "sft.epochs=1"],
            "the pipeline's settings: there is no setting sft.epochs; did you mean ",
        ),
        (["FILE", "--out", "x", "train.policy=p"], "train.policy is what the pipeline connects its stages by"),
        (["FILE", "--out", "x", "--until", "rewrd"], "there is no stage 'rewrd' to stop after"),
        (["FILE", "--out", "x", "--until", "sft", "--seeds", "0,1"], "--until stops a single pipeline"),
        (["FILE", "--out", "x", "--seeds", "1-0"], "seeds '1-0'"),
        (["FILE", "--out", "x", "gold=vadr"], "unknown reward model 'vadr'"),
        (["FILE", "--out", "x", "demonstrations=none.txt"], "none.txt: No such file"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(command, file, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = command("pipeline", *[file if word == "FILE" else word for word in words])
    assert (code, out, err.count("\n")) == (1, "", 1), err
    assert err.startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_is_exit_code_130_and_says_how_to_go_on(command, file, monkeypatch, tmp_path):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf_env.training.pipeline.run_prefer", interrupt)
    code, _, err = command("pipeline", file, "--out", tmp_path / "out")
    assert code == 130 and err.splitlines()[-1] == "interrupted; the same command continues it"
    monkeypatch.undo()


def test_sigterm_while_it_trains_keeps_the_update_and_the_same_command_goes_on(command, file, done, tmp_path):
    out, marker, err = tmp_path / "out", tmp_path / "begun", tmp_path / "err"
    words = ["pipeline", str(file), "--out", str(out)]
    process = start(slow_command, ("rlhf_env.agents.ppo", "PPO.update", 3), 0.3, marker, *words, err=err)
    code, took, told = signalled(process, marker, err, signal.SIGTERM)
    assert code == 143 and took < 5 and told.splitlines()[-1] == "interrupted; the same command continues it"
    assert len(Run(out / "train").metrics) == 3 and (out / "train/checkpoints/step-00000003").is_dir()
    code, _, told = command(*words)
    assert code == 0, told
    ours, theirs = left_in(out), left_in(done[0])
    assert [name for name in theirs if "/checkpoints/" not in name and ours[name] != theirs[name]] == []


@pytest.fixture
def small_demo(monkeypatch, tmp_path):
    tiny = tiny_pipeline(tmp_path)
    monkeypatch.setattr(reviews, "pipeline_config", lambda seed=0: replace(tiny, seed=seed))


def test_demo_runs_the_pipeline_of_the_reviews(command, small_demo, tmp_path):
    code, shown, err = command("demo", "--out", tmp_path / "demo", "--seed", 1)
    assert code == 0, err
    assert "held-out prompts" in shown and f"report: {tmp_path / 'demo' / 'report.html'}" in shown
    assert Run(tmp_path / "demo").summary["seed"] == 1
    code, again, err = command("demo", "--out", tmp_path / "demo", "--seed", 1)
    assert (code, again, err) == (0, shown, "")  # nothing is done twice


def test_a_world_is_built_where_it_is_wanted(command, small_demo, tmp_path):
    code, shown, err = command("worlds", "build", "reviews", "--out", tmp_path / "built")
    assert (code, shown) == (0, f"{tmp_path / 'built'}\n")
    assert [line for line in err.splitlines() if line.endswith(" …")] == ["sft …", "prefer …", "reward …"]
    assert {path.name for path in (tmp_path / "built").iterdir()} == {"reference", "proxy"}
    code, shown, err = command("worlds", "build", "enumerable", "--out", tmp_path / "other")
    assert (code, shown) == (1, "") and "nothing to build for a world 'enumerable'" in err


@pytest.mark.slow
def test_the_demo_makes_policies_that_like_films(tmp_path):
    """The front door, as it stands: PPO raises the true reward, which it never sees, and the language stays."""
    subprocess.run([sys.executable, "-m", "rlhf_env", "demo", "--out", str(tmp_path / "demo")], check=True)
    summary = Run(tmp_path / "demo").summary
    assert summary["gold_after_low"] > summary["gold_before_high"] + 0.1
    assert summary["proxy_after_low"] > summary["proxy_before_high"] + 0.5
    assert summary["reward_model_accuracy_low"] > 0.6
    assert 0 < summary["kl"] < 20 and summary["eos_rate"] > 0.9
    assert (tmp_path / "demo" / "report.html").stat().st_size > 20_000
