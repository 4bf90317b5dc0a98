"""The table says what was measured, in which unit, beside what, and why something was not."""

from __future__ import annotations

import io
from dataclasses import asdict
from typing import Any

import pytest
from rich.console import Console

from lora_rt.core.base.progress import PlainConsole
from lora_rt.core.benchmark.results import Measured, Sample, noise, rows, shown
from lora_rt.core.benchmark.workloads import Workload

SYSTEMS = ("base", "ours", "peft-set", "peft-trainer", "llama.cpp")
MISSING = {"llama.cpp": "xllamacpp is not installed"}


def text_of(*items: Measured, columns: int = 100) -> str:
    document: dict[str, Any] = {
        "machine": {"cpu": "a processor", "threads": 2, "cores": 4, "memory_gib": 8.0, "load": 0.1},
        "versions": {"torch": "2.9"},
        "base": "some/base",
        "precision": "int4",
        "systems": SYSTEMS,
        "workloads": [asdict(item.workload) for item in items],
        "rows": rows(items, SYSTEMS),
    }
    console = Console(width=columns, file=io.StringIO())
    console.print(shown(document))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def decode() -> Measured:
    return Measured(
        Workload("d", "decode 16 rows"),
        {"base": [Sample(1.0, 500)], "ours": [Sample(1.25, 500)]},
        {"peft-set": "cannot mix weights in a batch", **MISSING},
    )


def test_machine_and_versions_stand_above_the_numbers() -> None:
    first, second, *_ = text_of(decode()).splitlines()
    assert first.startswith("some/base (int4) on a processor, 2 threads of 4 cores")
    assert second.startswith("torch 2.9")


@pytest.mark.parametrize("width", [60, 100])
def test_long_names_of_machine_and_versions_are_wrapped_where_the_output_is_a_file_too(width: int) -> None:
    document: dict[str, Any] = {
        "machine": {"cpu": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz " * 2, "threads": 2, "cores": 4}
        | {"memory_gib": 8.0, "load": 0.1},
        "versions": dict.fromkeys(("torch", "transformers", "peft", "bitsandbytes", "lora-rt"), "2.13.0+cpu"),
        **dict.fromkeys(("base", "precision"), "some"),
        **dict.fromkeys(("systems", "workloads", "rows"), ()),
    }
    console = PlainConsole(width=width, file=io.StringIO())
    console.print(shown(document, width))
    assert isinstance(console.file, io.StringIO)
    assert max(map(len, console.file.getvalue().splitlines())) <= width


def test_a_reason_is_a_number_in_the_cell_and_a_line_below() -> None:
    other = Measured(Workload("e", "decode 1 row"), {"base": [Sample(1.0, 50)], "peft-set": [Sample(2.0, 50)]})
    text = text_of(decode(), other)
    assert "0.80" in text
    row = next(line for line in text.splitlines() if "decode 16 rows" in line)
    assert "(1)" in row
    assert "(1) cannot mix weights in a batch" in text


def test_a_system_that_could_do_nothing_is_a_line_and_no_column() -> None:
    text = text_of(decode())
    assert "llama.cpp: xllamacpp is not installed" in text
    assert "llama\n" not in text


def test_milliseconds_seconds_and_megabytes_are_called_so() -> None:
    change = Measured(Workload("c", "new weights", kind="change"), {"ours": [Sample(0.00042)]})
    cold = Measured(Workload("s", "start", kind="cold"), {"base": [Sample(2.0)], "ours": [Sample(2.5)]})
    memory = Measured(Workload("m", "peak", kind="memory"), {"ours": [Sample(1.0, megabytes=512.4)]})
    lines = [line.split() for line in text_of(change, cold, memory).splitlines()]
    assert ["new", "weights", "0.42"] in lines
    assert ["start", "2.00", "2.50"] in lines
    assert ["s", "1.00", "0.80"] in lines
    assert ["peak", "512"] in lines


def test_training_stands_beside_plain_peft_below_the_table() -> None:
    item = Measured(
        Workload("t", "training steps", kind="training"),
        {"ours": [Sample(1.0, 1200)], "peft-trainer": [Sample(1.0, 1000)]},
        {"base": "trains nothing"},
    )
    assert "training steps: lora-rt 1200 tokens/s, 1.20 times PEFT Trainer (1000)" in text_of(item)


def noise_of(seconds: list[float], others: float = 0.0) -> str:
    item = Measured(Workload("d", "decode"), {"ours": [Sample(time, 100) for time in seconds]})
    return noise({"machine": {"others": others}, "rows": rows([item], SYSTEMS)})


def test_figures_that_differ_too_much_between_repeats_are_warned_of() -> None:
    assert "1 of 1 figures spread by more than 25%" in noise_of([1.0, 2.0, 3.0])
    assert "ours on d" in noise_of([1.0, 2.0, 3.0])
    assert noise_of([1.0, 1.0, 1.1]) == ""


def test_what_others_used_of_the_processor_meanwhile_is_warned_of() -> None:
    assert noise_of([1.0, 1.0, 1.0], others=0.4) == "others used 40% of the processor meanwhile"
    assert noise_of([1.0, 2.0, 3.0], others=0.4).endswith("relied on; others used 40% of the processor meanwhile")
