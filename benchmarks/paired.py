"""What the benchmarks share: contestants that take turns, and the line that says where their numbers come from."""

from __future__ import annotations

import gc
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch

_UNITS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")  # what matters of a processor here, as Linux names it

_CPU = torch.device("cpu")

Cost = Callable[[], float]


def begin(device: torch.device = _CPU) -> None:
    """Keep to one thread, and print the command, the day and the machine above the tables."""
    torch.set_num_threads(1)
    where = f"{torch.cuda.get_device_name(device)} beside one thread of " if device.type == "cuda" else ""
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    day = f"{datetime.now(UTC):%Y-%m-%d}"
    print(
        f"`{command}`, {day}: {where}{processor()}, torch {torch.__version__}{'' if where else ', one thread'}",
        flush=True,
    )


def processor() -> str:
    """The processor's name, and which units for vectors and matrices it has."""
    try:
        lines = dict(line.split("\t", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if "\t" in line)
    except OSError:
        return platform.processor() or platform.machine()
    name, flags = (lines.get(key, "").strip("\t: ") for key in ("model name", "flags"))
    return f"{name or platform.machine()} ({', '.join(u for u in _UNITS if u in flags.split()) or 'no AVX2'})"


def seconds(work: Callable[[], object]) -> Cost:
    """The process time that `work` takes, each time it is called."""

    def cost() -> float:
        began = time.process_time()
        work()
        return time.process_time() - began

    return cost


def take_turns(contestants: Mapping[str, Cost], rounds: int) -> dict[str, tuple[float, float]]:
    """Median cost of each contestant, and the median of its ratio to the first one's cost in the same round."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    gc.collect()
    for number in range(rounds + 1):  # the first one warms up
        for name, cost in contestants.items():
            spent = cost()
            if number:
                found[name].append(spent)
    first = next(iter(found.values()))
    return {
        name: (statistics.median(spent), statistics.median(s / f for s, f in zip(spent, first, strict=True)))
        for name, spent in found.items()
    }


class Peer:
    """TRL's `algorithm` on what lies in `folder`, in a process of the interpreter `python` that has it."""

    def __init__(self, python: Path, algorithm: str, folder: Path, tokens: int, *more: str) -> None:
        script = Path(__file__).parent / "peers" / "trl_peer.py"
        words = [str(python), str(script), algorithm, str(folder), "--tokens", str(tokens), *more]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def __call__(self) -> float:
        """Seconds of one iteration."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def peak(self) -> int:
        """Ends it; its peak memory in MB."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        return int(self.process.stdout.readline())


def table(*columns: str) -> None:
    """The head of a Markdown table."""
    print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|", flush=True)


def row(*cells: object) -> None:
    """A row of it, as soon as it is known."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def peak() -> int:
    """The most memory that this program ever had, in MB; by Linux, as getrusage counts what it was forked from, too."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) // 1024
