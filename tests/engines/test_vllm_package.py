"""Both wheels where nothing is installed but what lora-rt-vllm's metadata asks for, and what vLLM brings anyway."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "examples" / "lora-rt-vllm"
VLLM_BRINGS = ("torch", "transformers", "numpy", "setuptools")
HEAVY = ("peft", "bitsandbytes", "accelerate", "gguf")


def declared() -> list[str]:
    """The dependencies in lora-rt-vllm's metadata."""
    document = tomllib.loads((PLUGIN / "pyproject.toml").read_text())
    return [Requirement(text).name for text in document["project"]["dependencies"]]


def closure(names: list[str]) -> dict[str, Distribution]:
    """These distributions and all that they require on this platform."""
    found: dict[str, Distribution] = {}
    waiting = [Requirement(name) for name in names]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        if name in found:
            continue
        found[name] = distribution(name)
        for text in found[name].requires or []:
            further = Requirement(text)
            if further.marker is None or any(further.marker.evaluate({"extra": e}) for e in ("", *wanted.extras)):
                waiting.append(further)
    return found


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of lora-rt and of lora-rt-vllm, built from copies."""
    folder = tmp_path_factory.mktemp("wheels")
    ours = folder / "lora-rt"
    ours.mkdir()
    for name in ("core", "plugins", "registry"):
        shutil.copytree(ROOT / name, ours / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, ours)
    shutil.copytree(PLUGIN, folder / "plugin", ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "-w", folder / "out", ours, folder / "plugin"], check=True)
    return sorted((folder / "out").glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheels: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the two wheels, a fake of vLLM, and links to nothing else than they may need."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    for found in closure([*declared(), *VLLM_BRINGS]).values():
        names = {file.parts[0] for file in found.files or [] if ".." not in file.parts}
        tops = names - {"__pycache__"}
        for top in tops:
            place = Path(str(found.locate_file(top)))
            if place.exists() and not (packages / top).exists():
                (packages / top).symlink_to(place)
    shutil.copytree(ROOT / "tests" / "support" / "fake_vllm" / "vllm", packages / "vllm")
    where = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", where, "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*install, *wheels], check=True)
    return where


def run(python: Path, code: str, home: Path) -> str:
    """What a program prints there."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LORA_RT_HOME": str(home)}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=home.parent, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_registry_parsing_and_export_import_with_the_declared_dependencies(python: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.util, sys, lora_rt, lora_rt_vllm\n"
        f"print([name for name in {HEAVY!r} if importlib.util.find_spec(name)])\n"
        "lora_rt_vllm.register()\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)\n"
        "import lora_rt_vllm.launch, lora_rt_vllm.front, lora_rt_vllm.answers\n"
        "print(lora_rt.Composition.parse('emotion:0.7 logic:0.3'), len(lora_rt.Registry().installed()))\n"
        "print(lora_rt.Exporter.__name__, lora_rt.export.__name__)\n"
    )
    told = run(python, code, tmp_path / "home").splitlines()
    assert told == ["[]", "False False", "emotion:0.7 logic:0.3 5", "Exporter export"]


def test_a_composition_is_resolved_there(python: Path, tmp_path: Path) -> None:
    """The shipped registers over the default base, of which nothing but its shape is looked at."""
    code = (
        "import asyncio, importlib.metadata as m\n"
        "[point] = m.entry_points(group='vllm.general_plugins', name='lora_rt'); point.load()()\n"
        "from vllm.lora.resolver import LoRAResolverRegistry as r\n"
        "found = asyncio.run(r.get_resolver('lora-rt').resolve_lora('default', 'emotion:0.7 logic:0.3'))\n"
        "print(found.lora_path)\n"
    )
    folder = Path(run(python, code, tmp_path / "home").strip())
    assert folder.is_relative_to(tmp_path / "home" / "vllm")
    assert {path.name for path in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (tmp_path / "home" / "bases").exists()


def test_the_commands_that_fill_an_image_work_there(python: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "registry" / "shipped" / "emotion", tmp_path / "warm")
    (tmp_path / "lora-rt.toml").write_text('[adapters]\nwarm = "./warm"\n')
    code = (
        "from typer.testing import CliRunner; from lora_rt.core.cli.app import app\n"
        "for words in (['lock'], ['sync', '--frozen'], ['list', '--json']):\n"
        "    done = CliRunner().invoke(app, words); assert done.exit_code == 0, (words, done.output, done.exception)\n"
        "print('done')\n"
    )
    assert run(python, code, tmp_path / "home").strip() == "done"
    assert (tmp_path / "lora-rt.lock").is_file()


def test_neither_vllm_nor_what_it_can_not_take_is_asked_for() -> None:
    """pip would bring lora-rt's transformers into vLLM's environment, and break it."""
    assert not {"lora-rt", "vllm", "transformers", "torch", *HEAVY} & set(declared())


def test_both_state_one_version() -> None:
    ours, theirs = (tomllib.loads((path / "pyproject.toml").read_text())["project"] for path in (ROOT, PLUGIN))
    assert ours["version"] == theirs["version"]
    bounds = {Requirement(text).name: text for text in ours["dependencies"]}
    assert [text for text in theirs["dependencies"] if bounds[Requirement(text).name] != text] == []
