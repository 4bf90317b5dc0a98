"""Memory, cold start and training, in processes of their own and their parts in this one."""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lora_rt.core.benchmark import child
from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.processes import BARE, answer_of, in_process, seconds_to_first_byte, write_pairs
from lora_rt.core.benchmark.workloads import BenchmarkError, Workload

pytestmark = pytest.mark.slow

SMALL = Workload("small", "small", rows=2, resident=2, active=2, prompt_tokens=4, new_tokens=2, rank=4)


def test_the_peak_of_a_system_is_that_of_a_process_of_its_own(lab: Lab) -> None:
    sample = in_process(lab, "base", replace(SMALL, kind="memory"))()
    assert (
        50 < sample.megabytes < child.peak_megabytes(lab.device) * 2
    )  # it has imported torch, and nothing of this process


def test_a_cold_start_of_compose_ends_with_its_first_token(disk_lab: Lab) -> None:
    sample = in_process(disk_lab, "ours", replace(SMALL, kind="cold"))()
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
    files = {name: Path(file) for name, file in write_pairs(tmp_path).items()}
    few = files["data"].read_text().splitlines(keepends=True)[:4]
    files["data"].write_text("".join(few))
    workload = replace(SMALL, kind="training", targets=("q_proj",))
    lesson = child.Lesson(disk_lab.elsewhere(), workload, batch_size=2, **files)
    lengths = {len(ids) for ids, _ in child.sequences(lesson)}
    assert len(lengths) > 1
    found = []
    for train in (child.train_ours, child.train_plainly):
        folder = tmp_path / train.__name__
        folder.mkdir()
        sample = train(lesson, folder)
        assert sample.seconds > 0
        found.append(sample.tokens)
    assert found[0] == found[1] == sum(len(ids) for ids, _ in child.sequences(lesson))


def test_a_process_that_fails_is_told_of_with_the_end_of_its_errors(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="no_such_module") as caught:
        answer_of("lora_rt.no_such_module", {}, tmp_path)
    assert caught.value.problems
    with pytest.raises(BenchmarkError):
        seconds_to_first_byte([sys.executable, "-c", "pass"], tmp_path)
