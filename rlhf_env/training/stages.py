"""Stages that make a whole: each has a run folder of its own, whose model or file is the input of later ones.

A stage is finished once its summary.json is there, so that what was killed at any moment goes on with the stage it was
in, and becomes what it would have become.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from rlhf_env.errors import ConfigError
from rlhf_env.records.config import Layer, build, flat, read_layer, to_dict
from rlhf_env.records.jsonl import read_jsonl, write_jsonl
from rlhf_env.records.run import Run, require_free
from rlhf_env.training.run import changed_settings

T = TypeVar("T")

RESULTS = ("summary.json", "report.html", "README.md")

#: Shows a stage: given its name and its config, a context whose value is told how the stage goes on.
Watch = Callable[[str, Any], AbstractContextManager[Callable[..., None]]]


@dataclass(frozen=True)
class Stage:
    """One step of several: what it is told, and what does it. Its name is its folder below that of the whole."""

    name: str
    config: Any
    run: Callable[[Path, Callable[..., None]], Any]
    resumable: bool = False


def section(
    kind: type[T],
    config: Any,
    name: str,
    wiring: Mapping[str, Any],
    usual: Mapping[str, Any] = {},  # noqa: B006
    *,
    whole: str = "pipeline",
) -> T:
    """The settings of a stage: those of its section `name` in `config`, over those that all stages share.

    `wiring` connects the stage with others, so that its section must not say it; `usual` are defaults of its own.
    """
    shared = {key: getattr(config, key) for key in ("seed", "device", "dtype", "num_envs")}
    shared["env"] = to_dict(config.env)
    given = getattr(config, name)
    if wired := next((key for key in given if key in wiring), None):
        own = "reward_model" if wired == "reward" else wired
        instead = f"; the {whole}'s setting for it is {own}" if hasattr(config, own) else ""
        raise ConfigError(f"{name}.{wired} is what the {whole} connects its stages by: leave it out{instead}")
    known = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    defaults = {key: value for key, value in {**shared, **usual}.items() if key in known}
    layers = [Layer(f"the {whole}", defaults), Layer(f"the {whole}", wiring), Layer(f"the {whole}'s settings", given)]
    return build(kind, *layers, prefix=f"{name}.")


def begin(
    config: Any,
    out: Path,
    stages: Sequence[Stage],
    prompts: Sequence[str],
    eval_prompts: Sequence[str],
    *,
    folders: Iterable[str],
    whole: str = "pipeline",
) -> Run:
    """Begin, or take up again, a whole in the folder `out`: write its settings, and the prompts that its stages share.

    These are in prompts/train.jsonl and prompts/eval.jsonl. Refuses a folder that holds something else, and settings
    that contradict a stage which is there already; `folders` are the names under which there may be stages.
    """
    files = {
        out / "prompts" / f"{name}.jsonl": [{"prompt": text} for text in texts]
        for name, texts in (("train", prompts), ("eval", eval_prompts))
    }
    if (out / "config.yaml").is_file():
        _require_same(type(config), out, stages, files, folders, whole)
    else:
        require_free(out)
    if not all(Run(out / stage.name).finished for stage in stages):
        for result in RESULTS:  # of the stages as they were
            (out / result).unlink(missing_ok=True)
    run = Run.create(out, to_dict(config), again=True)
    (out / "prompts").mkdir(exist_ok=True)
    for file, rows in files.items():
        write_jsonl(file, rows)
    return run


def finish(stage: Stage, out: Path, watch: Watch | None = None) -> None:
    """Do what there is still to do of a stage of the whole in `out`."""
    folder = out / stage.name
    if Run(folder).finished:
        return
    if folder.exists() and not _begun(stage, folder):
        shutil.rmtree(folder)  # the rest of an interrupted stage, which is made anew
    with (watch or _unwatched)(stage.name, stage.config) as show:
        stage.run(folder, show)


def _begun(stage: Stage, folder: Path) -> bool:
    """Whether a stage has come to something that shall not be made anew."""
    return Run(folder).finished or (stage.resumable and (folder / "config.yaml").is_file())


def _require_same(
    kind: type,
    out: Path,
    stages: Sequence[Stage],
    files: Mapping[Path, list[dict[str, Any]]],
    folders: Iterable[str],
    whole: str,
) -> None:
    try:
        build(kind, read_layer(out / "config.yaml"))
    except ConfigError as error:
        raise ConfigError(f"{out} holds another run, not a {whole}: choose another folder ({error})") from error
    there = [stage.name for stage in stages if _begun(stage, out / stage.name)]
    planned = {stage.name for stage in stages}
    if useless := [name for name in folders if (out / name).exists() and name not in planned]:
        raise ConfigError(f"{out} holds {useless[0]}, which these settings leave out: choose another folder")
    for i, stage in enumerate(stages):
        later = [other.name for other in stages[i + 1 :] if other.name in there]
        if stage.name not in there and later:
            raise ConfigError(f"{out}: {later[0]} was made from another {stage.name}; to go on, {_delete(out, later)}")
        if stage.name in there and (changed := _changed(stage, out)):
            raise ConfigError(
                f"{out}: {stage.name} was begun with another {', '.join(changed)}; choose another folder, or, to do it "
                f"again, {_delete(out, [stage.name, *later])}"
            )
    for file, rows in files.items():
        if there and file.is_file() and read_jsonl(file) != rows:
            raise ConfigError(
                f"{out}: {', '.join(there)} used other prompts than those of these settings: choose another folder"
            )


def _changed(stage: Stage, out: Path) -> list[str]:
    """What differs in the settings of a stage that is there, but for where the folder of the whole was then."""
    now, then = flat(to_dict(stage.config)), flat(read_layer(out / stage.name / "config.yaml").values)
    changed = changed_settings(stage.config, out / stage.name)
    return [key for key in changed if not _moved(now.get(key), then.get(key), out)]


def _moved(now: Any, then: Any, out: Path) -> bool:
    """Whether two settings are the same files of a whole that is in `out` now: one path, or several with commas."""
    names, before = str(now).split(","), str(then).split(",")
    inside = isinstance(now, str) and all(name.startswith(f"{out}/") for name in names)
    same = all(a.endswith(b.removeprefix(str(out))) for a, b in zip(before, names, strict=False))
    return inside and same and len(names) == len(before)


def _delete(out: Path, names: Sequence[str]) -> str:
    return f"delete {' '.join(str(out / name) for name in names)}"


@contextmanager
def _unwatched(name: str, config: Any) -> Iterator[Callable[..., None]]:
    yield lambda *args: None
