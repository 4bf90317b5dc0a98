"""The scripts of examples/ stand on the public face, and say what they take."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

import lora_rt
from support.tiny import Zoo

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.glob("*/*.py") if "__main__" in path.read_text(encoding="utf-8"))


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run(script, ...): its exit code, standard output and standard error, in this process: torch is imported once."""

    def run_script(script: Path, *arguments: str) -> tuple[int, str, str]:
        before = set(sys.modules)
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        monkeypatch.syspath_prepend(str(script.parent))
        code = 0
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as ended:
            code = int(ended.code or 0)
        for name in set(sys.modules) - before:  # the next script's neighbours may have the same names
            if str(EXAMPLES) in (getattr(sys.modules[name], "__file__", None) or ""):
                del sys.modules[name]
        return code, *capsys.readouterr()

    return run_script


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_script_says_what_it_takes_and_refuses_what_it_does_not(script: Path, run: Run) -> None:
    code, told, _ = run(script, "--help")
    assert (code, told.split()[0]) == (0, "usage:")
    assert run(script, "--nonsense")[0] == 2


def imported(script: Path) -> Iterator[str]:
    """The full name of everything that a script imports, wherever in it."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_examples_import_the_public_face_and_the_contract_with_modes_alone() -> None:
    assert len(SCRIPTS) >= 6
    inner = re.compile(r"lora_rt\.(core|registry|plugins(?!\.(contract|testing)\b))\b")
    reached = {f"{script.parent.name}/{script.name}": [*imported(script)] for script in EXAMPLES.rglob("*.py")}
    assert {script: found for script, names in reached.items() if (found := [*filter(inner.match, names)])} == {}


def test_what_the_script_for_a_gpu_runs_is_there() -> None:
    named = re.findall(r"\$top/([\w./]+)", (EXAMPLES / "gpu" / "measure.sh").read_text(encoding="utf-8"))
    assert "tests/gpu" in named
    assert [name for name in named if not (EXAMPLES.parent / name).exists()] == []


def test_the_data_of_the_context_mode_is_made(tmp_path: Path, run: Run) -> None:
    code, _, error = run(EXAMPLES / "context" / "data.py", str(tmp_path / "data"))
    assert code == 0, error
    assert len((tmp_path / "data" / "adapters" / "logic.jsonl").read_text(encoding="utf-8").splitlines()) == 188


def test_the_options_in_a_file_are_those_of_the_shipped_registers() -> None:
    given = yaml.safe_load((EXAMPLES / "training" / "run.yaml").read_text(encoding="utf-8"))
    recipe = (EXAMPLES / "registers" / "train.sh").read_text(encoding="utf-8")
    assert [option for option, value in given.items() if f"--{option} {value} " not in recipe] == []


def test_a_program_composes_rows_streams_and_a_running_batch(zoo: Zoo, run: Run) -> None:
    adapters = [str(zoo.adapter("llama", seed=seed)) for seed in (1, 2)]
    over = ["--base", str(zoo.base("llama")), "--precision", "float32", "--max-new-tokens", "4"]
    code, told, error = run(EXAMPLES / "compose" / "program.py", *adapters, *over)
    assert code == 0, error
    assert told.count(" after 4 tokens)") == 3


def test_every_name_of_the_public_face_is_there() -> None:
    assert [name for name in lora_rt.__all__ if not hasattr(lora_rt, name)] == []
    assert set(lora_rt.__all__) <= set(dir(lora_rt))
