"""Every agent's run, interrupted or killed and resumed, becomes the run that was not, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_env.records.checkpoint import latest_checkpoint, load_checkpoint
from rlhf_env.records.run import Run
from rlhf_env.training.agents import AGENTS
from rlhf_env.training.config import TrainConfig
from rlhf_env.training.interruption import Interrupted
from rlhf_env.training.run import run_training
from tests.processes import start
from tests.tiny_training import left_by, run_or_resume, tiny_training


def stopping_after(update: int, error: type[BaseException], *args: Any) -> Any:
    def on_update(row: dict[str, Any]) -> None:
        if row["update"] == update:
            raise error(*args)

    return on_update


SCALED = pytest.param("ppo", {"reward_scale": "running"}, id="ppo, scaled rewards")


@pytest.mark.parametrize(("agent", "more"), [*(pytest.param(name, {}, id=name) for name in AGENTS), SCALED])
def test_a_resumed_run_is_the_one_that_was_not_interrupted(agent, more, tmp_path):
    config = replace(tiny := tiny_training(tmp_path, agent), updates=4, settings={**tiny.settings, **more})
    run_training(config, tmp_path / "straight")
    rows = Run(tmp_path / "straight").metrics
    assert [row["update"] for row in rows] == [1, 2, 3, 4]

    out = tmp_path / "interrupted"
    with pytest.raises(Interrupted):  # after an update that leaves no checkpoint otherwise
        run_training(config, out, on_update=stopping_after(2, Interrupted, 15))
    assert latest_checkpoint(out / "checkpoints") == out / "checkpoints/step-00000002"
    with pytest.raises(ZeroDivisionError):  # a row is logged whose update is forgotten
        run_training(config, out, resume=True, on_update=stopping_after(4, ZeroDivisionError))
    assert latest_checkpoint(out / "checkpoints") == out / "checkpoints/step-00000003"
    run_training(config, out, resume=True)
    assert left_by(out) == left_by(tmp_path / "straight")


def killed_and_resumed(config: TrainConfig, folder: Path, kills: int, longest: float) -> Iterator[Path]:
    """Finished runs that were killed at random moments, `kills` times in all."""
    rng, number = np.random.default_rng(0), 0
    while kills:
        out = folder / f"run-{number}"
        process = start(run_or_resume, config, out)
        process.join(rng.uniform(0, longest))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills -= 1
            if (newest := latest_checkpoint(out / "checkpoints")) is not None:
                load_checkpoint(newest)
        else:
            assert process.exitcode == 0
            yield out
            number += 1
    run_or_resume(config, out)
    yield out


def test_a_killed_run_becomes_the_one_that_was_not(tmp_path):
    config = tiny_training(tmp_path)
    run_training(config, tmp_path / "straight")
    for out in killed_and_resumed(config, tmp_path, kills=3, longest=1.0):
        assert left_by(out) == left_by(tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("agent", ["ppo", "rloo", "dpo", "ilql"])
def test_however_often_it_is_killed(agent, tmp_path):
    config = replace(tiny_training(tmp_path, agent), updates=30)
    run_training(config, tmp_path / "straight")
    runs = list(killed_and_resumed(config, tmp_path, kills=50, longest=1.5))
    assert len(runs) > 2  # some way was made between the kills
    for out in runs:
        assert left_by(out) == left_by(tmp_path / "straight")
