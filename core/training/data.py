"""Reads training and evaluation data in any of the known forms, every bad line reported at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_rt.core.training.forms import FIELDS, KNOWN, in_our_form
from lora_rt.core.training.sources import DataError, records

Check = Callable[[dict[str, Any]], list[str]]
_SHOWN = 20


class Pairs(list[dict[str, Any]]):
    """The examples of a source in their order, with its `path` and their `places`.

    A place is "line 3" of a file, from 1, blank lines counted; see `sources` for others.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.places: list[str] = []


def read_pairs(path: Path, fields: Sequence[str], check: Check | None = None, *, chats: bool = False) -> Pairs:
    """The examples of a file, a folder or a data set: what `sources` reads. Blank lines are skipped.

    Args:
        path: the source.
        fields: keys that every line must have, non-empty strings. Where "scene" and "text" are among them, lines of
            the other known forms (chats, instructions) are read into these two.
        check: further findings about one example.
        chats: whether "scene" may be a list of chat messages.

    Raises:
        DataError: it can't be read, is empty, or has bad lines.
    """
    pairs = Pairs(path)
    problems: list[str] = []
    for place, record in records(path):
        found = _read_record(record, fields, check, chats=chats)
        if isinstance(found, dict):
            pairs.append(found)
            pairs.places.append(place)
        else:
            problems += [f"{place}: {problem}" for problem in found]
    if problems:
        raise bad_lines(path, problems, _next_step(fields))
    if not pairs:
        raise DataError(f"{path} has no examples", next_step="Give at least one")
    return pairs


def check_examples(examples: Any, name: str) -> list[Mapping[str, Any]]:
    """A program's own examples: at least one, each with "scene" and "text".

    Raises:
        DataError: naming every one that is not so.
    """
    if isinstance(examples, (bytes, Mapping)) or not isinstance(examples, Iterable):
        text = f"{name} is a {type(examples).__name__}"
        raise DataError(text, next_step='Give a file, or a list of examples {"scene": ..., "text": ...}')
    given = [dict(one) if isinstance(one, Mapping) else one for one in examples]
    found = [_read_record(one, FIELDS, None, chats=True) for one in given]
    problems = [
        f"example {number}: {problem}"
        for number, wrong in enumerate(found, 1)
        if isinstance(wrong, list)
        for problem in wrong
    ]
    if problems:
        raise bad_lines(name, problems, _next_step(FIELDS))
    if not given:
        raise DataError(f"{name} has no examples", next_step="Give at least one")
    return [one for one in found if isinstance(one, dict)]


def check_fit(
    examples: Sequence[Mapping[str, Any]], lengths: Sequence[int], limit: int, name: str = "the data"
) -> None:
    """Before any of them is read by a model: that examples are not longer than its context.

    Args:
        examples: those that were read are named by their lines, others by their number, from 1.
        lengths: the tokens of each, prompt and answer.
        limit: what the model reads at most.
        name: of examples that come from no file.

    Raises:
        DataError: naming all that are longer.
    """
    places = [f"example {number}" for number in range(1, len(examples) + 1)]
    if isinstance(examples, Pairs):
        places, name = examples.places, str(examples.path)
    problems = [
        f"{place}: {length} tokens, and the base reads {limit}"
        for place, length in zip(places, lengths, strict=True)
        if length > limit
    ]
    if problems:
        raise bad_lines(name, problems, "Shorten or remove these")


def bad_lines(path: Path | str, problems: Sequence[str], next_step: str) -> DataError:
    """The error about a file some of whose lines can't be used."""
    shown = list(problems[:_SHOWN])
    if len(problems) > _SHOWN:
        shown.append(f"and {len(problems) - _SHOWN} more")
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return DataError(f"{path} has {count}", next_step=next_step, problems=shown)


def _next_step(fields: Sequence[str]) -> str:
    more = [name for name in fields if name not in FIELDS]
    if not set(FIELDS) <= set(fields):
        return "Each line is {" + ", ".join(f'"{name}": "..."' for name in fields) + "}"
    also = f"; with {', '.join(map(repr, more))} beside it" if more else ""
    return f"Each line has one of these forms: {KNOWN}{also}"


def _read_record(record: Any, fields: Sequence[str], check: Check | None, *, chats: bool) -> dict[str, Any] | list[str]:
    """The example of a record, or what is wrong with it; bytes are a line of JSON."""
    value = record
    if isinstance(record, bytes):
        try:
            value = json.loads(record.decode("utf-8"), object_pairs_hook=_once_each)
        except UnicodeDecodeError:
            return ["not UTF-8"]
        except DataError as error:
            return [error.message]
        except (ValueError, RecursionError) as error:
            return [f"not JSON: {error}"]
    if not isinstance(value, dict):
        return [f"a {'JSON ' if isinstance(record, bytes) else ''}{type(value).__name__}, not an object"]
    if set(FIELDS) <= set(fields):
        read = in_our_form(value, chats=chats)
        if isinstance(read, list):
            return read
        value = read
    problems = [problem for name in fields for problem in _field_problems(value, name, chats=chats)]
    if not problems and check is not None:
        problems = check(value)
    return problems or value


def _once_each(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which Python would take the last of two values without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise DataError(f'"{next(name for name in names if names.count(name) > 1)[:60]}" stands there twice')
    return found


def _field_problems(value: dict[str, Any], name: str, *, chats: bool) -> list[str]:
    if name not in value:
        return [f'"{name}" is missing']
    content = value[name]
    if name == "scene" and chats and isinstance(content, list) and content and all(map(_is_message, content)):
        texts = [message["content"] for message in content]
    elif isinstance(content, str):
        texts = [content]
        if not content.strip():
            return [f'"{name}" is empty']
    else:
        return [f'"{name}" is not a text']
    half = any("\ud800" <= letter <= "\udfff" for text in texts for letter in text)
    return [f'"{name}" holds half of a surrogate pair'] if half else []


def _is_message(item: object) -> bool:
    return isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)


def digest_of(examples: Sequence[dict[str, Any]]) -> str:
    """The sha256 of the examples in their order, wherever they were read from; 64 hex digits."""
    text = "\n".join(json.dumps(one, sort_keys=True, ensure_ascii=False, default=str) for one in examples)
    return hashlib.sha256(text.encode()).hexdigest()
