"""`rlhf-env agents`, `rlhf-env worlds` and `rlhf-env doctor`: what there is, and what is wrong."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from rlhf_env.errors import ConfigError


def agents(
    name: Annotated[str | None, typer.Argument(help="One agent, to list its settings: ppo or module:Class.")] = None,
) -> None:
    """List the agents, one line each, or the settings of one of them with their defaults."""
    from rlhf_env.training.agents import agent_class, agent_settings, describe_agents

    if name is None:
        _print_lines(describe_agents())
    else:
        _print_lines(agent_settings(agent_class(name)))


worlds = typer.Typer(help="List the environments that `gym.make` knows, or build what one of them ships.")


@worlds.callback(invoke_without_command=True)
def list_worlds(context: typer.Context) -> None:
    """List the environments that `gym.make` and `gym.make_vec` know, one line each."""
    if context.invoked_subcommand is not None:
        return
    import gymnasium

    from rlhf_env.training.agents import first_sentence

    ids = sorted(name for name in gymnasium.registry if name.startswith("rlhf_env/"))
    sentences = {name: first_sentence(str(gymnasium.spec(name).entry_point).partition(":")[0]) for name in ids}
    _print_lines({name: text.removeprefix(f"`{name}`: ") for name, text in sentences.items()})


@worlds.command("build")
def build_world(
    name: Annotated[str, typer.Argument(help="The world: reviews.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; none: into the package.")] = None,
) -> None:
    """Train again, from nothing, the models that a world ships."""
    if name != "reviews":
        raise ConfigError(f"there is nothing to build for a world {name!r}: the one that ships models is 'reviews'")
    from rlhf_env.cli.pipeline import watch
    from rlhf_env.worlds.reviews import ASSETS, build

    print(build(out or ASSETS, watch=watch))


def doctor() -> None:
    """Check Python, the packages, torch and this installation; exit with 1 where something is wrong."""
    failures = 0
    for good, name, finding in _findings():
        failures += not good
        print(f"{'ok ' if good else 'BAD'}  {name:<24} {finding}")
    if failures:
        raise typer.Exit(1)


def _findings() -> Iterator[tuple[bool, str, str]]:
    yield sys.version_info >= (3, 11), "python", f"{sys.version.split()[0]} (3.11 or newer is needed)"
    try:
        needed = requires("rlhf-env") or []
        yield True, "rlhf-env", version("rlhf-env")
    except PackageNotFoundError:
        needed = []
        yield False, "rlhf-env", "not installed: run `pip install -e .` in its folder"
    for requirement in needed:
        if "extra ==" not in requirement:
            yield _package(requirement)
    for name in ("agents", "reward_models"):
        yield _folder(name)
    yield from _torch()


def _package(requirement: str) -> tuple[bool, str, str]:
    name, least = re.match(r"([\w.-]+)(?:>=([\d.]+))?", requirement).groups()  # type: ignore[union-attr]
    try:
        found = version(name)
        import_module({"pyyaml": "yaml", "stable-baselines3": "stable_baselines3"}.get(name.lower(), name))
    except PackageNotFoundError:
        return False, name, f"missing: pip install '{requirement}'"
    except Exception as error:  # a broken installation may raise anything
        return False, name, f"installed, but cannot be imported: {type(error).__name__}: {error}"
    new_enough = least is None or _numbers(found) >= _numbers(least)
    return new_enough, name, found if new_enough else f"{found} is too old: pip install '{requirement}'"


def _folder(name: str) -> tuple[bool, str, str]:
    """A top-level folder of the sources that is imported under rlhf_env."""
    spec = find_spec(f"rlhf_env.{name}")
    if spec is None or spec.origin is None:
        return (
            False,
            f"rlhf_env.{name}",
            f"cannot be imported: the link rlhf_env/{name} -> ../{name} is broken or missing",
        )
    return True, f"rlhf_env.{name}", str(Path(spec.origin).resolve().parent)


def _torch() -> Iterator[tuple[bool, str, str]]:
    try:
        import torch
    except Exception as error:  # missing libraries of a driver raise OSError, others ImportError
        yield False, "torch", f"cannot be imported: {type(error).__name__}: {error}"
        return
    yield True, "threads", f"{torch.get_num_threads()} (OMP_NUM_THREADS or --threads decides)"
    devices = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    yield True, "devices", ", ".join(["cpu", *devices])
    if torch.version.cuda and not torch.cuda.is_available():
        yield True, "cuda", f"torch was built for CUDA {torch.version.cuda}, but no GPU can be used"


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3])


def _print_lines(sentences: dict[str, str]) -> None:
    width = max(map(len, sentences), default=0)
    for name, sentence in sentences.items():
        print(f"{name:<{width}}  {sentence}".rstrip())
