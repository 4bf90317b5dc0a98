"""The package: what is installed, what is not, and what stands where."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {"lora_rt.core": "core", "lora_rt.plugins": "plugins", "lora_rt.registry": "registry"}


def packages_on_disk() -> set[str]:
    found = {"lora_rt"}
    for package, folder in FOLDERS.items():
        for marker in (ROOT / folder).rglob("__init__.py"):
            if "_package" not in marker.parts:
                found.add(".".join([package, *marker.parent.relative_to(ROOT / folder).parts]))
    return found


def test_every_folder_with_code_is_listed_as_a_package() -> None:
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages_on_disk()


def test_every_folder_that_holds_python_files_is_a_package() -> None:
    loose = {
        str(file.parent.relative_to(ROOT))
        for folder in FOLDERS.values()
        for file in (ROOT / folder).rglob("*.py")
        if not (file.parent / "__init__.py").exists()
    }
    assert loose == set()


def test_nothing_of_ours_is_installed_outside_lora_rt() -> None:
    assert all(name == "lora_rt" or name.startswith("lora_rt.") for name in PROJECT["tool"]["setuptools"]["packages"])


def test_every_entry_point_of_the_project_is_installed() -> None:
    for group, points in PROJECT["project"]["entry-points"].items():
        installed = {
            point.name: point.value
            for point in entry_points(group=group)
            if point.dist and point.dist.name == "lora-rt"
        }
        assert installed == points


def test_every_dependency_and_tool_is_pinned_in_the_constraints() -> None:
    pinned = {
        line.partition("==")[0].lower().replace("-", "_")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    wanted = [
        *PROJECT["project"]["dependencies"],
        *(d for extra in PROJECT["project"]["optional-dependencies"].values() for d in extra),
    ]
    names = {d.split(">=")[0].split("[")[0].lower().replace("-", "_") for d in wanted} - {"lora_rt"}
    assert names - pinned == set()


def test_the_version_is_stated_once_in_two_places_that_agree() -> None:
    import lora_rt

    assert lora_rt.__version__ == PROJECT["project"]["version"]


def test_the_example_projects_lock_fits_what_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "examples/project")
    done = subprocess.run([sys.executable, "-m", "lora_rt", "lock", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
