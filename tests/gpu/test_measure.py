"""The script that measures a GPU runs to its end on a CPU, so that a GPU's time is not spent on finding out."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_a_part_is_measured_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["measure.py", *arguments, "--out", str(tmp_path / "figures")])
        runpy.run_path(str(Path(__file__).with_name("measure.py")), run_name="__main__")
        return capsys.readouterr().out

    assert len(measure("sampling", "--tiny").splitlines()) == 6
    shown = measure("table").splitlines()
    assert shown[1] == "| base | what | system | figure |"
    assert [line.split(" | ")[2] for line in shown[3:]] == 2 * ["base", "ours", "ours, greedy"]
