"""Checkpoints that survive a kill at any moment and can hold no code: safetensors, JSON, and a SHA-256 manifest."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_env.errors import ConfigError, DataError
from rlhf_env.records.atomic import sync
from rlhf_env.records.jsonl import read_json, write_json

_FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` found, its bytes verified."""

    step: int
    tensors: dict[str, dict[str, Tensor]]  #: by group and name, on the CPU
    state: dict[str, Any]  #: JSON values
    path: Path  #: the folder; `path / "model"` is what `write_model` wrote


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    write_model: Callable[[Path], None] | None = None,
    keep: int = 2,
) -> Path:
    """Write `folder`/step-00000120 completely or not at all, then drop all but the `keep` newest up to it.

    Each group of `tensors` becomes one safetensors file, `state` a JSON file, and `write_model`, if given, fills a
    subfolder "model" it is called with. One process writes to a folder at a time.
    """
    if keep < 1:
        raise ConfigError(f"keep must be at least 1, got {keep}: the newest checkpoint always stays")
    folder.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.glob(".tmp-*"):
        shutil.rmtree(abandoned)
    partial, final = folder / f".tmp-{step:08d}", folder / f"step-{step:08d}"
    partial.mkdir()
    for group, named in tensors.items():
        save_file(_unshared(named), partial / f"{group}.safetensors")
    write_json(partial / "state.json", state)
    if write_model is not None:
        (partial / "model").mkdir()
        write_model(partial / "model")
    files = {name: _digest(partial / name) for name in _files(partial)}
    write_json(partial / "manifest.json", {"format": _FORMAT, "step": step, "files": files})
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    _discard(final)  # there only if a run went back behind this step
    os.rename(partial, final)
    sync(folder)
    older = [path for number, path in _by_step(folder) if number < step]
    for path in older[: len(older) - (keep - 1)]:
        _discard(path)
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, after checking every file against the manifest; nothing is unpickled."""
    manifest = _manifest(path)
    for name, entry in manifest["files"].items():
        if _digest(path / name) != entry:
            raise DataError(f"{path / name}: not the file that was saved (its SHA-256 differs): do not use {path}")
    tensors = {}
    for name in manifest["files"]:
        if "/" not in name and name.endswith(".safetensors"):
            try:
                tensors[name.removesuffix(".safetensors")] = load_file(path / name)
            except SafetensorError as error:
                raise DataError(f"{path / name}: {error}") from error
    return Checkpoint(manifest["step"], tensors, read_json(path / "state.json"), path)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, if any: every file of its manifest is there in full size."""
    for _, path in reversed(_by_step(folder)):
        try:
            _manifest(path)
        except DataError:
            continue
        return path
    return None


def flatten_state(state: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split nested dicts, lists and tuples, such as an optimizer's `state_dict`, into named tensors and a JSON tree."""
    tensors: dict[str, Tensor] = {}

    def flatten(value: Any, place: str) -> Any:
        if isinstance(value, Tensor):
            name = f"{len(tensors)}{place}"  # the number keeps {"a/b": …} and {"a": {"b": …}} apart
            tensors[name] = value
            return {"tensor": name}
        if isinstance(value, Mapping):
            if not all(type(key) in (str, int) for key in value):
                raise DataError(f"state{place}: keys must be strings or integers, to be stored as JSON")
            return {"dict": [[key, flatten(item, f"{place}/{key}")] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [flatten(item, f"{place}/{i}") for i, item in enumerate(value)]}
        if value is None or isinstance(value, (str, int, float)):
            return value
        raise DataError(f"state{place}: a {type(value).__name__} can be stored neither as a tensor nor as JSON")

    return tensors, {"state": flatten(state, "")}


def unflatten_state(tensors: Mapping[str, Tensor], tree: Mapping[str, Any]) -> Any:
    """What `flatten_state` was given, bit by bit."""

    def unflatten(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "dict":
            return {key: unflatten(item) for key, item in content}
        return (tuple if kind == "tuple" else list)(unflatten(item) for item in content)

    return unflatten(tree["state"])


def _unshared(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which no two share memory, as safetensors wants them: tied weights are written twice."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in named.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return separate


def _manifest(path: Path) -> dict[str, Any]:
    manifest = read_json(path / "manifest.json")
    if manifest.get("format") != _FORMAT:
        raise DataError(
            f"{path / 'manifest.json'}: format {manifest.get('format')!r} is unknown, {_FORMAT} was expected"
        )
    files = manifest.get("files")
    if not (isinstance(files, dict) and all(isinstance(entry, dict) for entry in files.values())):
        raise DataError(f"{path / 'manifest.json'}: this is no manifest of a checkpoint")
    if type(manifest.get("step")) is not int:
        raise DataError(f"{path / 'manifest.json'}: the step is no integer")
    present = _files(path)
    for name in sorted(present ^ files.keys()):
        raise DataError(f"{path / name}: {'not in the manifest' if name in present else 'missing'}; do not use {path}")
    for name, entry in files.items():
        if (path / name).stat().st_size != entry.get("size"):
            raise DataError(f"{path / name}: not the size that was saved: do not use {path}")
    return manifest


def _files(path: Path) -> set[str]:
    files = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    return files - {"manifest.json"}


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _by_step(folder: Path) -> list[tuple[int, Path]]:
    names = (path.name.removeprefix("step-") for path in folder.glob("step-*"))
    return sorted((int(name), folder / f"step-{name}") for name in names if name.isdecimal())


def _discard(path: Path) -> None:
    """Remove a checkpoint so that no half of it is ever taken for one."""
    if path.exists():
        doomed = path.with_name(f".tmp-old-{path.name}")
        os.rename(path, doomed)
        shutil.rmtree(doomed)
