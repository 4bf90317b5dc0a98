"""What fits is said for the precision that loses least; where nothing fits, how much of it would."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lora_rt.core.base.precision import PRECISIONS
from lora_rt.core.memory.estimate import BaseConfig, MemoryPlan, PrecisionPlan
from lora_rt.core.memory.fit import best_fit
from lora_rt.core.memory.inference import InferenceMemory
from lora_rt.core.memory.training import TrainingMemory
from lora_rt.core.memory.workload import EstimateError, Workload

GB = 10**9
WORKLOAD = Workload("cuda", r=16, target_modules=("q_proj",), batch=8, seq=512, adapters=1, labels=511)


def made_plan(*, process: int = 0, workload: Workload = WORKLOAD) -> MemoryPlan:
    """A base of 40 GB in float32; the batch takes 8 GB in inference, 32 GB in training and 4 when checkpointed."""
    items = []
    for precision, weights in zip(PRECISIONS, (40, 20, 20, 10, 5), strict=True):
        training = TrainingMemory(weights * GB, 0, 0, 0, activations=32 * GB, workspace=0)
        again = replace(training, activations=4 * GB)
        inference = InferenceMemory(weights * GB, 0, 0, kv_cache=6 * GB, activations=2 * GB, workspace=0)
        items.append(PrecisionPlan(precision, inference, training, again))
    return MemoryPlan(BaseConfig("b", None), 1, workload, process, tuple(items))


@pytest.mark.parametrize(
    ("use", "size", "precision", "checkpointing", "most"),
    [
        ("inference", 24, "int8", False, 14),
        ("inference", 48, "float32", False, 8),
        ("inference", 80, "float32", False, 40),
        ("training", 24, "bfloat16", True, 8),
        ("training", 48, "float32", True, 16),
        ("training", 80, "float32", False, 10),
    ],
)
def test_the_first_precision_that_fits_is_named(
    use: str, size: int, precision: str, checkpointing: bool, most: int
) -> None:
    fit = best_fit(made_plan(), use, size)  # type: ignore[arg-type]
    assert fit is not None
    assert (fit.precision, fit.checkpointing, fit.most) == (precision, checkpointing, most)
    assert (fit.batch, fit.seq) == (8, 512)
    assert fit.size <= size * GB


def test_a_smaller_batch_is_told_where_the_wanted_one_does_not_fit() -> None:
    fit = best_fit(made_plan(), "inference", 9)
    assert fit is not None
    assert (fit.precision, fit.batch, fit.seq) == ("int4", 4, 512)


def test_a_shorter_sequence_is_told_where_not_even_one_row_fits() -> None:
    one_row = replace(WORKLOAD, batch=1)
    fit = best_fit(made_plan(workload=one_row), "inference", 7)
    assert fit is not None
    assert (fit.precision, fit.batch, fit.seq) == ("int4", 1, 128)


def test_what_is_larger_than_the_device_does_not_fit() -> None:
    assert best_fit(made_plan(), "inference", 5) is None


def test_the_process_takes_its_part_of_a_cpus_memory() -> None:
    fit = best_fit(made_plan(process=1 * GB), "inference", 48)
    assert fit is not None
    assert fit.precision == "bfloat16"


def test_a_workload_that_makes_no_sense_is_refused_with_all_reasons() -> None:
    with pytest.raises(EstimateError) as caught:
        replace(WORKLOAD, batch=0, r=0, labels=512).check()
    assert len(caught.value.problems) == 3
