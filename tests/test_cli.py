"""The commands, as they are typed."""

import itertools
import json
import subprocess
import sys

import pytest

from rlhf_env.cli import inform
from rlhf_env.cli.show import clock, response_progress, step_progress, training_progress
from rlhf_env.lab.grid import GridConfig
from rlhf_env.records.config import documented
from rlhf_env.training.config import (
    EvaluateConfig,
    FineTuneConfig,
    GenerateConfig,
    OnlineConfig,
    PipelineConfig,
    PreferConfig,
    ReviseConfig,
    RewardConfig,
    RewardEvalConfig,
    TrainConfig,
)
from tests.tiny_files import write_tiny_files


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_files(tmp_path_factory.mktemp("tiny"))


COMMANDS = {
    "demo": None,
    "pipeline": PipelineConfig,
    "online": OnlineConfig,
    "sft": FineTuneConfig,
    "prefer": PreferConfig,
    "revise": ReviseConfig,
    "reward": RewardConfig,
    "reward-eval": RewardEvalConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "grid": GridConfig,
    "inspect": None,
    "serve-reward": None,
    "preferences": None,
    "preferences stats": None,
    "preferences convert": None,
    "preferences split": None,
    "worlds build": None,
    "agents": None,
    "doctor": None,
}


def test_what_needs_no_model_loads_no_heavy_library():
    lines = [f"{name} --help" for name in COMMANDS] + ["--help", "agents", "worlds", "train --out x x=1"]
    code = (
        "import sys; from rlhf_env.cli import main\n"
        "for line in sys.argv[1:]:\n"
        "    sys.argv = ['rlhf-env', *line.split()]\n"
        "    try: main()\n"
        "    except SystemExit: print(line, {'torch', 'transformers', 'stable_baselines3'} & set(sys.modules), "
        "file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *lines], capture_output=True, text=True)
    assert [line for line in done.stderr.splitlines() if "set()" in line] == [f"{line} set()" for line in lines]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_every_setting(command, name):
    code, out, _ = command(*name.split(), "--help")
    assert code == 0 and f"Usage: rlhf-env {name}" in out
    words = "".join(out.split())  # however the lines are broken
    for key, sentence in {} if COMMANDS[name] is None else documented(COMMANDS[name]).items():
        assert sentence, key
        assert "".join(f"{sentence[:1].upper()}{sentence[1:]}.".split()) in words, key


def test_help_names_flags_and_settings_without_one(command):
    _, out, _ = command("train", "--help")
    for word in ("--policy", "--target-kl", "--resume", "env.missing_eos_penalty: Subtracted from the score"):
        assert word in out
    _, out, _ = command("prefer", "--help")
    for word in ("--gold", "--flip-rate", "--responses", "env.temperature: Divides the logits"):
        assert word in out


def test_every_command_is_in_the_list(command):
    _, out, _ = command("--help")
    commands = out.partition("Commands:")[2].splitlines()
    listed = {
        words[0]
        for line in commands
        if line.startswith("  ") and not line.startswith("   ")
        for words in [line.split()]
    }
    assert listed == {name.split()[0] for name in COMMANDS}


def test_train_evaluate_generate(command, tiny, tmp_path):
    out = tmp_path / "run"
    common = ["--prompts", tiny / "prompts.txt", "--max-new-tokens", 6]
    code, shown, err = command(
        "train", "--policy", tiny / "policy", *common, "--reward", "vader", "--updates", 2, "--out", out,
        "--beta", "0.2", "eval_episodes=8", "settings.batch_size=8", "settings.learning_rate=1e-3", "env.beta=0.1",
    )  # fmt: skip
    assert code == 0, err
    assert "8 responses to held-out prompts" in shown and "score" in shown and str(out / "model") in shown
    assert "updates 2/2" in err and "tok/s" in err
    assert "beta: 0.1" in (out / "config.yaml").read_text()  # an override wins over its flag

    code, shown, err = command(
        "evaluate", "--policy", out / "model", "--reference", tiny / "policy", *common, "--reward", "vader",
        "--episodes", 10, "--out", tmp_path / "eval", "--gold", "vader",
    )  # fmt: skip
    assert code == 0, err
    assert "10 responses" in shown and "win_rate" in shown
    summary = json.loads((tmp_path / "eval/summary.json").read_text())
    samples = [json.loads(line) for line in (tmp_path / "eval/samples.jsonl").read_text().splitlines()]
    assert len(samples) == 10
    mean = pytest.approx(sum(row["score"] for row in samples) / 10, abs=1e-6)
    assert summary["score"] == mean and summary["gold"] == mean

    code, shown, err = command("generate", "--policy", out / "model", *common, "--seed", 3)
    assert code == 0, err
    assert len(shown.splitlines()) == 79 and shown.startswith("the film is ")
    code, again, err = command(
        "generate", "--policy", out / "model", *common, "--seed", 3, "--out", tmp_path / "g.jsonl"
    )
    rows = [json.loads(line) for line in (tmp_path / "g.jsonl").read_text().splitlines()]
    assert (code, again) == (0, "")
    assert [row["prompt"] + row["response"] for row in rows] == shown.splitlines()


def test_a_run_is_replayed_from_its_config_and_resumed_in_its_folder(command, tiny, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        f"policy: {tiny / 'policy'}\nprompts: {tiny / 'prompts.txt'}\nreward: vader\ntokens: 100\neval_episodes: 4\n"
        "env: {max_new_tokens: 4}\nsettings: {batch_size: 8, learning_rate: 1e-3}\n"
    )
    code, _, err = command("train", "--config", config, "--updates", 1, "--out", tmp_path / "run")
    assert code == 0, err
    assert "tokens: null" in (tmp_path / "run/config.yaml").read_text()  # --updates took the place of the file's budget
    code, _, err = command("train", "--resume", "--out", tmp_path / "run")
    assert code == 0, err
    code, _, err = command("train", "--resume", "--out", tmp_path / "run", "--seed", 5)
    assert (code, err.count("\n")) == (1, 1) and "was begun with another seed" in err


def test_generation_of_one_prompt_is_safe_to_show(command, tiny):
    policy = tiny / "policy"
    code, shown, _ = command("generate", "--policy", policy, "--prompt", "the film is\x1b[2J", "--max-new-tokens", 3)
    assert code == 0 and shown.startswith("the film is‹U+001B›[2J") and shown.count("\n") == 1
    greedy = [
        command("generate", "--policy", policy, "--prompt", "the film is", "--greedy", "--seed", s)[1] for s in (1, 2)
    ]
    assert greedy[0] == greedy[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["train", "--out", "x", "polcy=3"],
            "error: the command line: there is no setting polcy; did you mean policy?\n",
        ),
        (["train", "--policy", "p"], "error: --out is missing"),
        (["train", "--out", "x"], "error: the setting policy is missing"),
        (["train", "--config", "none.yaml", "--out", "x"], "error: none.yaml: No such file or directory\n"),
        (["train", "--resume", "--out", "nowhere"], "error: there is no run to resume in nowhere"),
        (["generate", "--policy", "p"], "error: generate needs either a file of prompts"),
        (
            ["evaluate", "--policy", "./p", "--prompts", "none.txt", "--reward", "vader"],
            "error: none.txt: No such file",
        ),
        (["agents", "pppo"], "error: unknown agent 'pppo'; did you mean 'ppo'?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(command, words, message):
    code, out, err = command(*words)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(message)


def test_wrong_usage_is_exit_code_2(command):
    code, _, err = command("train", "--polcy", "x")
    assert code == 2 and "No such option: --polcy" in err


def test_ctrl_c_is_exit_code_130_and_says_how_to_go_on(command, monkeypatch, tiny, tmp_path):
    out = tmp_path / "a run"
    words = ["train", "--policy", tiny / "policy", "--prompts", "p.txt", "--reward", "vader", "--out", out]

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf_env.training.run.run_training", interrupt)
    code, _, err = command(*words)
    assert (code, err) == (130, "interrupted before there was anything to keep\n")
    out.mkdir()
    (out / "config.yaml").touch()
    code, _, err = command(*words)
    assert (code, err) == (130, f"interrupted; to continue: rlhf-env train --resume --out '{out}'\n")
    code, _, err = command(*words, "--agent", "sb3:PPO")
    assert (code, err) == (130, "interrupted; runs of sb3:PPO cannot be resumed, only begun anew\n")


def test_agents_and_worlds_are_listed_one_line_each(command):
    code, out, _ = command("agents")
    assert code == 0 and out.splitlines()[0].startswith("ppo ")
    assert "\nsb3:PPO " in out and "\nsb3-contrib:TRPO " in out
    code, out, _ = command("worlds")
    assert code == 0
    assert all(line.startswith("rlhf_env/") and len(line.split()) > 3 for line in out.splitlines())
    assert any(line.startswith("rlhf_env/TextGeneration-v0 ") for line in out.splitlines())


def test_an_agents_settings_are_listed_with_their_defaults(command):
    code, out, _ = command("agents", "ppo")
    assert code == 0 and "settings.epochs=4 " in out and "passes over each batch" in out


def test_doctor_finds_what_is_there_and_what_is_not(command, monkeypatch):
    monkeypatch.setattr(inform, "requires", lambda name: ["torch>=2.4", "matplotlib>=3.9; extra == 'plot'"])
    monkeypatch.setattr(inform, "version", lambda name: "2.13.0+cpu")
    code, out, _ = command("doctor")
    assert code == 0 and "BAD" not in out and "matplotlib" not in out
    assert "ok   torch                    2.13.0+cpu" in out and "threads                  1 " in out
    monkeypatch.setattr(inform, "requires", lambda name: ["torch>=2.14", "no-such-package>=1"])
    code, out, _ = command("doctor")
    assert code == 1 and "BAD  torch                    2.13.0+cpu is too old: pip install 'torch>=2.14'" in out
    assert "BAD  no-such-package          installed, but cannot be imported" in out


def test_progress_in_lines_tells_rate_and_time_left(capsys):
    rows = [
        {"update": u, "tokens": 100 * u, "score": 0.5, "kl": -0.0001, "seconds": 30.0, "tokens_per_second": 3.3}
        for u in (6, 7, 10)
    ]
    with training_progress({"tokens": 1000}) as show:
        for row in rows:
            show(row)
    lines = capsys.readouterr().err.splitlines()
    # 100 tokens in 30 s, so 400 more take 120 s, though a resumed run's first row already stands at 600.
    assert lines[0] == "tokens 600/1,000  update 6  score 0.500  kl 0.000  3 tok/s  2:00 left"
    assert lines[1].startswith("tokens 1,000/1,000  update 10") and len(lines) == 2  # not a line for every update


@pytest.mark.parametrize(
    ("budget", "line"),
    [
        ({"queries": 160}, "queries 40/160  update 5  score 0.500  3 tok/s  0:30 left"),  # 8 in 2 s: 120 more take 30 s
        ({"episodes": 80}, "episodes 20/80  update 5  score 0.500  3 tok/s  0:30 left"),
        ({"updates": 20}, "updates 5/20  update 5  score 0.500  3 tok/s  0:30 left"),
    ],
)
def test_progress_is_told_in_the_unit_of_the_budget(capsys, budget, line):
    with training_progress(budget) as show:
        show(
            {
                "update": 5,
                "tokens": 100,
                "episodes": 20,
                "queries": 40,
                "score": 0.5,
                "seconds": 2.0,
                "tokens_per_second": 3.3,
            }
        )
    assert capsys.readouterr().err == f"{line}\n"


def test_progress_of_learning_from_data_has_no_tokens_and_without_a_budget_no_end(capsys):
    row = {"update": 3, "episodes": 0, "tokens": 0, "queries": 0, "loss": 0.25, "accuracy": 0.5, "seconds": 2.0}
    for budget in ({"updates": 9}, {}):
        with training_progress(budget) as show:
            show(row)
    assert capsys.readouterr().err.splitlines() == [
        "updates 3/9  update 3  loss 0.250  accuracy 0.500  0:12 left",
        "updates 3  update 3  loss 0.250  accuracy 0.500",
    ]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (65, "1:05"), (3600, "1:00:00"), (7325, "2:02:05")])
def test_a_clock_reads_as_clocks_do(seconds, text):
    assert clock(seconds) == text


@pytest.fixture
def time_passes(monkeypatch):
    """A clock that moves on by so many seconds with each look at it."""

    def by(seconds: float) -> None:
        ticks = itertools.count(0.0, seconds)
        monkeypatch.setattr("rlhf_env.cli.show.time.monotonic", lambda: next(ticks))

    return by


def test_steps_are_lines_now_and_then_and_at_the_end(capsys, time_passes):
    time_passes(4.0)
    with step_progress() as show:
        for step in range(1, 7):
            show({"step": step, "steps": 6, "loss": 0.5 / step})
    # One step takes 4 seconds: a line once 10 seconds are over, and for the last step.
    assert capsys.readouterr() == (
        "",
        "3/6 steps  loss 0.167  0:12 left\n6/6 steps  loss 0.083  0:00 left\n",
    )


def test_responses_are_counted_in_lines_now_and_then(capsys, time_passes):
    time_passes(6.0)
    with response_progress() as show:
        for _ in range(4):
            show(30, 120)
    # 60 responses in 12 seconds are 5 per second, so that the other 60 take 12 seconds more.
    assert capsys.readouterr() == (
        "",
        "60/120 responses  5.0 per second  0:12 left\n120/120 responses  5.0 per second  0:00 left\n",
    )


def test_on_a_terminal_there_is_a_bar(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    row = {"update": 1, "tokens": 9, "episodes": 2, "queries": 2, "seconds": 1.0, "tokens_per_second": 9.0}
    for budget in ({"queries": 4}, {}):
        with training_progress(budget) as show:
            show(row)
        _, shown = capsys.readouterr()
        assert "━" in shown and "update 1" in shown and ("50%" in shown, "%" in shown) == (bool(budget), bool(budget))
    with step_progress() as show:
        show({"step": 1, "steps": 2, "loss": 0.25, "accuracy": 1.0})
    with response_progress() as show:
        show(1, 4)
    out, err = capsys.readouterr()
    assert out == "" and "━" in err and "1/2 steps" in err and "accuracy 1.000" in err and "1/4 responses" in err
