"""The header of a safetensors file, read before anything is allocated for what it promises.

The format: 8 bytes with the header's length (little endian, unsigned), the header as JSON, then the tensors' bytes.
The header maps names to `{"dtype", "shape", "data_offsets": [begin, end]}`, offsets counted from the header's end, and
may hold `__metadata__`, an object of texts. Tensors cover the rest of the file exactly, without holes and overlaps.
Source: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

from lora_rt.registry import strict_json
from lora_rt.registry.files import MEGABYTE, POINTER
from lora_rt.registry.strict_json import shown

MAX_HEADER = 16 * MEGABYTE
MAX_TENSORS = 65_536
MAX_DIMENSIONS = 8

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: its dtype as safetensors writes it, its shape, and where its bytes lie in the file."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: BinaryIO, size: int) -> tuple[dict[str, TensorEntry], list[str]]:
    """The tensors of an open file of `size` bytes, and everything that is wrong with its header.

    The entries are those that could be understood; they may only be used where the list of problems is empty.
    """
    if size < 8:
        return {}, [f"has {size} bytes, too few for a safetensors file"]
    start = file.read(8)
    if POINTER.startswith(start):
        return {}, ["is a Git LFS pointer and not the file, which 'git lfs pull' brings"]
    (length,) = struct.unpack("<Q", start)
    if length > MAX_HEADER:
        return {}, [f"states a header of {length:,} bytes, more than the {MAX_HEADER:,} that are read"]
    if 8 + length > size:
        return {}, [f"is cut off: the header of {length:,} bytes is longer than the file of {size:,}"]
    content = file.read(length)
    try:
        header = strict_json.loads(content)
    except strict_json.InvalidJsonError as error:
        return {}, [f"has a header that {error}"]
    if not isinstance(header, dict) or not content.startswith(b"{"):
        return {}, ["has a header that is not an object"]
    return _entries(header, 8 + length, size)


def _entries(header: dict[str, Any], start: int, size: int) -> tuple[dict[str, TensorEntry], list[str]]:
    problems = _metadata(header.pop("__metadata__", {}))
    if not header:
        return {}, [*problems, "holds no tensors"]
    if len(header) > MAX_TENSORS:
        return {}, [*problems, f"holds {len(header):,} tensors, more than {MAX_TENSORS:,}"]
    entries: dict[str, TensorEntry] = {}
    for key, value in header.items():
        problem = _entry_problem(value)
        if problem:
            problems.append(f"{shown(key)}: {problem}")
        else:
            begin, end = value["data_offsets"]
            entries[key] = TensorEntry(key, value["dtype"], tuple(value["shape"]), start + begin, start + end)
    if len(entries) == len(header):
        problems += _layout(list(entries.values()), start, size)
    return entries, problems


def _metadata(value: Any) -> list[str]:
    if isinstance(value, dict) and all(isinstance(text, str) for text in value.values()):
        return []
    return ["has __metadata__ that is not an object of texts"]


def _entry_problem(value: Any) -> str:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        return "its entry is not exactly dtype, shape and data_offsets"
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        return f"its dtype {shown(dtype)} is unknown"
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(_is_count(item) for item in shape):
        return f"its shape {shown(shape)} is not a list of sizes"
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(item) for item in offsets):
        return f"its data_offsets {shown(offsets)} are not two positions"
    needed, given = math.prod(shape) * ITEM_BYTES[dtype], offsets[1] - offsets[0]
    if needed == 0:
        return f"its shape {shape} holds nothing"
    if needed != given:
        return f"{dtype} {shape} takes {needed:,} bytes, its data_offsets give {given:,}"
    return ""


def _is_count(value: Any) -> bool:
    # 2**53: every size and offset of a real file is far below, and products of eight of them stay cheap.
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def _layout(entries: list[TensorEntry], start: int, size: int) -> list[str]:
    position = start
    for entry in sorted(entries, key=lambda item: item.begin):
        if entry.begin != position:
            kind = "overlaps the tensor before it" if entry.begin < position else "leaves a hole before it"
            return [f"{shown(entry.key)}: its place in the file {kind}"]
        position = entry.end
    if position != size:
        lacks = position - size
        return [f"is cut off by {lacks:,} bytes" if lacks > 0 else f"has {-lacks:,} bytes behind the last tensor"]
    return []
