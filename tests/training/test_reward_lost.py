"""Where there is no reward, a run keeps what it has learned and ends; resumed, it is the run that missed none."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from rlhf_env.cli.pipeline import run_and_print
from rlhf_env.errors import RemoteError, RewardError, RLHFEnvError
from rlhf_env.records.checkpoint import latest_checkpoint
from rlhf_env.records.config import to_dict
from rlhf_env.records.run import Run
from rlhf_env.training.config import EnvConfig, PipelineConfig, TrainConfig
from rlhf_env.training.run import run_training
from tests.builders import letter_score
from tests.serving import Handler, reply, scoring, serving
from tests.tiny_files import write_letter_files
from tests.tiny_training import left_by, tiny_training

_MOODY = """
from tests.builders import letter_score
from rlhf_env.agents.ppo import PPO, PPOConfig
from rlhf_env.errors import RewardError

calls, broken = 0, None  # which call says NaN

def score(prompts, responses):
    global calls
    calls += 1
    return [float("nan")] * len(responses) if calls == broken else letter_score(prompts, responses)

class Asking(PPO):
    def __init__(self, policy, config: PPOConfig, *, seed=0):
        super().__init__(policy, config, seed=seed)
        self.updates = 0

    def update(self, rollout, progress=0.0):
        metrics = super().update(rollout, progress)
        self.updates += 1
        if self.updates == 3:
            raise RewardError("nobody answers")
        return metrics
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("moody")
    (folder / "moody.py").write_text(_MOODY, encoding="utf-8")
    return folder


@pytest.fixture
def moody(folder, monkeypatch):
    """A module whose `score` breaks at the call that it is told; each time it is told so, it counts anew."""
    monkeypatch.syspath_prepend(str(folder))

    def break_at(call: int | None) -> None:
        sys.modules.pop("moody", None)
        import_module("moody").broken = call

    yield break_at
    sys.modules.pop("moody", None)


@pytest.fixture(scope="module")
def straight_runs(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """What runs of which no reward is missing leave, by agent."""
    return {}


def tiny(folder: Path, agent: str) -> TrainConfig:
    config = replace(tiny_training(folder, agent), reward="moody:score", updates=4, checkpoint_every=0)
    return replace(config, env=EnvConfig(target_kl=0.5, beta=0.1, max_new_tokens=6))


#: Which call of the reward breaks, and so many updates are in the checkpoint then. Two calls are made before training,
#: two after the second and the fourth update: the policy is measured, and the reference; two at the end.
CALLS = {
    "first rollout": (3, None),
    "second rollout": (4, 1),
    "policy in an evaluation": (5, 2),
    "reference in an evaluation": (6, 2),
    "rollout after an evaluation": (7, 2),
    "last rollout": (8, 3),
    "last update's evaluation": (9, 4),
    "evaluation at the end": (11, 4),
}


@pytest.mark.parametrize("phase", CALLS)
def test_whenever_it_is_missing_the_last_update_is_kept(phase, folder, moody, straight_runs, tmp_path):
    require_same_run(tiny(folder, "ppo"), moody, *CALLS[phase], straight_runs, tmp_path)


@pytest.mark.parametrize(
    ("agent", "call", "kept"),
    [
        ("remax", 6, 1),  # the second update's greedy responses: β has heard of the sampled ones already
        ("bon_distillation", 6, 1),
        ("rejection_sampling", 7, 2),
        ("dpo", 3, 2),  # which asks for a reward to be measured only
    ],
)
def test_whatever_the_agent_asks_for(agent, call, kept, folder, moody, straight_runs, tmp_path):
    config = tiny(folder, agent)
    if agent in ("bon_distillation", "dpo"):  # which have no moving β
        config = replace(config, env=replace(config.env, target_kl=None))
    require_same_run(config, moody, call, kept, straight_runs, tmp_path)


def require_same_run(
    config: TrainConfig, moody: Any, call: int, kept: int | None, straight_runs: dict[str, Any], folder: Path
) -> None:
    """The run whose `call` breaks keeps so many updates, and resumed is the one of which none does."""
    out = folder / "run"
    moody(call)
    with pytest.raises(RewardError, match="scores that are not finite"):
        run_training(config, out)
    newest = latest_checkpoint(out / "checkpoints")
    assert newest == (None if kept is None else out / f"checkpoints/step-0000000{kept}")
    run_training(config, out, resume=True)
    assert left_by(out) == straight(config, moody, straight_runs, folder)


def straight(config: TrainConfig, moody: Any, straight_runs: dict[str, Any], folder: Path) -> dict[str, Any]:
    if config.agent not in straight_runs:
        moody(None)
        run_training(config, folder / "straight")
        straight_runs[config.agent] = left_by(folder / "straight")
    return straight_runs[config.agent]


def test_it_may_be_missing_again_and_again(folder, moody, straight_runs, tmp_path):
    """At both calls of the evaluation after the second update, and then when the run is interrupted otherwise."""
    config, out = tiny(folder, "ppo"), tmp_path / "run"
    for call in (6, 3, 4):  # of a resumed run, the first two are those before training
        moody(call)
        with pytest.raises(RewardError):
            run_training(config, out, resume=(out / "config.yaml").exists())
        assert [row["update"] for row in Run(out).metrics] == [1]
    moody(None)

    def stop(row: dict[str, Any]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):  # after the row was written and before the next checkpoint
        run_training(config, out, resume=True, on_update=stop)
    run_training(config, out, resume=True)
    assert left_by(out) == straight(config, moody, straight_runs, tmp_path)


def test_half_an_update_is_not_kept(folder, moody, tmp_path):
    moody(None)
    config = replace(tiny(folder, "ppo"), agent="moody:Asking", eval_every=0, checkpoint_every=1)
    with pytest.raises(RLHFEnvError, match="Asking broke off its update: nobody answers") as caught:
        run_training(config, tmp_path / "run")
    assert not isinstance(caught.value, RewardError)
    assert latest_checkpoint(tmp_path / "run/checkpoints") == tmp_path / "run/checkpoints/step-00000002"


# --- a server


def served_training(folder: Path, url: str) -> TrainConfig:
    """A run whose reward a server gives; the recipe says that nobody waits for long."""
    http = {"read_timeout": 0.5, "timeout": 2.0, "attempts": 2, "first_wait": 0.01}
    recipe = {"kind": "remote", "url": url, "http": http}
    (folder / "reward.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    config = replace(tiny_training(folder), reward=str(folder / "reward.yaml"), checkpoint_every=0, eval_every=0)
    return replace(config, updates=5)


def broken_from(first: int, handle: Handler, last: int = 99) -> Handler:
    """A server that works, but for the requests `first` to `last`, which `handle` answers."""
    works = scoring(letter_score)
    return lambda c, body, n: (handle if first <= n <= last else works)(c, body, n)


def with_id(**answer: Any) -> Handler:
    return lambda c, body, n: reply(c, {"id": body["id"], **answer})


def drip(connection: BaseHTTPRequestHandler, body: Any, n: int) -> None:

    for _ in range(200):
        connection.wfile.write(b"H")
        time.sleep(0.02)


def stall(connection: BaseHTTPRequestHandler, body: Any, n: int) -> None:

    time.sleep(1.0)


FAULTS: dict[str, Handler] = {
    "drips": drip,
    "stalls": stall,
    "truncates": lambda c, body, n: reply(c, b'{"id": "', Content_Length="99"),
    "NaN": lambda c, body, n: reply(c, f'{{"id": "{body["id"]}", "scores": [{", ".join(["NaN"] * 8)}]}}'.encode()),
    "wrong length": with_id(scores=[0.0]),
    "another id": lambda c, body, n: reply(c, {"id": "0", "scores": [0.0] * len(body["responses"])}),
    "a page": lambda c, body, n: reply(c, b"<html>log in</html>"),
    "429 for ever": lambda c, body, n: reply(c, b"", 429),
    "500 for ever": lambda c, body, n: reply(c, b"", 500),
    "hangs up": lambda c, body, n: None,
}


@pytest.fixture(scope="module")
def served_once(tmp_path_factory) -> tuple[Path, int, TrainConfig, dict[str, Any]]:
    """A folder with files, a port, a run whose reward is served there, and what it leaves when nothing breaks."""
    folder = tmp_path_factory.mktemp("served")
    with serving(scoring(letter_score)) as served:
        config = served_training(folder, served.url)
        run_training(config, folder / "straight")
        assert len(served.asked) == 2 + 5 + 2
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False), encoding="utf-8")
    return folder, urlsplit(served.url).port or 0, config, left_by(folder / "straight")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_server_that_breaks_pauses_the_run(fault, served_once, tmp_path, command):
    """Requests 0 and 1 are of the evaluation before training, 2 to 4 of the first three updates; then it breaks."""
    folder, port, _, straight = served_once
    out = tmp_path / "run"
    with serving(broken_from(5, FAULTS[fault]), port) as served:
        code, _, err = command("train", "--config", folder / "config.yaml", "--out", out)
        line = err.splitlines()[-1]
        assert code == 1 and line.startswith(f"error: {served.url}") and err.count("error:") == 1
        assert line.endswith(f"; to continue: rlhf-env train --resume --out {out}")
        assert [row["update"] for row in Run(out).metrics] == [1, 2, 3] and not Run(out).finished
        assert latest_checkpoint(out / "checkpoints") == out / "checkpoints/step-00000003"
    with serving(scoring(letter_score), port):
        code, _, err = command("train", "--resume", "--out", out)
        assert code == 0, err
    assert left_by(out) == straight


@pytest.mark.parametrize("status", [429, 500])
def test_a_server_that_comes_back_at_once_interrupts_nothing(status, served_once, tmp_path):
    _, port, config, straight = served_once
    with serving(broken_from(5, lambda c, body, n: reply(c, b"", status), last=5), port) as served:
        run_training(config, tmp_path / "run")
        assert len(served.asked) == 2 + 5 + 2 + 1
    assert left_by(tmp_path / "run") == straight


def test_a_server_that_is_away_from_the_start_leaves_no_folder(tmp_path, command):
    folder = write_letter_files(tmp_path)
    words = ["--policy", folder / "policy", "--prompts", folder / "prompts.txt", "--reward", "http://127.0.0.1:9/score"]
    config = tmp_path / "reward.yaml"
    config.write_text("kind: remote\nurl: http://127.0.0.1:9/score\nhttp: {attempts: 1}\n", encoding="utf-8")
    words[-1] = config
    code, _, err = command("train", *words, "--updates", 1, "--max-new-tokens", 4, "--out", tmp_path / "run")
    assert code == 1 and err.splitlines()[-1].startswith("error: http://127.0.0.1:9/score cannot be reached")
    assert "to continue" not in err and not (tmp_path / "run").exists()


def test_an_online_loop_says_how_it_goes_on(monkeypatch, tmp_path, command):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RewardError("the reward model's scores are not finite")

    monkeypatch.setattr("rlhf_env.training.online.run_online", fail)
    code, _, err = command("online", "examples/online.yaml", "--out", tmp_path / "out")
    assert code == 1 and err.splitlines()[-1].endswith("are not finite; the same command continues it")


def test_a_pipeline_says_how_it_goes_on(monkeypatch, tmp_path):
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RemoteError("http://host/score answered with status 500")

    monkeypatch.setattr("rlhf_env.training.pipeline.run_pipeline", fail)
    with pytest.raises(RemoteError, match="answered with status 500; the same command continues it$"):
        run_and_print(PipelineConfig(), tmp_path)
