"""The scripts of examples/ stand on the public face, and say what they take."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import lora_rt

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


def test_no_example_reaches_into_the_core() -> None:
    assert len(SCRIPTS) >= 6
    # What is measured on a GPU is the engine itself, in the laboratory of `lora-rt bench`.
    shown = [path for path in EXAMPLES.rglob("*.py") if path.parent.name != "gpu"]
    assert not [path for path in shown if re.search(r"lora_rt\.(core|registry)\b", path.read_text())]


def test_the_data_of_the_context_mode_is_made(tmp_path: Path, run: Run) -> None:
    code, _, error = run(EXAMPLES / "context" / "data.py", str(tmp_path / "data"))
    assert code == 0, error
    assert len((tmp_path / "data" / "adapters" / "logic.jsonl").read_text(encoding="utf-8").splitlines()) == 188


def test_every_name_of_the_public_face_is_there() -> None:
    assert [name for name in lora_rt.__all__ if not hasattr(lora_rt, name)] == []
    assert set(lora_rt.__all__) <= set(dir(lora_rt))
