"""Files and folders are replaced whole, or stay as they were."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from rlhf_env.records.atomic import is_partial, settle_folder, write_atomic, write_folder_atomic


def writing(text: str):
    def fill(folder: Path) -> None:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text(text)

    return fill


def test_a_folder_is_replaced_with_all_it_holds(tmp_path):
    path = tmp_path / "some" / "folder"
    write_folder_atomic(path, writing("one"))
    (path / "stale").touch()
    write_folder_atomic(path, writing("two"))
    assert [file.relative_to(path) for file in path.rglob("*")] == [Path("deep"), Path("deep/file")]
    assert (path / "deep/file").read_text() == "two"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_is_not_filled_does_not_replace_another(tmp_path):
    path = tmp_path / "folder"
    write_folder_atomic(path, writing("one"))

    def half(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder_atomic(path, half)
    assert (path / "deep/file").read_text() == "one" and not (path / "half").exists()
    assert all(is_partial(other) for other in tmp_path.iterdir() if other != path)
    write_folder_atomic(path, writing("two"))
    assert (path / "deep/file").read_text() == "two" and list(tmp_path.iterdir()) == [path]


def test_between_two_renames_nothing_is_half(tmp_path, monkeypatch):
    path, rename = tmp_path / "folder", os.rename
    write_folder_atomic(path, writing("one"))

    def killed(source: Path, target: Path) -> None:
        if target == path:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        write_folder_atomic(path, writing("two"))
    monkeypatch.undo()
    assert not path.exists()
    write_folder_atomic(path, writing("two"))
    assert (path / "deep/file").read_text() == "two" and list(tmp_path.iterdir()) == [path]


def test_a_file_is_there_whole(tmp_path):
    write_atomic(tmp_path / "file", b"one")
    write_atomic(tmp_path / "file", b"two")
    assert (tmp_path / "file").read_bytes() == b"two" and list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize("renames", [0, 1, 2], ids=["while it is filled", "between the renames", "before it clears up"])
def test_after_a_kill_a_folder_is_whole_and_nothing_is_beside_it(renames, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def fill(text: str):
        return lambda folder: (folder / "file").write_text(text)

    write_folder_atomic(tmp_path / "best", fill("old"))
    done, rename, remove = [], os.rename, shutil.rmtree

    def renamed(*places):
        if len(done) == renames:
            raise Killed
        done.append(rename(*places))

    def removed(place, **kwargs):
        if len(done) == 2:
            raise Killed
        remove(place, **kwargs)

    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(shutil, "rmtree", removed)
    with pytest.raises(Killed):
        write_folder_atomic(tmp_path / "best", fill("new"))
    monkeypatch.undo()
    assert any(is_partial(path) for path in tmp_path.iterdir())
    settle_folder(tmp_path / "best")
    assert [path.name for path in tmp_path.iterdir()] == ["best"]
    assert (tmp_path / "best" / "file").read_text() == ("new" if renames == 2 else "old")
