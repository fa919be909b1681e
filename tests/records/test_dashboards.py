"""What dashboards are shown: numbers by their update, each once, and no text."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from rlhf_env.errors import ConfigError
from rlhf_env.records.dashboards import open_dashboards, require_dashboards


def row(update: int, loss: float) -> dict[str, Any]:
    return {"update": update, "loss": loss, "response": "a secret", "broken": float("nan"), "flag": True}


def test_nothing_is_shown_where_nothing_is_wanted(tmp_path):
    require_dashboards(())
    with open_dashboards((), tmp_path, {}) as show:
        show(row(1, 0.5))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_named_with_its_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"{name} is not installed: pip install 'rlhf-env\[{name}\]'"):
        require_dashboards((name,))


def test_tensorboard_forgets_what_a_resumed_run_forgets(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def shown() -> dict[str, dict[int, float]]:
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}

    with open_dashboards(("tensorboard",), tmp_path, {}) as show:
        for update, loss in ((1, 4.0), (2, 3.0), (3, 2.0)):
            show(row(update, loss))
        assert shown()["loss"] == {1: 4.0, 2: 3.0, 3: 2.0}  # at once, for a kill may come
    with open_dashboards(("tensorboard",), tmp_path, {}, start=1) as show:
        show(row(2, 0.5))
    assert shown() == {"loss": {1: 4.0, 2: 0.5}}
    assert not any(b"secret" in file.read_bytes() for file in (tmp_path / "tensorboard").iterdir())


def test_numbers_of_numpy_are_numbers(wandb: Any, tmp_path: Path):
    with open_dashboards(("wandb",), tmp_path, {}) as show:
        show({"update": 1, "a": np.float32(0.5), "b": np.int64(2), "c": np.bool_(True), "d": np.float64("nan")})
    assert wandb.shown == [(1, {"a": 0.5, "b": 2})]


@pytest.fixture
def wandb(monkeypatch) -> ModuleType:
    """A module that notes what it is told."""
    fake: Any = ModuleType("wandb")
    fake.begun, fake.shown, fake.finished = [], [], 0

    class Run:
        def log(self, numbers: dict[str, float], *, step: int) -> None:
            fake.shown.append((step, numbers))

        def finish(self) -> None:
            fake.finished += 1

    def init(**settings: Any) -> Run:
        fake.begun.append(settings)
        return Run()

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_weights_and_biases_goes_on_with_the_same_run(wandb: Any, tmp_path: Path):
    with open_dashboards(("wandb",), tmp_path, {"seed": 3}) as show:
        show(row(1, 4.0))
    with pytest.raises(KeyboardInterrupt), open_dashboards(("wandb",), tmp_path, {"seed": 3}, start=1) as show:
        show(row(2, 3.0))
        raise KeyboardInterrupt
    assert wandb.shown == [(1, {"loss": 4.0}), (2, {"loss": 3.0})]
    first, second = wandb.begun
    assert first == second and first["id"] and first["config"] == {"seed": 3} and first["resume"] == "allow"
    assert (first["name"], first["dir"]) == (tmp_path.name, str(tmp_path))
    assert wandb.finished == 2
    with open_dashboards(("wandb",), tmp_path / "other", {}):
        pass
    assert wandb.begun[2]["id"] != first["id"]
