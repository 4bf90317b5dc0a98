"""A few thousand mutations of a good adapter: accepted or refused, never a crash, a hang, or a file anywhere."""

from __future__ import annotations

import contextlib
import json
import os
import re
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lora_rt.errors import LoraRtError
from lora_rt.registry import strict_json
from lora_rt.registry.card import BaseIdentity
from lora_rt.registry.errors import RejectedAdapterError
from lora_rt.registry.inspection import inspect_adapter
from lora_rt.registry.inspection.patterns import compile_tame
from lora_rt.registry.lock import read_lock
from lora_rt.registry.project import LOCK_FILE, PROJECT_FILE, read_project
from lora_rt.registry.reference import Reference
from support.adapters import BASE, CARD, CONFIG, LINEARS, adapter_files, write_adapter
from support.hostile import parts, raw

pytestmark = pytest.mark.slow

GOOD = adapter_files()
QUICK = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
IN_USE = BaseIdentity(**BASE)

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.sampled_from([0, -1, 2**63, 1e308])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


@pytest.fixture(scope="module")
def folder(memory_root: Path) -> Path:
    """One good adapter, of which every example changes a file for a moment."""
    return write_adapter(memory_root / "fuzz" / "adapter", GOOD)


def _read(folder: Path, name: str, content: bytes) -> bool:
    """Inspect the adapter with this file; whether it passes. Anything but a pass or a refusal of ours is a failure."""
    (folder / name).write_bytes(content)
    problems = _problems(folder)
    assert all(problem.isprintable() for problem in problems or ())
    assert sorted(os.listdir(folder)) == sorted(GOOD)
    assert os.listdir(folder.parent) == ["adapter"]
    (folder / name).write_bytes(GOOD[name])
    return problems is None


def _problems(folder: Path) -> tuple[str, ...] | None:
    try:
        inspect_adapter(folder, name="fuzzed", linears=LINEARS, base=IN_USE)
    except RejectedAdapterError as error:
        return error.problems or ("\0",)  # a refusal that names nothing is not printable, and fails
    return None


@settings(QUICK, max_examples=600)
@given(data=st.data(), name=st.sampled_from(sorted(GOOD)))
def test_bytes_anywhere(folder: Path, data: st.DataObject, name: str) -> None:
    content = bytearray(GOOD[name])
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, max(len(content) - 1, 0)))
        piece = data.draw(st.binary(max_size=8))
        kind = data.draw(st.sampled_from(["replace", "insert", "delete", "cut"]))
        if kind == "replace":
            content[position : position + len(piece)] = piece
        elif kind == "insert":
            content[position:position] = piece
        elif kind == "delete":
            del content[position : position + len(piece)]
        else:
            del content[position:]
    _read(folder, name, bytes(content))


@settings(QUICK, max_examples=400)
@given(data=st.data())
def test_values_in_the_header(folder: Path, data: st.DataObject) -> None:
    header, body = parts(GOOD["adapter_model.safetensors"])
    key = data.draw(st.sampled_from(sorted(header)))
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "key", "all", "length"]))
    if field == "key":
        header[data.draw(st.text(max_size=60))] = header.pop(key)
    elif field == "all":
        header[key] = data.draw(values)
    elif field != "length":
        header[key][field] = data.draw(values | st.lists(st.integers(-5, 2000), max_size=3))
    length = data.draw(st.integers(0, 2**64 - 1)) if field == "length" else None
    _read(folder, "adapter_model.safetensors", raw(_dumps(header), body, length))


@settings(QUICK, max_examples=400)
@given(field=st.sampled_from(sorted(CONFIG)) | st.text(max_size=20), value=values)
def test_values_in_the_configuration(folder: Path, field: str, value: Any) -> None:
    _read(folder, "adapter_config.json", _dumps(CONFIG | {field: value}))


@settings(QUICK, max_examples=250)
@given(field=st.sampled_from(sorted(CARD)) | st.text(max_size=20), value=values)
def test_values_in_the_card(folder: Path, field: str, value: Any) -> None:
    _read(folder, "register.json", _dumps(CARD | {field: value}))


@settings(QUICK, max_examples=250)
@given(key=st.sampled_from([3, 7, 12]), bits=st.integers(0, 2**32 - 1))
def test_any_number_is_judged_by_its_value(folder: Path, key: int, bits: int) -> None:
    header, body = parts(GOOD["adapter_model.safetensors"])
    changed = bytearray(body)
    struct.pack_into("<I", changed, key * 4, bits)
    (number,) = struct.unpack("<f", struct.pack("<I", bits))
    passed = _read(folder, "adapter_model.safetensors", raw(header, bytes(changed)))
    if passed:
        assert abs(number) <= 1e4
    elif abs(number) < 100:
        raise AssertionError(f"{number} was refused")


PIECES = [
    "a",
    "q",
    "_",
    r"\.",
    ".",
    "*",
    "+",
    "?",
    "(",
    "(?:",
    "(?!",
    "(?<=q",
    ")",
    "[^q]",
    "[a-q]",
    "|",
    r"\d",
    r"\b",
    "$",
]


@settings(QUICK, max_examples=1000)
@example(["(?<=q", "*", ")"])
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=9))
def test_a_regex_that_is_compiled_matches_what_python_matches(pieces: list[str]) -> None:
    compiled = compile_tame("".join(pieces))
    for text in ("", "q", "a.q1", "aa_q", "q.a_q") if compiled else ():
        assert compiled.fullmatch(text) == bool(re.fullmatch("".join(pieces), text))


@settings(QUICK, max_examples=1000)
@given(pattern=st.text(alphabet="aq_.*+?()[]{}|\\d1,^$w=!<", max_size=40))
def test_a_regex_that_is_compiled_cannot_hang(pattern: str) -> None:
    compiled = compile_tame(pattern)
    if compiled is None:
        return
    for text in ("model.layers.11.self_attn.q_proj", "a" * 60, "a_" * 30, "aq1." * 15):
        # The processor's time, not the clock's: exponential matching of these texts would take hours.
        start = time.process_time()
        compiled.fullmatch(text)
        assert time.process_time() - start < 10


@settings(QUICK, max_examples=1000)
@given(text=st.text(max_size=60) | st.from_regex(r"[\w./~@:\\-]{0,40}"))
def test_any_text_is_a_reference_or_is_refused(text: str) -> None:
    try:
        found = Reference.parse(text)
    except LoraRtError:
        return
    if found.kind != "path":
        assert ".." not in text
        assert "\\" not in text
        assert text.isprintable()


@settings(QUICK, max_examples=250)
@given(content=st.binary(max_size=200) | st.text(alphabet='[]={}"\n.#adapters1name', max_size=80).map(str.encode))
def test_any_bytes_are_a_project_a_lock_or_refused(memory_root: Path, content: bytes) -> None:
    place = memory_root
    (place / PROJECT_FILE).write_bytes(content)
    (place / LOCK_FILE).write_bytes(content)
    for read in (read_project, read_lock):
        with contextlib.suppress(LoraRtError):
            read(place)


@settings(QUICK, max_examples=250)
@given(value=values)
def test_strict_json_reads_what_it_does_not_refuse_as_others_do(value: Any) -> None:
    content = _dumps(value)
    try:
        assert strict_json.loads(content) == json.loads(content)
    except strict_json.InvalidJsonError:
        assert b"NaN" in content or b"Infinity" in content or b"\\ud" in content


def _dumps(value: Any) -> bytes:
    return json.dumps(value).encode()
