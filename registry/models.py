"""What the registry's documents are made of, and what is wrong with one that is not: one way for all of them.

Cards, records, the project file and the lock are read by pydantic from these types, and `problems_of` puts what it
found into words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import AfterValidator, Field, StringConstraints, TypeAdapter, ValidationError

from lora_rt.registry.errors import InvalidReferenceError
from lora_rt.registry.files import limit_of
from lora_rt.registry.reference import Reference, composed, name_problem
from lora_rt.registry.strict_json import shown

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

T = TypeVar("T")
MAX_PROBLEMS = 50


def _name(text: str) -> str:
    text = composed(text)
    for problem in name_problem(text):
        raise ValueError(problem)
    return text


def _source(text: str) -> str:
    try:
        reference = Reference.parse(text)
    except InvalidReferenceError as error:
        raise ValueError(error.message) from error
    if reference.kind == "name":
        raise ValueError("its source must be org/repo or a path, not another name")
    return text


def _file(name: str) -> str:
    if limit_of(name) is None:
        raise ValueError("that file is never read")
    return name


# Documents are shown in terminals and web pages: no control characters, no line breaks.
Text = Annotated[str, StringConstraints(max_length=300, pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e]*$")]
Word = Annotated[str, StringConstraints(max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Digest = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{64})?$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, AfterValidator(_name)]
SourceText = Annotated[Text, AfterValidator(_source)]
Pins = dict[Annotated[str, AfterValidator(_file)], Sha256]
"""The sha256 of every file of an adapter, by name."""


@lru_cache(maxsize=16)
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def validated(kind: type[T], document: Any) -> T:
    """A document as what it is said to be.

    Raises:
        ValidationError: it is not; see `problems_of`.
    """
    schema: Any = kind
    value: T = _adapter(schema).validate_python(document)
    return value


def problems_of(error: ValidationError) -> list[str]:
    """Everything that pydantic found wrong with a document, one line each, cut where it came from a stranger."""
    problems = []
    for place, text in findings(error.errors(include_url=False)[:MAX_PROBLEMS]):
        parts = [str(part)[:60] for part in place if part != "[key]"]
        problems.append(f"{repr('.'.join(parts))[1:-1][:120]}: {text}" if parts else text)
    return problems


Place = tuple[int | str, ...]
_FORM = re.compile(r"str|int|float|bool|(list|dict|tuple)\[.*\]")


def findings(items: Sequence[ErrorDetails]) -> list[tuple[Place, str]]:
    """Where and what, of each finding of pydantic's.

    Of a value that may have several forms, pydantic tells for each of them why it is none, with the form's Python name
    in the place. Here it is told of the form that comes nearest, or once, where the value is of none of their kinds.
    """
    forms: dict[Place, dict[str, list[tuple[Place, str]]]] = {}  # by the place of the value, and by form
    for item in items:
        place, form, rest = _parted(item["loc"])
        forms.setdefault(place, {}).setdefault(form, []).append((rest, in_words(item)))
    found: list[tuple[Place, str]] = []
    for place, by_form in forms.items():
        if len(by_form) > 1:
            reached = max(len(rest) for told in by_form.values() for rest, _ in told)
            near = [told for told in by_form.values() if max(len(rest) for rest, _ in told) == reached]
            if reached == 0:
                kinds = dict.fromkeys(text.removeprefix("it is not ") for told in near for _, text in told)
                found.append((place, f"it is neither {' nor '.join(kinds)}" if len(kinds) > 1 else near[0][0][1]))
            else:
                found += [((*place, *rest), text) for rest, text in min(near, key=len)]
            continue
        for form, told in by_form.items():
            found += [((*place, *([form] if form else []), *rest), text) for rest, text in told]
    return found


def _parted(place: Place) -> tuple[Place, str, Place]:
    """A place up to a value that may have several forms, the form, and what comes within it; none, where it has one."""
    for number, part in enumerate(place):
        if number and isinstance(part, str) and _FORM.fullmatch(part):
            return place[:number], part, place[number + 1 :]
    return place, "", ()


_WORDS = {
    "missing": "it is missing",
    "extra_forbidden": "there is nothing of this name",
    "unexpected_keyword_argument": "there is nothing of this name",
    "string_type": "it is not a text",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), "it is not a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "it is not a number"),
    "finite_number": "it is not a finite number",
    **dict.fromkeys(("bool_type", "bool_parsing"), "it is neither true nor false"),
    **dict.fromkeys(("list_type", "tuple_type", "iterable_type"), "it is not a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type", "dataclass_type"), "it is not an object"),
    "greater_than": "it must be above {gt}",
    "greater_than_equal": "it must be at least {ge}",
    "less_than": "it must be below {lt}",
    "less_than_equal": "it must be at most {le}",
    "string_too_long": "it has more than {max_length} characters",
    "string_too_short": "it has fewer than {min_length} characters",
    "too_long": "it has more than {max_length} entries",
    "too_short": "it has fewer than {min_length} entries",
    "literal_error": "it must be {expected}",
    "enum": "it must be {expected}",
}


def in_words(item: ErrorDetails) -> str:
    """One finding of pydantic's in a newcomer's words."""
    if item["type"] == "string_pattern_mismatch":
        text = str(item["input"])
        if not text.isprintable():
            return "it holds a line break or another character that can't be printed"
        hashes = "0-9a-f" in str(item.get("ctx", {}).get("pattern"))
        return f"{shown(text)} is not {'64 hexadecimal digits' if hashes else 'of the form that it must have'}"
    form = _WORDS.get(item["type"])
    return item["msg"].removeprefix("Value error, ") if form is None else form.format(**item.get("ctx", {}))
