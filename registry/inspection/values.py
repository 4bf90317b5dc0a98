"""The numbers in a safetensors file: are they finite, and of a size that a trained adapter has? See `reading.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_rt.registry.inspection.adapted import LoraModule
from lora_rt.registry.strict_json import shown

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAX_ABSOLUTE = 1e4
MAX_DELTA_NORM = 1e6
"""Largest Frobenius norm that `scaling * B A` may have by its factors; the base's own matrices stay below about 1e3."""


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """What a pass over one tensor found: values that are not finite, the largest magnitude, the Frobenius norm."""

    not_finite: int
    largest: float
    norm: float


@dataclass(frozen=True, slots=True, eq=False)
class RawTensor:
    """A tensor as its bytes lay in the file, (nbytes,) uint8, with its safetensors dtype and shape."""

    dtype: str
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class ReadFile:
    """One pass over a safetensors file: facts about every tensor, the sha256 of the file, the tensors that are kept."""

    facts: Mapping[str, TensorFacts]
    sha256: str
    tensors: Mapping[str, RawTensor]


def value_problems(facts: Mapping[str, TensorFacts], limit: float = MAX_ABSOLUTE) -> list[str]:
    """What is wrong with single tensors: NaN and infinity, and magnitudes above `limit`."""
    problems = []
    for key, found in facts.items():
        if found.not_finite:
            problems.append(f"{shown(key)} holds {found.not_finite:,} values that are NaN or infinite")
        elif found.largest > limit:
            problems.append(f"{shown(key)} holds a value of {found.largest:g}; more than {limit:g} is not sane")
    return problems


def norm_problems(facts: Mapping[str, TensorFacts], modules: Iterable[LoraModule]) -> list[str]:
    """Modules whose change of the base is out of all proportion: ||scaling B A|| <= |scaling| ||B|| ||A||."""
    problems = []
    for module in modules:
        bound = abs(module.scaling) * facts[module.a_key].norm * facts[module.b_key].norm
        if bound > MAX_DELTA_NORM:
            problems.append(f"{shown(module.module)}: scaling |B| |A| is {bound:.3g}, more than {MAX_DELTA_NORM:g}")
    return problems
