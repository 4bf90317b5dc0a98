"""The numbers in a safetensors file, in chunks of 4 MB: are they finite, and of a size that a trained adapter has?

The same pass computes the file's sha256, so that what was checked is what was hashed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from lora_rt.registry.files import CHUNK
from lora_rt.registry.inspection.modules import LoraModule
from lora_rt.registry.inspection.safetensors_header import ITEM_BYTES, TensorEntry
from lora_rt.registry.strict_json import shown

MAX_ABSOLUTE = 1e4
MAX_DELTA_NORM = 1e6
"""Largest Frobenius norm that `scaling * B A` may have by its factors; the base's own matrices stay below about 1e3."""


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """What a pass over one tensor found: values that are not finite, the largest magnitude, the Frobenius norm."""

    not_finite: int
    largest: float
    norm: float


def read_values(file: BinaryIO, entries: Iterable[TensorEntry]) -> tuple[dict[str, TensorFacts], str]:
    """Facts about every floating-point tensor, and the sha256 of the whole file, which is open at any position."""
    digest = hashlib.sha256()
    file.seek(0)
    facts: dict[str, TensorFacts] = {}
    for entry in sorted(entries, key=lambda item: item.begin):
        _hash_until(file, digest, entry.begin)
        facts[entry.key] = _read_tensor(file, digest, entry)
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    return facts, digest.hexdigest()


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
    """Modules whose change of the base is out of all proportion: ||scaling B A|| <= scaling ||B|| ||A||."""
    problems = []
    for module in modules:
        bound = module.scaling * facts[module.a_key].norm * facts[module.b_key].norm
        if bound > MAX_DELTA_NORM:
            problems.append(f"{shown(module.module)}: scaling |B| |A| is {bound:.3g}, more than {MAX_DELTA_NORM:g}")
    return problems


def _hash_until(file: BinaryIO, digest: hashlib._Hash, position: int) -> None:
    while (left := position - file.tell()) > 0 and (chunk := file.read(min(left, CHUNK))):
        digest.update(chunk)


def _read_tensor(file: BinaryIO, digest: hashlib._Hash, entry: TensorEntry) -> TensorFacts:
    bad, largest, squares = 0, 0.0, 0.0
    item = ITEM_BYTES[entry.dtype]
    while (left := entry.end - file.tell()) > 0:
        chunk = file.read(min(left, CHUNK))
        digest.update(chunk)
        if len(chunk) % item or not chunk:
            return TensorFacts(bad + 1, largest, math.inf)  # the file shrank while it was read
        values = _as_floats(chunk, entry.dtype)
        with np.errstate(all="ignore"):
            # NaN survives max and min, so that one number tells whether all are finite.
            top = max(float(values.max()), -float(values.min()), key=lambda x: (math.isnan(x), x))
            if not math.isfinite(top):
                bad += int(values.size - np.count_nonzero(np.isfinite(values)))
                continue
            largest = max(largest, top)
            squares += float(np.dot(values, values))
    return TensorFacts(bad, largest, math.sqrt(squares))


def _as_floats(chunk: bytes, dtype: str) -> npt.NDArray[np.floating]:
    if dtype == "BF16":
        return (np.frombuffer(chunk, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    numpy_types = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2"}
    return np.frombuffer(chunk, dtype=numpy_types.get(dtype, "i1")).astype(np.float64 if dtype == "F64" else np.float32)
