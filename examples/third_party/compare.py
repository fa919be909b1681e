"""One table of algorithms from many libraries, each unmodified, in worlds whose optimum is known exactly.

    python examples/third_party/compare.py                                   # all of them: see docs/third-party.rst
    python examples/third_party/compare.py --only "CleanRL-style PPO" PPO    # two of them
    python examples/third_party/compare.py --only PPO --seeds 0-1 --steps 8192

A library that is not installed here gets a virtual environment of its own in runs/third_party/venvs. Each run is a
process of its own; its row goes to rows.jsonl in --out and is not computed again. table.md and table.json hold means
over the seeds and their 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import world

from rlhf_env.intervals import mean_interval

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Library:
    script: str
    algorithms: tuple[str, ...]
    module: str  #: what it is imported as
    requirement: str  #: what pip installs
    own_pins: tuple[str, ...] = ()  #: packages that it pins itself, against our constraints


LIBRARIES = (
    Library(
        "sb3_algorithms.py",
        ("PPO", "A2C", "TRPO", "MaskablePPO", "RecurrentPPO", "DQN", "QR-DQN"),
        "sb3_contrib",
        "sb3-contrib==2.9.2",
    ),
    Library("cleanrl_ppo.py", ("CleanRL-style PPO",), "rlhf_env", "torch"),
    Library("tianshou_ppo.py", ("Tianshou PPO",), "tianshou", "tianshou==2.0.1"),
    Library("torchrl_ppo.py", ("TorchRL PPO",), "torchrl", "torchrl==0.14.1"),
    Library("rllib_ppo.py", ("RLlib PPO",), "ray.rllib", "ray[rllib]==2.60.0", own_pins=("gymnasium",)),
)


def installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def interpreter(library: Library) -> str:
    """A Python that has the library: this one, or that of an environment made for it."""
    if installed(library.module):
        return sys.executable
    folder = ROOT / "runs" / "third_party" / "venvs" / library.module.partition(".")[0]
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        print(f"installing {library.requirement} into {folder}", flush=True)

        def others(lines: Sequence[str]) -> list[str]:
            return [line for line in lines if not line.startswith(library.own_pins)] if library.own_pins else [*lines]

        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join(others((ROOT / "constraints.txt").read_text().splitlines())))
        ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
        install = [python, "-m", "pip", "install", "--quiet", "-c", constraints, library.requirement, *others(ours)]
        subprocess.run(install, check=True)
        done.touch()
    return str(python)


def run(python: str, library: Library, algorithm: str, seed: int, steps: int) -> dict[str, Any]:
    script = Path(__file__).parent / library.script
    command = [python, str(script), algorithm, "--seed", str(seed), "--steps", str(steps)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # rlhf_env is that of this checkout
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    if finished.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{finished.stderr[-3000:]}")
    return json.loads(finished.stdout.splitlines()[-1])


def known(seed: int) -> list[dict[str, Any]]:
    """What is known of one world without any learning."""
    here = world.make_world(seed)
    row, _ = here.best_deterministic()
    always = torch.full_like(here.gold, -torch.inf)
    always[row] = 0.0
    policies = {
        "the reference": here.ref_log_probs,
        "best of 4": here.best_of_n(4),
        "best deterministic policy": always,
        "the optimum": here.optimal_log_probs(),
    }
    return [{"algorithm": name, "seed": seed, **world.measured(here, p)} for name, p in policies.items()]


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each algorithm: means over its seeds and their 95 % intervals."""
    table = []
    for algorithm in dict.fromkeys(row["algorithm"] for row in rows):
        of_it = [row for row in rows if row["algorithm"] == algorithm]
        columns = [name for name in ("gain", "gold", "kl", "seconds") if name in of_it[0]]
        means = [mean_interval(name, [row[name] for row in of_it]) for name in columns]
        table.append(
            {"algorithm": algorithm, "seeds": len(of_it), "tokens": of_it[0].get("tokens", 0)}
            | {name: value for part in means for name, value in part.items()}
        )
    return table


def markdown(table: Sequence[dict[str, Any]]) -> str:
    def cell(row: dict[str, Any], name: str, scale: float, digits: int) -> str:
        mean, *ends = (f"{scale * row[key]:.{digits}f}" for key in (name, f"{name}_low", f"{name}_high") if key in row)
        return f"{mean} [{', '.join(ends)}]" if ends else mean

    lines = ["| algorithm | gain, % | gold | KL, nats | tokens | seconds |", "|---|---|---|---|---|---|"]
    for row in table:
        seconds = f"{row['seconds']:.0f}" if "seconds" in row else ""
        measures = [cell(row, "gain", 100, 1), cell(row, "gold", 1, 3), cell(row, "kl", 1, 3)]
        lines.append("| " + " | ".join([row["algorithm"], *measures, str(row["tokens"] or ""), seconds]) + " |")
    return "\n".join(lines) + "\n"


def seeds(text: str) -> list[int]:
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [name for library in LIBRARIES for name in library.algorithms]
    parser.add_argument("--only", nargs="+", choices=every, default=every, metavar="NAME", help=", ".join(every))
    parser.add_argument("--seeds", type=seeds, default=seeds("0-4"), help="of the worlds and the algorithms: 0-4")
    parser.add_argument("--steps", type=int, default=world.TOKENS, help="tokens to learn from")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "third_party")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "rows.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    found = {(row["algorithm"], row["seed"], row["tokens"]): row for row in done}
    rows = []
    for library in LIBRARIES:
        for algorithm in (name for name in library.algorithms if name in arguments.only):
            python = interpreter(library)
            for seed in arguments.seeds:
                row = found.get((algorithm, seed, arguments.steps))
                if row is None:
                    row = run(python, library, algorithm, seed, arguments.steps)
                    with file.open("a") as lines:
                        lines.write(json.dumps(row) + "\n")
                print(f"{algorithm:<18}seed {seed}  gain {row['gain']:7.1%}  {row['seconds']:5.0f} s", flush=True)
                rows.append(row)
    table = summary([row for seed in arguments.seeds for row in known(seed)]) + summary(rows)
    (arguments.out / "table.json").write_text(json.dumps(table, indent=1) + "\n")
    (arguments.out / "table.md").write_text(markdown(table))
    print("\n" + markdown(table), end="")


if __name__ == "__main__":
    main()
