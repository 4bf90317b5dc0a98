"""The scripts of examples/ stand on the public face, and say what they take."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import lora_rt

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.glob("*/*.py") if "__main__" in path.read_text(encoding="utf-8"))


def python(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One run of a script."""
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_script_says_what_it_takes_and_refuses_what_it_does_not(script: Path) -> None:
    told, refused = python(script, "--help"), python(script, "--nonsense")
    assert (told.returncode, told.stdout.split()[0]) == (0, "usage:"), told.stderr
    assert refused.returncode == 2, refused.stderr


def test_no_example_reaches_into_the_core() -> None:
    assert len(SCRIPTS) >= 6
    # What is measured on a GPU is the engine itself, in the laboratory of `lora-rt bench`.
    shown = [path for path in EXAMPLES.rglob("*.py") if path.parent.name != "gpu"]
    assert not [path for path in shown if re.search(r"lora_rt\.(core|registry)\b", path.read_text())]


def test_the_data_of_the_context_mode_is_made(tmp_path: Path) -> None:
    made = python(EXAMPLES / "context" / "data.py", str(tmp_path / "data"))
    assert made.returncode == 0, made.stderr
    assert len((tmp_path / "data" / "adapters" / "logic.jsonl").read_text(encoding="utf-8").splitlines()) == 188


def test_every_name_of_the_public_face_is_there() -> None:
    assert [name for name in lora_rt.__all__ if not hasattr(lora_rt, name)] == []
    assert set(lora_rt.__all__) <= set(dir(lora_rt))
