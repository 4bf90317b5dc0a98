"""Where records of data come from: one line, row or item at a time, with the place by which a person finds it again.

F.jsonl           one JSON object per line            "line 3"
F.json            a list of objects                   "item 3"      each by what it holds, not by its name
F.parquet         needs pyarrow                       "row 3"
DIR               all of these in it, by name         "F.jsonl line 3"
org/name          a data set of the Hub, which needs datasets: org/name/configuration@revision:split    "row 3"
"""

from __future__ import annotations

import codecs
import json
import logging
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_rt.core.base.silence import data_sets_silenced
from lora_rt.core.base.source import first_line
from lora_rt.errors import LoraRtError

Record = tuple[str, bytes | Any]
"""The place of a record, and its line as bytes or its value."""

_LOGGER = logging.getLogger("lora_rt.training")
_HUB = re.compile(
    r"(?P<name>[\w-][\w.-]*/[\w.-]+)(?:/(?P<configuration>[\w.-]+))?(?:@(?P<revision>[^:]+))?(?::(?P<split>.+))?"
)
_INSTALL = "Install it with: pip install 'lora-rt[data]'"
FORMS = "Give a .jsonl, .json or .parquet file, a folder of them, or a data set of the Hub as org/name"
_READ = (".jsonl", ".json", ".parquet")
_OTHERS = {
    **dict.fromkeys((".xls", ".xlsx", ".ods"), "a spreadsheet"),
    **dict.fromkeys((".gz", ".zip", ".bz2", ".xz", ".zst", ".7z", ".tar", ".tgz"), "packed"),
    ".csv": "CSV",
    ".tsv": "TSV",
}
"""What people keep tables in besides, by a file's ending; refused by that name."""


class DataError(LoraRtError):
    """Data that can't be used; `problems` has every bad line with its place."""


def check_source(path: Path) -> None:
    """That there is something to read, as far as that can be told without reading it.

    Raises:
        DataError: there is not, or what reads it is not installed.
    """
    if path.is_dir():
        for file in _files(path):
            check_source(file)
    elif path.exists():
        if kind := _OTHERS.get(path.suffix.lower()):
            raise DataError(f"{path} is {kind}, which is not read", next_step=f"Write it as JSON lines. {FORMS}")
        if path.suffix.lower() == ".parquet" and find_spec("pyarrow") is None:
            raise DataError(f"{path}: reading Parquet needs pyarrow", next_step=_INSTALL)
    elif not _is_hub_name(path):
        raise DataError(f"{path} can't be read: there is no such file", next_step=FORMS)
    elif find_spec("datasets") is None:
        text = f"{path} is not a file here, and reading it as a data set of the Hub needs the package datasets"
        raise DataError(text, next_step=_INSTALL)


def records(path: Path) -> Iterator[Record]:
    """The records of a source in their order; blank lines are none, but they count.

    Raises:
        DataError: it can't be read.
    """
    check_source(path)
    try:
        if path.is_dir():
            if others := _passed_over(path):
                _warn_once(f"of {path} these are not read: {', '.join(others)}")
            for file in _files(path):
                yield from ((f"{file.name} {place}", value) for place, value in records(file))
        elif not path.exists():
            yield from _data_set(str(path))
        elif path.suffix.lower() == ".parquet":
            yield from _parquet(path)
        elif (items := _json_list(path)) is not None:
            yield from ((f"item {number}", item) for number, item in enumerate(items, 1))
        else:
            for number, line in enumerate(_content(path).split(b"\n"), 1):
                if line.strip():
                    yield f"line {number}", line
    except OSError as error:
        raise DataError(
            f"{path} can't be read: {error.strerror or first_line(error)[:200]}", next_step=FORMS
        ) from error


def _files(folder: Path) -> list[Path]:
    """The data files of a folder, by name.

    Raises:
        DataError: there are none.
    """
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder} can't be read: {error.strerror}", next_step=FORMS) from error
    files = [f for f in inside if f.is_file() and f.suffix.lower() in _READ and f.name[0] != "."]
    if not files:
        folders = [f.name for f in inside if f.is_dir() and f.name[0] != "."]
        step = f"Give one of its folders: {', '.join(folders[:5])}" if folders else FORMS
        raise DataError(f"{folder} has no .jsonl, .json or .parquet file", next_step=step)
    return files


@cache
def _warn_once(text: str) -> None:
    """Data is read several times in a run."""
    _LOGGER.warning(text)


def _passed_over(folder: Path) -> list[str]:
    """What a folder holds besides that looks like data, and is not read."""
    inside = [item for item in sorted(folder.iterdir()) if item.name[0] != "."]
    files = [f"{item.name} ({_OTHERS[item.suffix.lower()]})" for item in inside if item.suffix.lower() in _OTHERS]
    known = {*_READ, *_OTHERS}
    folders = [
        f"{item.name}/ (a folder)"
        for item in inside
        if item.is_dir() and any(one.suffix.lower() in known for one in item.iterdir())
    ]
    return files + folders


def _content(path: Path) -> bytes:
    """What a file holds, in UTF-8 without the mark that some editors put before it; PowerShell writes UTF-16.

    Raises:
        DataError: it begins like a UTF-16 file but can't be read as one.
    """
    content = path.read_bytes()
    if not content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.removeprefix(codecs.BOM_UTF8)
    try:
        return content.decode("utf-16").encode()
    except UnicodeDecodeError as error:
        text = f"{path} begins like a UTF-16 file but can't be read as one: {error.reason}"
        raise DataError(text, next_step="Save it as UTF-8") from error


def _json_list(path: Path) -> list[Any] | None:
    """The items of a file that is one JSON list, whatever it is called; None for anything else.

    Raises:
        DataError: it is written as a list over several lines, and is none.
    """
    content = _content(path)
    if not content[:100].lstrip().startswith(b"["):
        return None
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        if content.lstrip().partition(b"\n")[0].strip() == b"[":
            line = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            text = f"{path} is not a JSON list{line}: {getattr(error, 'msg', None) or error}"
            raise DataError(text, next_step="Correct it, or write one object per line") from error
        return None
    return found if isinstance(found, list) else None


def _parquet(path: Path) -> Iterator[Record]:
    from pyarrow import ArrowException, parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", _without_nulls(row)
    except ArrowException as error:
        raise DataError(f"{path} is not Parquet: {first_line(error)[:200]}", next_step=FORMS) from error


def _is_hub_name(path: Path) -> bool:
    return path.suffix.lower() not in _READ and _HUB.fullmatch(str(path)) is not None


def _data_set(text: str) -> Iterator[Record]:
    found = _HUB.fullmatch(text)
    assert found is not None
    import datasets

    try:
        with data_sets_silenced(datasets):
            loaded = datasets.load_dataset(found["name"], found["configuration"], revision=found["revision"])
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        text = f"{text} is neither a file here nor a data set that can be read: {first_line(error)[:200]}"
        raise DataError(text, next_step=FORMS) from error
    split = found["split"] or ("train" if "train" in loaded or len(loaded) > 1 else next(iter(loaded)))
    if split not in loaded:
        step = f"Name one behind a colon: {found['name']}:{next(iter(loaded))}"
        raise DataError(f"{text} has no split {split!r}; it has: {', '.join(loaded)}", next_step=step)
    for number, row in enumerate(loaded[split], 1):
        yield f"row {number}", _without_nulls(row)


def _without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """A table has every column in every row: what is null there is missing."""
    return {key: value for key, value in row.items() if value is not None}
