"""What the two studies share: many runs side by side, each kept once it is done, a table of means, and a figure."""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_env.intervals import mean_interval
from rlhf_env.records.atomic import write_atomic

#: Every agent, in the order of the tables.
AGENTS = (
    *("ppo", "a2c", "reinforce", "rloo", "grpo", "grpo (published)", "remax", "nlpo"),
    *("best_of_n", "rejection_sampling", "bon_distillation"),
    *("dpo", "ipo", "kto", "online_dpo", "ilql", "soft_q"),
)

Row = dict[str, Any]


def run_all(
    run: Callable[[str, int], Row], agents: Sequence[str], seeds: Sequence[int], out: Path, jobs: int
) -> dict[str, list[Row]]:
    """The rows of every agent and seed, `jobs` processes at a time; a row that `out` has already is not made again."""
    tasks = [
        (run, agent, seed, out / f"{agent.replace(' ', '-')}-seed{seed}.json") for seed in seeds for agent in agents
    ]
    out.mkdir(parents=True, exist_ok=True)
    if jobs == 1:
        done = list(map(_kept, tasks))
    else:
        with multiprocessing.get_context("spawn").Pool(jobs, torch.set_num_threads, (1,)) as pool:
            done = pool.map(_kept, tasks, chunksize=1)
    rows: dict[str, list[Row]] = {agent: [] for agent in agents}
    for row in done:
        rows[row["agent"]].append(row)
    return rows


def _kept(task: tuple[Callable[[str, int], Row], str, int, Path]) -> Row:
    run, agent, seed, file = task
    if not file.exists():
        row = {"agent": agent, "seed": seed, **run(agent, seed)}
        write_atomic(file, (json.dumps(row) + "\n").encode("utf-8"))
        print(f"{agent}, seed {seed}: {row['seconds']:.0f} s", file=sys.stderr, flush=True)
    return json.loads(file.read_text(encoding="utf-8"))


def print_table(rows: dict[str, list[Row]], columns: Sequence[tuple[str, str, str]]) -> None:
    """A Markdown table of means over seeds with 95 % intervals; columns are (key, heading, format)."""
    print("| agent | " + " | ".join(heading for _, heading, _ in columns) + " |\n" + "|---" * (1 + len(columns)) + "|")
    for agent, found in rows.items():
        cells = []
        for key, _, form in columns:
            values = [row[key] for row in found if row.get(key) is not None]
            if not values:
                cells.append("–")
                continue
            m = mean_interval("x", values)
            bounds = (
                f" [{m['x_low']:{form}}, {m['x_high']:{form}}]" if "x_low" in m and m["x_low"] < m["x_high"] else ""
            )
            cells.append(f"{m['x']:{form}}{bounds}")
        print(f"| {agent} | " + " | ".join(cells) + " |")


def plot_beside_ppo(
    rows: dict[str, list[Row]], file: Path, *, labels: tuple[str, str], limits: tuple[float, float] | None = None
) -> None:
    """One small panel per agent: the `curve` of each seed, over PPO's in grey (matplotlib)."""
    from matplotlib.figure import Figure

    agents = [agent for agent, found in rows.items() if any(row.get("curve") for row in found)]
    wide = 4
    tall = -(-len(agents) // wide)
    figure = Figure(figsize=(2.6 * wide, 2.1 * tall), layout="constrained")
    panels = figure.subplots(tall, wide, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, agent in zip(panels, agents, strict=False):
        for name, colour in (("ppo", "0.75"), (agent, "C0")):
            for row in rows.get(name, []):
                axes.plot(*zip(*row["curve"], strict=True), color=colour, linewidth=1)
        axes.set_title(agent, fontsize=9)
        if limits is not None:
            axes.set_ylim(*limits)
    for axes in panels[len(agents) :]:
        axes.set_axis_off()
    figure.supxlabel(labels[0], fontsize=9)
    figure.supylabel(labels[1], fontsize=9)
    figure.savefig(file, dpi=110)
