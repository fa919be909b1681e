"""sdist → wheel: the top-level folders arrive under rlhf_env, and nothing lands outside it."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from safetensors.torch import load

import rlhf_env

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel built from the sdist built from a copy of the sources, without the network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("rlhf_env", "agents", "reward_models"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    build = subprocess.run(command, capture_output=True, text=True)
    assert build.returncode == 0, build.stdout + build.stderr
    assert len(list(out.glob("*.tar.gz"))) == 1
    (wheel,) = out.glob("*.whl")
    return wheel


def test_wheel_holds_every_module_once_and_under_rlhf_env_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    packaged = sorted(name for name in names if name.endswith(".py"))
    # os.walk, here in rglob, does not enter the symlinks rlhf_env/agents and rlhf_env/reward_models.
    sources = [path.relative_to(ROOT) for path in ROOT.glob("rlhf_env/**/*.py")]
    sources = [path for path in sources if path.parts[1] not in ("agents", "reward_models")]
    for folder in ("agents", "reward_models"):
        sources += [Path("rlhf_env") / path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py")]
    assert packaged == sorted(path.as_posix() for path in sources)
    assert {name.partition("/")[0] for name in names} == {"rlhf_env", f"rlhf_env-{rlhf_env.__version__}.dist-info"}


def test_wheel_carries_the_models_of_the_reviews(wheel):
    """So that `gym.make("rlhf_env/Reviews-v0")` works at once; small enough to ship."""
    archive = zipfile.ZipFile(wheel)
    folder = "rlhf_env/worlds/assets/"
    packaged = {i.filename: i.file_size for i in archive.infolist() if i.filename.startswith(folder)}
    sources = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    assert sorted(packaged) == sorted(path.relative_to(ROOT).as_posix() for path in sources)
    for model in ("reference", "proxy"):
        for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            assert f"{folder}reviews/{model}/{file}" in packaged
    assert sum(packaged.values()) <= 1_300_000
    parameters = 0
    for name in packaged:
        if name.endswith(".safetensors"):
            parameters += sum(tensor.numel() for tensor in load(archive.read(name)).values())
    assert 0 < parameters <= 300_000


def test_wheel_is_marked_as_typed_and_carries_licence_and_command(wheel):
    archive = zipfile.ZipFile(wheel)
    info = f"rlhf_env-{PYPROJECT['project']['version']}.dist-info"
    assert {"rlhf_env/py.typed", f"{info}/licenses/LICENSE"} <= set(archive.namelist())
    assert "rlhf-env = rlhf_env.cli:main" in archive.read(f"{info}/entry_points.txt").decode()


def test_version_is_the_same_everywhere():
    assert rlhf_env.__version__ == PYPROJECT["project"]["version"]
    assert f"version: {rlhf_env.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_every_package_folder_is_listed():
    folders = {path.parent.relative_to(ROOT) for path in ROOT.glob("rlhf_env/**/__init__.py")}
    for name in ("agents", "reward_models"):
        folders |= {Path("rlhf_env") / path.parent.relative_to(ROOT) for path in (ROOT / name).rglob("__init__.py")}
    assert {".".join(folder.parts) for folder in folders} == set(PYPROJECT["tool"]["setuptools"]["packages"])
