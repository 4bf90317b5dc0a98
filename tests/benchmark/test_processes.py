"""Memory, cold start and training, in processes of their own and their parts in this one."""

from __future__ import annotations

import os
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lora_rt.core.base.machine import peak_megabytes
from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.session import BARE, call_apart, first_byte, ready
from lora_rt.core.benchmark.training import sequences, train_ours, train_plainly
from lora_rt.core.benchmark.workloads import BenchmarkError, Workload

pytestmark = pytest.mark.slow

SMALL = Workload("small", "small", rows=2, resident=2, active=2, prompt_tokens=4, new_tokens=2, rank=4)


def test_the_peak_of_a_system_is_that_of_a_process_of_its_own(lab: Lab) -> None:
    with ready(lab, replace(SMALL, kind="memory"), ["base"]) as systems:
        sample = systems["base"]()
    # It has imported torch, and nothing of this process.
    assert 50 < sample.megabytes < peak_megabytes(lab.device) * 2


def test_a_cold_start_of_compose_ends_with_its_first_token(disk_lab: Lab) -> None:
    with ready(disk_lab, replace(SMALL, kind="cold"), ["ours"]) as systems:
        sample = systems["ours"]()
    assert sample.seconds > 0.5  # Python, torch and a base are not there at once


def test_the_bare_script_says_a_token_alone_and_under_adapters(
    disk_lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = disk_lab.adapters(SMALL)
    plain = ["bare.py", str(disk_lab.base.folder), "float32", "cpu", "ab"]
    for arguments in (plain, [*plain, *(f"{name}={weight}={paths[name]}" for name, weight in SMALL.mix(0))]):
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path(str(BARE), run_name="__main__")
        assert capsys.readouterr().out.strip().startswith("'")


def test_both_trainings_read_the_same_tokens_of_texts_of_many_lengths(disk_lab: Lab, tmp_path: Path) -> None:
    workload, origin = replace(SMALL, kind="training", targets=("q_proj",)), disk_lab.elsewhere()
    lengths = [len(ids) for ids, _ in sequences(origin, 4)]
    assert len(set(lengths)) > 1
    for train in (train_ours, train_plainly):
        folder = tmp_path / train.__name__
        folder.mkdir()
        sample = train(origin, workload, folder, examples=4)
        assert sample.seconds > 0
        assert sample.tokens == sum(lengths)


def test_a_process_that_fails_is_told_of_with_the_end_of_its_errors(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="cpu_count") as caught:
        call_apart(tmp_path, os.cpu_count)  # type: ignore[arg-type]  # which takes no folder
    assert "TypeError" in caught.value.problems[-1]
    with pytest.raises(BenchmarkError):
        first_byte(tmp_path, [sys.executable, "-c", "pass"])
