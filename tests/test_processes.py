"""Several processes are one: the same episodes, the same steps, the same errors, one folder."""

from __future__ import annotations

import gc
import signal
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_env import processes
from rlhf_env.errors import ConfigError, NonFiniteError
from rlhf_env.functional import masked_sum
from rlhf_env.models.causal_lm import CausalLM
from rlhf_env.models.descent import Descent
from rlhf_env.models.sharding import whole_state
from rlhf_env.records.checkpoint import latest_checkpoint
from rlhf_env.records.config import to_dict
from rlhf_env.records.jsonl import write_json
from rlhf_env.records.run import Run
from rlhf_env.training.agents import AGENTS
from rlhf_env.training.collect import collect
from rlhf_env.training.config import TrainConfig
from rlhf_env.training.interruption import Interrupted
from rlhf_env.training.run import run_training
from tests.builders import make_envs, random_model, read_by
from tests.processes import command, run_together, signalled, slow_command, start_together
from tests.tiny_training import tiny_training


def trained_together(configs: dict[str, TrainConfig], folder: Path, resume: bool = False) -> None:
    with processes.together(next(iter(configs.values())).device):
        for name, config in configs.items():
            run_training(config, folder / name, resume=resume)


UNEVENLY = ("ppo", "kto", "best_of_n")
SPREAD = ("ppo", "grpo", "dpo", "kto")


pytestmark = pytest.mark.xdist_group("processes")  # so that two of pytest's do not both make the runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[Path]:
    """Each agent's run in float64, by one process and by two; some by three, which share 8 episodes unevenly."""
    folder = tmp_path_factory.mktemp("runs")
    configs = {}
    for name in AGENTS:
        (place := folder / f"files-{name}").mkdir()
        configs[name] = replace(tiny_training(place, name), dtype="float64", updates=3)
    trained_together(configs, folder / "1")
    spread = {f"{name}-spread": replace(configs[name], spread_weights=True) for name in SPREAD}
    for count, names in ((2, [*AGENTS, *spread]), (3, [*UNEVENLY, "ppo-spread"])):
        chosen = {name: (configs | spread)[name] for name in names}
        run_together(count, trained_together, chosen, folder / str(count), err=folder / "err")
    yield folder


#: What is not the same by nature: means over tokens where the loss is one over responses, and the sign of 0 ± rounding.
_PER_TOKEN = {"entropy", "approx_kl", "clip_fraction", "kl_loss"}
OTHERWISE = {"grpo": _PER_TOKEN, "bon_distillation": _PER_TOKEN, "online_dpo": {"accuracy"}}


def numbers(rows: list[dict[str, Any]], without: Collection[str] = ()) -> list[dict[str, Any]]:
    """The rows without what depends on the clock."""
    return [{k: v for k, v in row.items() if "second" not in k and k not in without} for row in rows]


@pytest.mark.parametrize(("agent", "count"), [*((name, 2) for name in AGENTS), *((name, 3) for name in UNEVENLY)])
def test_processes_train_as_one_does(runs, agent, count):
    require_alike(Run(runs / "1" / agent), Run(runs / str(count) / agent))


@pytest.mark.parametrize(("agent", "count"), [*((name, 2) for name in SPREAD), ("ppo", 3)])
def test_processes_that_hold_a_part_of_the_weights_each_train_as_one_does(runs, agent, count):
    require_alike(Run(runs / "1" / agent), Run(runs / str(count) / f"{agent}-spread"))


def require_alike(one: Run, several: Run) -> None:
    agent = one.config["agent"]
    rows, others = (numbers(run.metrics, OTHERWISE.get(agent, ())) for run in (one, several))
    for row, other in zip(rows, others, strict=True):
        assert other == pytest.approx(row, abs=1e-9, rel=1e-7)  # a few are float32
    assert [s["after"] for s in several.samples] == [s["after"] for s in one.samples]
    weights, others = (load_file(run.path / "model" / "model.safetensors") for run in (one, several))
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, atol=1e-9, rtol=0)
    assert (one.summary["processes"], several.summary["processes"]) == (1, int(several.path.parent.name))


def test_one_process_writes_what_one_alone_would(runs):
    folders = [runs / count / "ppo" for count in "12"]
    names = [sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) for folder in folders]
    assert names[0] == names[1]


def gathered(out: Path) -> None:
    """What `collect` and a gradient step are in two processes, left in files; gradients go in many small messages."""
    processes._BUCKET = 1000
    policy = random_model(seed=1)
    with processes.together():
        rollout = collect(policy, make_envs(2), episodes=7, seed=5)
        descent = Descent(policy.parameters(), 1e-2, max_grad_norm=1e9)
        metrics = descent.step(lambda rows: squares(policy, rollout, rows), torch.tensor([4, 1, 6]))
        grads = [p.grad for p in policy.parameters() if p.grad is not None]
        torch.save((vars(rollout), metrics, grads), out / f"{processes.rank()}.pt")


def squares(policy: Any, rollout: Any, rows: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    logp = masked_sum(policy.evaluate(rollout[rows])[0], rollout.response_mask[rows], dim=1)
    return logp.square().mean(), {"mean": logp.mean(), "max_row": rows.max().float()}


def test_every_process_gets_all_episodes_and_the_gradient_of_all_rows(tmp_path):
    run_together(2, gathered, tmp_path, err=tmp_path / "err")
    policy = random_model(seed=1)
    rollout = collect(policy, make_envs(2), episodes=7, seed=5)
    descent = Descent(policy.parameters(), 1e-2, max_grad_norm=1e9)
    metrics = descent.step(lambda rows: squares(policy, rollout, rows), torch.tensor([4, 1, 6]))
    grads = [p.grad for p in policy.parameters() if p.grad is not None]
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for fields, theirs, their_grads in found:
        assert fields["law"] == rollout.law
        for name, value in vars(rollout).items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(fields[name], value, atol=1e-5, rtol=0)
        assert theirs == pytest.approx(metrics, rel=1e-5)
        for a, b in zip(their_grads, grads, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6 * float(b.abs().max() + 1), rtol=0)
    for a, b in zip(found[0][2], found[1][2], strict=True):
        assert torch.equal(a, b)  # to the bit, or they would drift apart


def share_of(rank: int, count: int, total: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    monkeypatch.setattr(processes, "_rank", rank)
    monkeypatch.setattr(processes, "_count", count)
    return list(range(total))[processes.share(total)]


@pytest.mark.parametrize(("total", "count"), [(8, 1), (8, 2), (7, 3), (2, 5), (0, 2)])
def test_shares_are_all_rows_once_and_nearly_equal(total, count, monkeypatch):
    shares = [share_of(rank, count, total, monkeypatch) for rank in range(count)]
    assert sum(shares, []) == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_nothing_is_said(monkeypatch):
    """Without torchrun there is no group, and with a group of somebody else's none of ours."""
    assert (processes.rank(), processes.count(), processes.gather("x")) == (0, 1, ["x"])
    with processes.together("cuda:1") as count:
        assert count == 1


def failing(out: Path) -> None:
    """Process 1 alone meets an episode that is broken: both are to know which."""
    policy = random_model(seed=1)
    with processes.together():
        rollout = collect(policy, make_envs(2), episodes=4, seed=5)
        descent = Descent(policy.parameters(), 1e-2)

        def loss_of(rows: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            loss, metrics = squares(policy, rollout, rows)
            return loss * (torch.nan if 3 in rows else 1), metrics

        before = [p.detach().clone() for p in policy.parameters()]
        for what, work in (
            ("loss", lambda: descent.step(loss_of, torch.arange(4))),
            ("first", lambda: processes.in_first(lambda: broken_in(0))),
            ("few", lambda: collect(policy, make_envs(2), episodes=1)),
        ):
            with pytest.raises((NonFiniteError, ConfigError)) as caught:
                work()
            (out / f"{what}-{processes.rank()}").write_text(str(caught.value))
        assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def broken_in(rank: int) -> None:
    assert processes.rank() == rank
    raise ConfigError("no such file")


def test_an_error_of_one_is_the_error_of_all(tmp_path):
    run_together(2, failing, tmp_path, err=tmp_path / "err")
    for what, said in (
        ("loss", "the loss of episodes 2, 3 of the batch became non-finite in update 0; the step was not taken"),
        ("first", "no such file"),
        ("few", "1 episodes cannot be shared among 2 processes"),
    ):
        assert [(tmp_path / f"{what}-{rank}").read_text() for rank in range(2)] == [said] * 2


@pytest.mark.parametrize("spread", [False, True])
def test_a_run_goes_on_with_another_number_of_processes(spread, tmp_path):
    (place := tmp_path / "files").mkdir()
    config = replace(tiny_training(place), dtype="float64", updates=4, checkpoint_every=2)
    run_training(config, tmp_path / "straight")
    config = replace(config, spread_weights=spread)
    run_together(2, interrupted, config, tmp_path / "run", err=tmp_path / "err")
    assert len(Run(tmp_path / "run").metrics) == 3 and not Run(tmp_path / "run").finished
    run_together(3, trained_together, {"run": config}, tmp_path, True, err=tmp_path / "err")
    straight, resumed = (Run(tmp_path / name) for name in ("straight", "run"))
    for row, other in zip(numbers(straight.metrics), numbers(resumed.metrics), strict=True):
        assert other == pytest.approx(row, abs=1e-9, rel=1e-7)


def interrupted(config: TrainConfig, out: Path) -> None:
    def on_update(row: dict[str, Any]) -> None:
        if row["update"] == 3:
            raise Interrupted(signal.SIGTERM)

    with processes.together(), pytest.raises(Interrupted):
        run_training(config, out, on_update=on_update)


def half_precision(out: Path) -> None:
    """Two steps of a bfloat16 policy, whose float32 copies are spread with it; what is left of it, whole."""
    with processes.together():
        rollout = collect(random_model(seed=1), make_envs(2), episodes=6, seed=5)
        for name, after in (("whole", lambda policy: policy), ("spread", CausalLM.spread)):
            policy = after(random_model(dtype="bfloat16", seed=1))
            descent = Descent(policy.parameters(), 1e-3, max_grad_norm=0.5)
            for _ in range(2):
                metrics = descent.step(lambda rows, of=policy: squares(of, rollout, rows), torch.arange(6))
            state = (whole_state(policy.model), descent.state_dict(), metrics)
            if processes.rank() == 0:
                torch.save(state, out / name)


def test_what_is_spread_is_saved_whole(tmp_path):
    run_together(2, half_precision, tmp_path, err=tmp_path / "err")
    (state, adam, metrics), (other, other_adam, others) = (torch.load(tmp_path / n) for n in ("whole", "spread"))
    assert others == pytest.approx(metrics, rel=0.02)  # gradients are bfloat16, and another forward rounds otherwise
    for name, weight in state.items():
        assert other[name].dtype == torch.bfloat16
        torch.testing.assert_close(other[name], weight, atol=5e-3, rtol=0)
    for a, b in zip(adam["copies"], other_adam["copies"], strict=True):
        torch.testing.assert_close(b, a, atol=4e-3, rtol=0)  # two steps of 1e-3 each, at the most
    assert sum(a.numel() for a in adam["copies"]) == sum(b.numel() for b in other_adam["copies"])


def run_after_run(config: TrainConfig, out: Path) -> None:
    """Two runs of one process, of which process 0 alone still holds the first one's policy."""
    kept = []
    with processes.together():
        for name in ("first", "second"):
            run_training(config, out / name)
            if processes.rank() == 0:
                kept += [model for model in gc.get_objects() if isinstance(model, CausalLM)]
            else:
                gc.collect()


def test_models_of_an_earlier_run_are_not_gathered(tmp_path):
    (place := tmp_path / "files").mkdir()
    config = replace(tiny_training(place), updates=1, spread_weights=True)
    run_together(2, run_after_run, config, tmp_path, err=tmp_path / "err")
    assert numbers(Run(tmp_path / "second").metrics) == numbers(Run(tmp_path / "first").metrics)


def refusing(out: Path) -> None:
    with processes.together():
        for name, work in (
            ("copied", lambda: random_model().spread().frozen_copy()),
            ("unknown", lambda: read_by(random_model(), "Hugging Face").spread()),
        ):
            with pytest.raises(ConfigError) as caught:
                work()
            (out / name).write_text(str(caught.value))


def test_what_cannot_be_spread_says_why(tmp_path):
    run_together(2, refusing, tmp_path, err=tmp_path / "err")
    assert "cannot be copied, as a value network or a target network" in (tmp_path / "copied").read_text()
    assert "only the weights of families that are run block by block" in (tmp_path / "unknown").read_text()
    with pytest.raises(ConfigError, match="this is one: start it with torchrun"):
        random_model().spread()


def words(config: TrainConfig, out: Path) -> list[str]:
    return ["train", "--config", str(config), "--out", str(out)]


def test_a_signal_to_one_ends_all_after_the_same_update(tmp_path):
    """Process 1 gets SIGTERM in its second update; process 0 writes the checkpoint and says how to go on."""
    config, out, marker, err = tmp_path / "config.yaml", tmp_path / "out", tmp_path / "marker", tmp_path / "err"
    write_json(config, to_dict(replace(tiny_training(tmp_path), updates=100)))
    place = ("rlhf_env.agents.ppo", "PPO.update", 2)
    both = start_together(2, slow_command, place, 0.5, marker, *words(config, out), err=err)
    code, seconds, _ = signalled(both[1], marker, err, signal.SIGTERM)
    both[0].join()
    assert (code, both[0].exitcode) == (143, 143) and seconds < 5
    rows = Run(out).metrics
    assert len(rows) < 100
    assert latest_checkpoint(out / "checkpoints") == out / f"checkpoints/step-{rows[-1]['update']:08d}"
    assert f"torchrun --nproc-per-node 2 -m rlhf_env train --resume --out {out}" in err.read_text()


def test_only_training_knows_of_processes(tmp_path):
    err = tmp_path / "err"
    both = start_together(2, command, "agents", err=err)
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [1, 1]
    for rank in range(2):
        assert f"[process {rank}] error: only `rlhf-env train` works in several processes" in err.read_text()


def test_one_gpu_is_not_for_all(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes cannot share the device 'cuda:1': say device=cuda"):
        with processes.together("cuda:1"):
            pass
