"""What an iteration of PPO costs on one device and on many: memory, time and communication, on paper.

    python benchmarks/scaling.py                        # 1 B and 8 B parameters on 1, 8 and 64 H100s
    python benchmarks/scaling.py --flops 312e12 --bandwidth 2e12 --memory 40e9     # other devices
    python benchmarks/scaling.py --check                # which share of its peak this processor reaches in each part

Every number of the table is a product of the lines below; nothing in it was measured on a GPU. `--check` holds the same
arithmetic against this processor: the rate of its matrix products is measured, and so is an iteration.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    flops: float  # of dense products in bfloat16, per second, at best
    bandwidth: float  # bytes of its memory per second, at best
    memory: float  # bytes
    link: float  # bytes per second that an all-reduce moves within a machine of 8, per device
    network: float  # the same between machines
    launch: float = 5e-6  # seconds to start an operation
    busy: float = 0.4  # share of `flops` that passes over whole sequences reach
    reading: float = 0.6  # share of `bandwidth` that decoding reaches


@dataclass(frozen=True)
class Model:
    parameters: float
    layers: int
    kv_width: int  # numbers of a token's key in one layer


@dataclass(frozen=True)
class Work:
    """An iteration: B responses of T tokens to prompts of P; policy, reference and reward model of one size."""

    responses: int = 512
    prompt: int = 256
    tokens: int = 256
    epochs: int = 4
    minibatches: int = 4
    micro_batch: int = 8  # episodes that a device reads at once in an update


H100 = Device(flops=989e12, bandwidth=3.35e12, memory=80e9, link=450e9, network=350e9)
MODELS = {"1 B": Model(1.24e9, 16, 512), "8 B": Model(8.03e9, 32, 1024)}  # as Llama 3's are made
OPERATIONS = 14  # of one token in one block, as `rlhf_env.models.blocks` runs it


def memory(model: Model, work: Work, devices: int, spread: bool) -> float:
    """Bytes on one device at the worst moment, which is sampling: all weights are there, and the keys and values.

    In bfloat16 a weight takes 2 bytes, its gradient (added up in float32) 4, the float32 copy that Adam steps on 4 and
    Adam's state 8. These 18 bytes of the policy's and 2 of the reference's weights are what is spread; while they are
    gathered, it is 2 and 2 more.
    """
    n, rows = model.parameters, work.responses / devices
    cache = 2 * model.layers * model.kv_width * 2 * rows * (work.prompt + work.tokens)
    kept = 20 * n / devices + 4 * n if spread else 20 * n
    return kept + 2 * n + cache  # 2 n: the reward model, whole


def seconds(model: Model, work: Work, device: Device, devices: int, spread: bool) -> dict[str, float]:
    """Seconds of each part of an iteration. A pass takes 2 operations per weight and token, a gradient 4 more."""
    n, rows = model.parameters, work.responses / devices
    length = work.prompt + work.tokens
    whole = 2 * n * rows / (device.flops * device.busy)  # one token of every response, as part of a long product
    read = 2 * n + rows * 4 * model.layers * model.kv_width * (work.prompt + work.tokens / 2)  # bytes per step
    step = max(read / (device.bandwidth * device.reading), whole) + OPERATIONS * model.layers * device.launch
    link = device.link if devices <= 8 else device.network
    there = (devices - 1) / devices / link  # seconds per byte that everybody is to have
    if spread:
        passes = work.epochs * work.responses / (devices * min(work.micro_batch, rows / work.minibatches))
        exchanged = passes * (2 * n + 2 * n + 4 * n) * there + 4 * n * there  # gathered twice, gradients, for sampling
    else:
        exchanged = work.epochs * work.minibatches * 2 * 4 * n * there  # gradients, in float32
    return {
        "sampling": work.prompt * whole + work.tokens * step,
        "scoring": 2 * length * whole,
        "update": work.epochs * 3 * length * whole,
        "exchange": exchanged,
    }


def check() -> None:
    """Print what this processor does of the same arithmetic, and how long it takes."""
    from iteration import PARTS, SIZES
    from iteration import Work as Measured

    torch.set_num_threads(1)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    times = []
    for _ in range(20):
        began = time.perf_counter()
        torch.mm(a, b)
        times.append(time.perf_counter() - began)
    flops = 2 * 1024**3 / min(times)
    print(f"matrix products of 1024: {flops / 1e9:.0f} GFLOP/s in float32, one thread\n")
    print("| model | " + " | ".join(PARTS) + " |\n|---" + "|---" * len(PARTS) + "|")
    for size in SIZES:
        measured = Measured(size, 32, 32)
        n = sum(p.numel() for p in measured.lm().model.parameters())
        tokens = 32 * (16 + 32)
        products = {"sampling": 2 * n * tokens, "reference": 2 * n * tokens, "reward model": 2 * n * tokens}
        products["update"] = 4 * 6 * n * tokens
        taken = measured.parts(5)
        shares = [f"{products[name] / taken[name] / flops:.0%}" for name in PARTS]
        print(f"| {size} | " + " | ".join(shares) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("flops", "bandwidth", "memory", "link", "network"):
        parser.add_argument(f"--{name}", type=float, default=getattr(H100, name))
    parser.add_argument("--responses", type=int, default=Work.responses)
    parser.add_argument("--check", action="store_true", help="measure this processor instead")
    args = parser.parse_args()
    if args.check:
        check()
        return
    device = Device(args.flops, args.bandwidth, args.memory, args.link, args.network)
    work = Work(responses=args.responses)
    columns = ["model", "devices", "weights", "GB each", "sampling, s", "scoring, s", "update, s", "exchange, s"]
    print("| " + " | ".join([*columns, "tokens/s", "speed-up"]) + " |\n" + "|---" * (len(columns) + 2) + "|")
    for name, model in MODELS.items():
        alone = sum(seconds(model, work, device, 1, False).values())
        for devices in (1, 8, 64):
            for spread in (False, True) if devices > 1 else (False,):
                needed = memory(model, work, devices, spread)
                parts = seconds(model, work, device, devices, spread)
                whole = sum(parts.values())
                place = f"| {name} | {devices} | {'spread' if spread else 'whole'} | {needed / 1e9:.0f}"
                if needed > device.memory:
                    print(f"{place}: too much |" + " – |" * 6)
                    continue
                cells = [f"{part:.1f}" for part in parts.values()]
                cells += [f"{work.responses * work.tokens / whole:,.0f}", f"{alone / whole:.1f}"]
                print(f"{place} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
