"""Options, wherever they are given: the precision and the device of a base, and a mode's own (`--option KEY=VALUE`)."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from lora_rt.errors import LoraRtError, UsageError

T = TypeVar("T")
Precision = Literal["float32", "bfloat16", "float16", "int8", "int4"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class OptionError(LoraRtError):
    """Options that a mode does not know, or with values that it can't use; all of them are named."""


def check_precision(name: str) -> Precision:
    """The precision of that name; raises UsageError where there is none."""
    for precision in PRECISIONS:
        if name == precision:
            return precision
    raise UsageError(f"there is no precision {name!r}", next_step=f"Use one of: {', '.join(PRECISIONS)}")


def known_device(name: str) -> str:
    """The device of that name, or UsageError; whether there is one is another question."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise UsageError(f"there is no device {name!r}", next_step="Use auto, cpu, cuda or cuda:N")
    return name


def check_depth(hidden_layers: int, layers: int) -> None:
    """Raises OptionError where a base of so many layers has no early hidden state after `hidden_layers` of them."""
    if not 0 <= hidden_layers <= layers:
        raise OptionError(
            f"hidden-layers is {hidden_layers}; this base has {layers} layers",
            next_step=f"Give a number from 0 to {layers}, or leave the option out",
        )


def read_options(given: Mapping[str, str], kind: type[T]) -> T:
    """The options as an instance of `kind`, a dataclass whose fields are str, int, float or bool and have defaults.

    A field `half_life` is the option `half-life` (or `half_life`). A ValueError of the dataclass's `__post_init__`, for
    instance because a number is out of range, becomes an OptionError.

        @dataclass(frozen=True)
        class Options:
            tokens: int = 24

        options = read_options(context.options, Options)

    Raises:
        OptionError: unknown names, with the nearest known one, and unreadable values.
    """
    if not dataclasses.is_dataclass(kind):
        raise TypeError(f"{kind!r} is not a dataclass")
    hints = get_type_hints(kind)
    names = [_shown(field.name) for field in dataclasses.fields(kind)]
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key, text in given.items():
        field = key.replace("-", "_")
        if _shown(field) not in names:
            near = difflib.get_close_matches(_shown(field), names, n=1)
            problems.append(f"there is no option {key!r}" + (f"; near is {near[0]!r}" if near else ""))
            continue
        try:
            values[field] = _read(text, hints[field])
        except ValueError:
            problems.append(f"{key} is {text!r}, which is not {_KINDS[hints[field]]}")
    if not problems:
        try:
            return kind(**values)
        except ValueError as error:
            problems.append(str(error))
    known = ", ".join(f"{name}={getattr(kind, name.replace('-', '_'))}" for name in names)
    raise OptionError(
        "the mode can't use these options",
        problems=problems,
        next_step=f"Its options and their defaults: {known}" if names else "It has none",
    )


def _shown(field: str) -> str:
    return field.replace("_", "-")


_KINDS: dict[Any, str] = {int: "a whole number", float: "a finite number", bool: "yes or no", str: "a text"}


def _read(text: str, hint: Any) -> Any:
    if hint is bool:
        if text.lower() not in _WORDS:
            raise ValueError
        return _WORDS[text.lower()]
    value = hint(text)
    if hint is float and not -float("inf") < value < float("inf"):
        raise ValueError
    return value
