"""`lora-rt install` and `uninstall`: what pip did, and what that means for modes, in plain words."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from lora_rt.core.cli import pip
from lora_rt.core.cli.app import app
from lora_rt.core.cli.pip import Brought, PipError
from lora_rt.plugins.testing import tiny_base
from lora_rt.registry.inspection import inspect_adapter
from support.forks import Forks

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "fade-in-mode"
FADE = Brought("mode", "fade-in", "fade-in-mode", "0.1.0")
OURS = Brought("mode", "output-only", "lora-rt", "0.1.0")
run = CliRunner().invoke


class FakePip:
    """Stands in for pip: `changes` is what it installs or removes."""

    def __init__(self, changes: set[Brought], also: set[Brought]) -> None:
        self.things = also | {OURS}
        self.changes = changes
        self.commands: list[list[str]] = []
        self.status = ("ok", "")

    def install(self, arguments: list[str]) -> list[str]:
        self.commands.append(list(arguments))
        self.things = self.things | self.changes
        return sorted({thing.package for thing in self.changes})

    def uninstall(self, packages: list[str]) -> None:
        self.commands.append(list(packages))
        self.things = self.things - self.changes

    def mode_records(self) -> list[dict[str, Any]]:
        status, reason = self.status
        return [
            {"name": thing.name, "package": thing.package, "status": status, "reason": reason}
            for thing in self.things
            if thing.kind == "mode"
        ]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(changes: set[Brought] = frozenset(), also: set[Brought] = frozenset()) -> FakePip:  # type: ignore[assignment]
        made = FakePip(set(changes), set(also))
        for name in ("install", "uninstall", "mode_records"):
            monkeypatch.setattr(pip, name, getattr(made, name))
        monkeypatch.setattr(pip, "brought", lambda: made.things)
        return made

    return make


def test_installing_says_which_modes_and_adapters_came(fake: Any) -> None:
    calm = Brought("adapter", "calm", "fade-in-mode", "0.1.0")
    made = fake({FADE, calm})
    result = run(app, ["install", "--upgrade", "fade-in-mode>=0.1", "--index-url", "https://example.org/simple"])
    assert result.exit_code == 0
    assert result.stdout == "adapter calm (fade-in-mode 0.1.0): ready\nmode fade-in (fade-in-mode 0.1.0): ready\n"
    assert made.commands == [["--upgrade", "fade-in-mode>=0.1", "--index-url", "https://example.org/simple"]]


@pytest.mark.parametrize(
    "written", ["fade-in-mode", "Fade_In.Mode==0.1", "fade-in-mode[extra]", "fade-in-mode @ file:///x"]
)
def test_a_package_that_is_there_already_is_told_again(written: str, fake: Any) -> None:
    fake(also={FADE})
    assert run(app, ["install", written]).stdout == "mode fade-in (fade-in-mode 0.1.0): ready\n"


def test_a_package_without_a_mode_is_said_to_be_one(fake: Any) -> None:
    fake()
    error = run(app, ["install", "numpy"]).exception
    assert isinstance(error, PipError)
    assert error.message == "pip has installed numpy, which brings no mode and no adapter"


def test_an_engine_of_the_server_is_something_that_a_package_brings(
    fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = tmp_path / "far_engine-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: far-engine\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[lora_rt.engines]\nfar = far_engine:serve\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    engine = Brought("engine", "far", "far-engine", "1.0")
    assert engine in pip.brought()
    fake({engine})
    assert run(app, ["install", "far-engine"]).stdout == "engine far (far-engine 1.0): ready\n"
    fake({engine}, also={engine})
    assert run(app, ["uninstall", "far-engine"]).stdout == "engine far (far-engine 1.0): gone\n"


def test_a_mode_that_does_not_load_is_named_at_once(fake: Any) -> None:
    fake({FADE}).status = ("broken", "import: ModuleNotFoundError: No module named 'nowhere'")
    error = run(app, ["install", "fade-in-mode"]).exception
    assert isinstance(error, PipError)
    assert error.problems == (
        "mode fade-in (fade-in-mode 0.1.0) is broken: import: ModuleNotFoundError: No module named 'nowhere'",
    )


def test_uninstalling_says_which_modes_went(fake: Any) -> None:
    made = fake({FADE}, also={FADE})
    result = run(app, ["uninstall", "Fade_In_Mode"])
    assert (result.exit_code, result.stdout) == (0, "mode fade-in (fade-in-mode 0.1.0): gone\n")
    assert made.commands == [["Fade_In_Mode"]]


@pytest.mark.parametrize(
    ("package", "message"),
    [
        ("torch", "no package torch that brings a mode or an adapter is installed"),
        ("lora_rt", "lora_rt is lora-rt itself"),
        ("fade-in", "fade-in is not a package; it comes from the package fade-in-mode"),
    ],
)
def test_only_plugins_are_uninstalled(package: str, message: str, fake: Any) -> None:
    made = fake(also={FADE})
    error = run(app, ["uninstall", package]).exception
    assert isinstance(error, PipError)
    assert (error.message, made.commands) == (message, [])
    error = run(app, ["uninstall", "fade-in-mode", package, "another"]).exception
    assert isinstance(error, PipError)
    assert len(error.problems) == 2
    assert made.commands == [], "all or nothing"


def test_what_pip_leaves_behind_is_said(fake: Any) -> None:
    fake(also={FADE})
    error = run(app, ["uninstall", "fade-in-mode"]).exception
    assert isinstance(error, PipError)
    assert error.message == "pip left fade-in-mode where it is"


def test_pips_own_errors_are_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without asking an index: a folder that is not there; and whether this process has imported distutils or not."""
    monkeypatch.setitem(sys.modules, "distutils", ModuleType("distutils"))
    error = run(app, ["install", "--no-index", "./no-such-folder"]).exception
    assert isinstance(error, PipError)
    assert error.message == "pip install failed: Invalid requirement: './no-such-folder'"
    assert "-m pip install --no-index ./no-such-folder" in error.next_step


def test_a_python_without_pip_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.machinery.PathFinder.find_spec", lambda name: None)
    with pytest.raises(PipError, match="this Python has no pip") as caught:
        pip.uninstall(["x"])
    assert caught.value.next_step.endswith("-m ensurepip")


def test_usage_without_a_package_is_usage() -> None:
    assert run(app, ["install"]).exit_code == 2
    assert run(app, ["uninstall"]).exit_code == 2


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's wheel; built from a copy, so that setuptools leaves nothing in the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(
        EXAMPLE, folder / "source", ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    )
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


def test_a_strangers_package_is_installed_used_and_uninstalled(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm: Forks
) -> None:
    """The whole way, with the commands that a user types, in a fresh environment."""
    base = tiny_base(tmp_path / "tiny")
    data = tmp_path / "pairs.jsonl"
    pairs = [{"scene": f"rain {i}", "text": f"It rains {i} times."} for i in range(8)]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    on = ["--base", str(base), "--precision", "float32", "--device", "cpu"]
    train = ["train", "rain", "--data", str(data), *on, "--r", "2", "--epochs", "1", "--batch-size", "8"]
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("COLUMNS", "200")

    def modes() -> dict[str, str]:
        return {record["name"]: record["status"] for record in json.loads(warm(["plugins", "--json"]).out)}

    missing = warm([*train, "--mode", "fade-in"])
    assert missing.code == 2
    assert "no plugin provides the mode 'fade-in'" in missing.err
    assert "lora-rt install PACKAGE" in missing.err

    came = warm(["install", str(wheel)])
    assert (came.code, came.out) == (0, "mode fade-in (fade-in-mode 0.1.0): ready\n"), came.err
    assert modes()["fade-in"] == "ok"

    trained = warm([*train, "--mode", "fade-in", "--option", "tokens=4"])
    assert trained.code == 0, trained.err
    spoken = warm(["compose", "rain:0.7", *on, "-p", "rain", "--max-new-tokens", "6", "--json"])
    assert spoken.code == 0, spoken.err
    assert json.loads(spoken.out)["terms"][0]["mode"] == "fade-in"

    adapter = next((tmp_path / "home" / "store").rglob("register.json")).parent
    copied = warm(["fade-in", str(adapter), str(tmp_path / "fading"), "--tokens", "3"])
    assert copied.code == 0, copied.err
    inspected = inspect_adapter(tmp_path / "fading", name="fading")
    assert (inspected.mode, load_file(tmp_path / "fading" / "mode.safetensors")["tokens"].item()) == ("fade-in", 3)

    gone = warm(["uninstall", "fade-in-mode"])
    assert gone.code == 0, gone.err
    assert gone.out.splitlines() == [
        "mode fade-in (fade-in-mode 0.1.0): gone",
        "  the adapter rain needs it and can't be used until it is back",
    ]
    assert "fade-in" not in modes()
    assert warm(["fade-in", str(adapter), str(tmp_path / "again")]).code == 2
