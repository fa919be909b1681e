"""Signals: an update that is under way is finished, kept and resumed from; what does not end is given up."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_env.records.checkpoint import latest_checkpoint, load_checkpoint
from rlhf_env.records.config import to_dict
from rlhf_env.records.run import Run
from rlhf_env.training import run
from rlhf_env.training.config import TrainConfig
from rlhf_env.training.interruption import Interrupted, InterruptedAgain, exit_code, postponed_signals
from rlhf_env.training.run import run_training
from tests.processes import signalled, slow_command, start
from tests.tiny_training import left_by, tiny_training

# --- the signals


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_waits_until_it_is_asked_for(signum, code):
    before = signal.getsignal(signum)
    with pytest.raises(Interrupted) as caught, postponed_signals() as raise_if_asked:
        raise_if_asked()
        signal.raise_signal(signum)
        went_on = True
        raise_if_asked()
    assert went_on and exit_code(caught.value) == code
    assert signal.getsignal(signum) is before


def test_it_waits_no_longer_than_to_the_end():
    with pytest.raises(Interrupted), postponed_signals():
        signal.raise_signal(signal.SIGTERM)


def test_nothing_happens_without_a_signal():
    with postponed_signals() as raise_if_asked:
        raise_if_asked()


def test_it_is_given_so_much_time_and_no_more_even_if_somebody_catches_everything():
    began = time.monotonic()
    with pytest.raises(Interrupted), postponed_signals(grace=0.1):
        signal.raise_signal(signal.SIGINT)
        try:
            time.sleep(10)
        except BaseException:
            pass
        time.sleep(10)
    assert 0.1 < time.monotonic() - began < 5
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_second_signal_ends_at_once():
    with pytest.raises(Interrupted) as caught, postponed_signals():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("never reached")
    assert caught.value.signum == signal.SIGINT  # the first decided


def test_whoever_asked_has_all_the_time_it_needs():
    with pytest.raises(Interrupted), postponed_signals(grace=0.1) as raise_if_asked:
        signal.raise_signal(signal.SIGTERM)
        try:
            raise_if_asked()
        except Interrupted:
            pass
        time.sleep(0.3)
        cleaned_up = True
    assert cleaned_up


def test_and_so_has_who_was_given_up():
    with pytest.raises(Interrupted), postponed_signals(grace=0.1):
        signal.raise_signal(signal.SIGTERM)
        try:
            time.sleep(10)
        except Interrupted:
            time.sleep(0.8)  # longer than between two attempts
            cleaned_up = True
            raise
    assert cleaned_up


def test_a_second_signal_ends_that_too():
    with pytest.raises(InterruptedAgain), postponed_signals() as raise_if_asked:
        signal.raise_signal(signal.SIGTERM)
        try:
            raise_if_asked()
        finally:
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("never reached")


def test_the_handler_of_alarms_is_put_back():
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(Interrupted), postponed_signals():
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGALRM) is not before
    assert signal.getsignal(signal.SIGALRM) is before


def test_outside_the_main_thread_nothing_changes():
    seen = []

    def look() -> None:
        with postponed_signals() as raise_if_asked:
            raise_if_asked()
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


# --- runs

#: Where a run may be when the signal comes: what is called there, and which of its calls is met in update 3 or later.
PHASES = {
    "rollout": ("rlhf_env.training.loop", "collect", 3),
    "reward": ("tests.builders", "letter_score", 7),  # twice before training, once an update, twice after the second
    "update": ("rlhf_env.agents.ppo", "PPO.update", 3),
    "evaluation": ("rlhf_env.training.run", "evaluate", 3),  # before training, after the second update and the fourth
    "save": ("rlhf_env.training.run", "save_checkpoint", 1),  # after the third update
}

AFTERWARDS = {  # training is over
    "last evaluation": ("rlhf_env.training.run", "evaluate", 5),
    "report": ("rlhf_env.training.run", "write_report", 1),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    return tiny_training(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "straight"
    run_training(config, out)
    return out


def interrupted(config: TrainConfig, folder: Path, phase: str, seconds: float, *signals: int) -> tuple[int, float, str]:
    """Exit code, seconds from the first signal on, and standard error of a run that gets `signals` in a phase."""
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
    marker, err = folder / "begun", folder / "err"
    words = ["train", "--config", str(folder / "config.yaml"), "--out", str(folder / "run")]
    process = start(slow_command, {**PHASES, **AFTERWARDS}[phase], seconds, marker, *words, err=err)
    return signalled(process, marker, err, *signals)


def resumed(config: TrainConfig, out: Path) -> dict[str, Any]:
    assert not Run(out).finished
    if (newest := latest_checkpoint(out / "checkpoints")) is not None:
        load_checkpoint(newest)
    run_training(config, out, resume=True)
    return left_by(out)


@pytest.mark.parametrize(("phase", "signum"), [*zip(PHASES, [signal.SIGINT, signal.SIGTERM] * 3, strict=False)])
def test_the_update_is_finished_and_kept(config, straight, phase, signum, tmp_path):
    code, took, err = interrupted(config, tmp_path, phase, 0.3, signum)
    out = tmp_path / "run"
    assert code == 128 + signum and took < 5, err
    assert err.splitlines()[-1] == f"interrupted; to continue: rlhf-env train --resume --out {out}"
    after = 4 if phase == "evaluation" else 3  # so many updates are in its metrics, and in its checkpoint
    assert len(Run(out).metrics) == after
    assert latest_checkpoint(out / "checkpoints") == out / "checkpoints" / f"step-0000000{after}"
    assert resumed(config, out) == left_by(straight)


@pytest.mark.parametrize(("phase", "seconds"), [("last evaluation", 0.3), ("report", 60)])
def test_a_run_that_is_finished_was_not_interrupted(config, straight, phase, seconds, tmp_path):
    code, took, err = interrupted(config, tmp_path, phase, seconds, signal.SIGTERM)
    assert code == 0 and took < 6 and "to continue" not in err
    assert left_by(tmp_path / "run") == left_by(straight)
    assert (tmp_path / "run/report.html").is_file()


def test_what_was_learned_is_saved_however_long_that_takes(config, straight, tmp_path, monkeypatch):
    def slowly(*args: Any, **kwargs: Any) -> Path:
        time.sleep(0.5)
        return save(*args, **kwargs)

    def on_update(row: dict[str, Any]) -> None:
        if row["update"] == update:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.1)
        raise_if_asked()

    save = run.save_checkpoint
    monkeypatch.setattr(run, "save_checkpoint", slowly)
    for update in (2, 3):  # one leaves no checkpoint otherwise
        out = tmp_path / str(update)
        with pytest.raises(Interrupted), postponed_signals(grace=0.3) as raise_if_asked:
            run_training(config, out, on_update=on_update)
        assert latest_checkpoint(out / "checkpoints") == out / f"checkpoints/step-0000000{update}"
    assert resumed(config, out) == left_by(straight)


def test_a_save_that_was_given_up_is_done_again(config, straight, tmp_path, monkeypatch):
    def slowly(*args: Any, **kwargs: Any) -> Path:
        calls.append(1)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        time.sleep(0.7)
        return save(*args, **kwargs)

    calls, save = [], run.save_checkpoint
    monkeypatch.setattr(run, "save_checkpoint", slowly)
    with pytest.raises(Interrupted), postponed_signals(grace=0.1):
        run_training(config, tmp_path / "run")
    assert latest_checkpoint(tmp_path / "run/checkpoints") == tmp_path / "run/checkpoints/step-00000003"
    monkeypatch.undo()
    assert resumed(config, tmp_path / "run") == left_by(straight)


@pytest.mark.parametrize(
    "phase", ["reward", *(pytest.param(p, marks=pytest.mark.slow) for p in PHASES if p != "reward")]
)
def test_an_update_that_does_not_end_is_given_up(config, straight, phase, tmp_path):
    code, took, err = interrupted(config, tmp_path, phase, 60, signal.SIGTERM)
    assert code == 143 and 4 <= took < 5, err
    assert resumed(config, tmp_path / "run") == left_by(straight)


def test_a_second_signal_does_not_wait(config, straight, tmp_path):
    code, took, err = interrupted(config, tmp_path, "update", 60, signal.SIGINT, signal.SIGINT)
    assert code == 130 and took < 2, err
    assert "a second signal ends at once" in err
    assert resumed(config, tmp_path / "run") == left_by(straight)
