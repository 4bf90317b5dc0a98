"""One pass over a safetensors file, in chunks of 4 MB.

It looks at every number, computes the file's sha256 and keeps the tensors that are asked for, so that what was checked
is what was hashed, and what is loaded.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Container, Iterable
from functools import cache
from io import BufferedReader

import numpy as np
import numpy.typing as npt

from lora_rt.registry.files import CHUNK
from lora_rt.registry.inspection.safetensors_header import TensorEntry
from lora_rt.registry.inspection.values import RawTensor, ReadFile, TensorFacts


def read_values(file: BufferedReader, entries: Iterable[TensorEntry], keep: Container[str]) -> ReadFile:
    """Read the whole of a file that is open at any position, once; `keep` are the keys of tensors to keep.

    The entries are all of `read_header`, which takes no file without a tensor.
    """
    digest = hashlib.sha256()
    file.seek(0)
    facts: dict[str, TensorFacts] = {}
    tensors: dict[str, RawTensor] = {}
    chunk = np.empty(CHUNK, np.uint8)
    in_order = sorted(entries, key=lambda item: item.begin)
    digest.update(file.read(in_order[0].begin))  # the header; behind it tensors follow one another, see `read_header`
    for entry in in_order:
        kept = np.empty(entry.end - entry.begin, np.uint8) if entry.key in keep else None
        facts[entry.key] = _read_tensor(file, digest, entry, chunk, kept)
        if kept is not None:
            tensors[entry.key] = RawTensor(entry.dtype, entry.shape, kept)
    while rest := file.read(CHUNK):
        digest.update(rest)
    return ReadFile(facts, digest.hexdigest(), tensors)


def _read_tensor(
    file: BufferedReader,
    digest: hashlib._Hash,
    entry: TensorEntry,
    chunk: npt.NDArray[np.uint8],
    kept: npt.NDArray[np.uint8] | None,
) -> TensorFacts:
    """Facts about the values, read into `kept` where there is one and over `chunk` again and again where not."""
    bad, largest, squares = 0, 0.0, 0.0
    for start in range(0, entry.end - entry.begin, CHUNK):
        size = min(CHUNK, entry.end - entry.begin - start)
        piece = chunk[:size] if kept is None else kept[start : start + size]
        if file.readinto(piece.data) < size:
            return TensorFacts(bad + 1, largest, math.inf)  # the file shrank while it was read
        digest.update(piece.data)
        values = _as_floats(piece, entry.dtype)
        with np.errstate(all="ignore"):
            # NaN survives max and min, so that one number tells whether all are finite.
            top = max(float(values.max()), -float(values.min()), key=lambda x: (math.isnan(x), x))
            if not math.isfinite(top):
                bad += int(values.size - np.count_nonzero(np.isfinite(values)))
                continue
            largest = max(largest, top)
            squares += float(np.dot(values, values))
    return TensorFacts(bad, largest, math.sqrt(squares))


def _as_floats(piece: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.floating]:
    if dtype == "BF16":
        return (piece.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype in _BYTES:
        return _floats_of_bytes(*_BYTES[dtype])[piece]
    numpy_types = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2"}
    kind = numpy_types.get(dtype, "i1")
    return piece.view(kind).astype(np.float64 if dtype == "F64" else np.float32, copy=False)


@cache
def _floats_of_bytes(exponent_bits: int, fraction_bits: int) -> npt.NDArray[np.float32]:
    """What each of the 256 bytes is as a float: IEEE's rules, but that E4M3 gives up infinity for larger numbers.

    Source: "FP8 Formats for Deep Learning" (arXiv:2209.05433), table 1.
    """
    code = np.arange(256)
    exponent, fraction = code >> fraction_bits & (1 << exponent_bits) - 1, code & (1 << fraction_bits) - 1
    bias, top = (1 << exponent_bits - 1) - 1, (1 << exponent_bits) - 1
    value = np.ldexp((exponent > 0) + fraction / (1 << fraction_bits), np.maximum(exponent, 1) - bias)
    if exponent_bits == 5:
        value = np.where(exponent == top, np.where(fraction == 0, np.inf, np.nan), value)
    else:
        value = np.where(code & 0x7F == 0x7F, np.nan, value)
    return np.where(code < 128, value, -value).astype(np.float32)


_BYTES = {"F8_E4M3": (4, 3), "F8_E5M2": (5, 2)}
"""Exponent and fraction bits of the floats of one byte."""
