"""Training runs so small that they take half a second, with any agent, and what they left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_env.records.checkpoint import latest_checkpoint
from rlhf_env.records.run import Run
from rlhf_env.training.agents import agent_class, agent_settings
from rlhf_env.training.config import EnvConfig, TrainConfig
from rlhf_env.training.run import run_training
from tests.tiny_files import write_letter_files, write_rows
from tests.tiny_pipeline import left_in

_SMALL = {"learning_rate": 3e-3, "batch_size": 8, "epochs": 1, "minibatches": 2, "n": 2, "draws": 4, "prompts": 2}


def tiny_training(folder: Path, agent: str = "ppo") -> TrainConfig:
    """Six updates on letters, measured after every other and kept after every third; with data, if `agent` needs it."""
    write_letter_files(folder)
    cls: Any = agent_class(agent)
    known = agent_settings(cls)
    config = TrainConfig(
        policy=str(folder / "policy"),
        prompts=str(folder / "prompts.txt"),
        reward="tests.builders:letter_score",
        agent=agent,
        updates=6,
        num_envs=8,
        eval_episodes=6,
        eval_every=2,
        checkpoint_every=3,
        env=EnvConfig(beta=0.1, max_new_tokens=6),
        settings={key: value for key, value in _SMALL.items() if any(k.startswith(f"settings.{key}=") for k in known)},
    )
    source = getattr(cls, "learns_from", None)
    return config if source is None else replace(config, data=write_data(folder / f"{source}.jsonl", source))


def write_data(file: Path, source: str) -> str:
    """Twelve comparisons ("pairs") or logged responses ("log")."""
    words = ["abc", "bad", "cab", "dad", "egg", "fed", "gag", "had", "ace", "bee", "deaf", "cafe"]
    if source == "pairs":
        rows = [{"prompt": "d", "chosen": word, "rejected": word[::-1] + "a"} for word in words]
    else:
        rows = [{"prompt": "d", "response": word, "score": 0.1 * i} for i, word in enumerate(words)]
    return write_rows(file, *rows)


def run_or_resume(config: TrainConfig, out: Path) -> None:
    """Begin the run in `out`, or go on with it."""
    run_training(config, out, resume=(out / "config.yaml").is_file())


def left_by(out: Path) -> dict[str, Any]:
    """All that a finished run left but pages and pictures, without times; of its checkpoints the newest."""
    assert Run(out).finished
    newest = latest_checkpoint(out / "checkpoints")
    assert newest is not None
    return {
        name: what for name, what in left_in(out).items() if name.partition("/step-")[2][:8] in ("", newest.name[5:])
    }
