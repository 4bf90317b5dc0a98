"""A program gives weights as numbers, of whatever library; what only passes for a number is refused by name."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_rt.core.requests.composition import Composition, InvalidCompositionError, Term
from lora_rt.registry.reference import Reference

NO_WEIGHTS = [True, False, None, "0.5", b"1", 1j, np.True_, torch.tensor(True), torch.tensor([0.1, 0.2]), [0.5], {}]


@pytest.mark.parametrize("weight", NO_WEIGHTS, ids=repr)
def test_what_is_not_a_number_is_not_a_weight(weight: Any) -> None:
    for make in (lambda: Composition.of({"a": 0.5, "b": weight}), lambda: Term(Reference.parse("b"), weight)):
        with pytest.raises(InvalidCompositionError, match="is not a number") as caught:
            make()
        assert caught.value.next_step


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), np.float32("-inf")])
def test_a_weight_is_finite(weight: Any) -> None:
    with pytest.raises(InvalidCompositionError, match="is not a finite number"):
        Composition.of({"a": weight})


def test_numbers_of_other_libraries_are_weights() -> None:
    numbers: list[Any] = [Decimal("0.5"), Fraction(1, 2), np.float32(0.5), torch.tensor(0.5)]
    weights = [Term(Reference.parse("a"), number).weight for number in numbers]
    assert weights == [0.5] * 4
    assert {type(weight) for weight in weights} == {float}


def test_a_term_of_a_program_takes_what_a_mapping_takes(tmp_path: Path) -> None:
    made: Any = Term
    assert made("a@v1", 1).reference == Reference.parse("a@v1")
    assert made(tmp_path, 1).reference.kind == "path"
    with pytest.raises(InvalidCompositionError, match="is not a term"):
        made(None)
