"""Regular expressions from strangers, matched without a chance to hang.

PEFT lets a configuration choose modules, ranks and alphas with a regex. Python's engine backtracks, so a few bytes can
cost years. Only patterns without repeated groups are taken, in which every repeat meets text before the next one;
Python matches those. Where parts are optional, or look around, it could hang all the same: such a pattern is matched
by sets of positions, all ways through it at once.

    .*a?b    over "xab"     {0} -> .* -> {0 1 2 3} -> a? -> {0 1 2 3} -> b -> {3}, the end: it matches
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any

MAX_LENGTH = 1_000
MAX_REPEATS = 12
MAX_GROUPS = 100
MAX_TEXT = 400
_FEW = 6  # repeats that Python's engine is trusted with

_PARSER: Any = importlib.import_module("re._parser")  # Python's own reading of a pattern, as a tree
_CLASSES = {name: re.compile(text) for name, text in (("DIGIT", r"\d"), ("WORD", r"\w"), ("SPACE", r"\s"))}
_EDGES = {"AT_BEGINNING", "AT_BEGINNING_STRING", "AT_END", "AT_END_STRING", "AT_BOUNDARY", "AT_NON_BOUNDARY"}
_ONE = {"LITERAL", "NOT_LITERAL", "ANY", "IN"}
_REPEATS = {"MAX_REPEAT", "MIN_REPEAT"}


class _NotTameError(Exception):
    """The pattern holds what is not matched."""


class TamePattern:
    """A pattern that is matched in a time that its length and the text's bound; `quick` where Python does it."""

    def __init__(self, pattern: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a pattern may come to mean in a later Python
            self._tree = _PARSER.parse(pattern)
            check = _Check()
            check.run(self._tree, False)
            if self._tree.state.flags != re.UNICODE.value:
                raise _NotTameError
            compiled = re.compile(pattern)  # which refuses some that can be read as a tree
            self.quick = compiled if check.repeats <= _FEW and not check.branches_off else None

    def fullmatch(self, text: str) -> bool:
        """Whether it matches the whole of a text."""
        if self.quick is not None:
            return self.quick.fullmatch(text) is not None
        return len(text) <= MAX_TEXT and bool(_Matcher(text).run(self._tree, 1) >> len(text) & 1)

    def first_end(self, text: str, goes_on: Callable[[str], bool]) -> int | None:
        """Where the shortest match from the text's start ends, of those behind which it goes on in the right way."""
        found = _Matcher(text[:MAX_TEXT]).run(self._tree, 1)
        return next((end for end in range(len(text) + 1) if found >> end & 1 and goes_on(text[end:])), None)


def compile_tame(pattern: str) -> TamePattern | None:
    """The pattern, or None where it is not one that is matched here, or no regex at all."""
    try:
        return TamePattern(pattern) if len(pattern) <= MAX_LENGTH and pattern.count("(") <= MAX_GROUPS else None
    except (re.error, _NotTameError, OverflowError, RecursionError):
        return None


def peft_key(pattern: str) -> TamePattern | None:
    """A key of `rank_pattern` or `alpha_pattern` as PEFT matches it, `(.*\\.)?(KEY)$`; None where it is not tame."""
    key = compile_tame(pattern)
    if key is not None and key.quick is not None:  # what PEFT puts around it does not make it slow
        key.quick = re.compile(rf"(.*\.)?({pattern})")
        return key
    return key and compile_tame(rf"(.*\.)?({pattern})$")


class _Check:
    """Whether every repeat meets text before the next one, on every way through, and nothing else is not matched."""

    def __init__(self) -> None:
        self.repeats = 0
        self.branches_off = False  # parts that may be left out, or look around

    def run(self, nodes: Iterable[Any], is_open: bool, looks: bool = False) -> bool:
        """Whether a repeat is still open behind the nodes, where one was or was not before them.

        Raises:
            _NotTameError: there is something among them that is not matched.
        """
        for operation, given in nodes:
            name = str(operation)
            if name == "LITERAL":
                is_open = False
            elif name == "BRANCH":
                ways = [self.run(nodes, is_open, looks) for nodes in given[1]]
                is_open = any(ways)
            elif name == "SUBPATTERN" and not given[1] and not given[2]:
                is_open = self.run(given[3], is_open, looks)
            elif name in ("ASSERT", "ASSERT_NOT") and not looks:
                self.branches_off = True
                self.run(given[1], False, True)
            elif name in _REPEATS and given[:2] == (0, 1):
                self.branches_off = True
                is_open = self.run(given[2], is_open, looks) or is_open
            elif name in _REPEATS:
                is_open = self._repeat(given[2], is_open)
            elif not (name in _ONE or (name == "AT" and str(given) in _EDGES)):
                raise _NotTameError
        return is_open

    def _repeat(self, body: Any, is_open: bool) -> bool:
        self.repeats += 1
        if is_open or self.repeats > MAX_REPEATS or [str(operation) in _ONE for operation, _ in body] != [True]:
            raise _NotTameError
        return True


class _Matcher:
    """One text. A set of positions is the bits of a number."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._known: dict[Any, int] = {}

    def run(self, nodes: Iterable[Any], at: int) -> int:
        """Where the nodes end that begin at these positions."""
        for operation, given in nodes:
            at = self._step(str(operation), given, at) if at else 0
        return at

    def _step(self, name: str, given: Any, at: int) -> int:
        if name in _ONE:
            return (at & self._where(name, given)) << 1
        if name == "BRANCH":
            found = 0
            for nodes in given[1]:
                found |= self.run(nodes, at)
            return found
        if name == "SUBPATTERN":
            return self.run(given[3], at)
        if name in _REPEATS:
            return at | self.run(given[2], at) if given[:2] == (0, 1) else self._repeat(given, at)
        if name == "AT":
            return at & self._edges(str(given))
        direction, body = given
        found = sum([bit for bit in _bits(at) if self._looks(direction, body, bit)], 0)
        return found if name == "ASSERT" else at & ~found

    def _where(self, name: str, given: Any) -> int:
        """The positions of the letters that a node of one letter takes."""
        key = (name, given if isinstance(given, int) else id(given))
        if key not in self._known:
            letters = enumerate(self._text)
            self._known[key] = sum(1 << position for position, letter in letters if _is_one(name, given, letter))
        return self._known[key]

    def _repeat(self, given: Any, at: int) -> int:
        least, most, ((operation, one),) = given
        letters = self._where(str(operation), one)
        found = at if least == 0 else 0
        for count in range(1, min(int(most), len(self._text)) + 1):
            at = (at & letters) << 1
            found |= at if count >= least else 0
        return found

    def _looks(self, direction: int, nodes: Any, bit: int) -> bool:
        """Ahead of a position, or back from it: Python takes nodes of one width alone for that."""
        if direction > 0:
            return bool(self.run(nodes, bit))
        return bool(self.run(nodes, bit >> int(nodes.getwidth()[0])) & bit)

    def _edges(self, which: str) -> int:
        text, end = self._text, len(self._text)
        if "BOUNDARY" not in which:
            return 1 if "BEGINNING" in which else 1 << end
        words = [bool(_CLASSES["WORD"].match(letter)) for letter in text]
        both = enumerate(zip([False, *words], [*words, False], strict=True))
        edges = sum(1 << position for position, sides in both if sides[0] is not sides[1])
        return edges if which == "AT_BOUNDARY" else ~edges & ((2 << end) - 1)


def _is_one(name: str, given: Any, letter: str) -> bool:
    if name == "ANY":
        return letter != "\n"
    if name == "IN":
        items = [(str(kind), value) for kind, value in given]
        negated = items[0][0] == "NEGATE"
        return any(_is_in(kind, value, letter) for kind, value in items[negated:]) is not negated
    return (ord(letter) == given) is (name == "LITERAL")


def _is_in(kind: str, value: Any, letter: str) -> bool:
    if kind == "RANGE":
        return bool(value[0] <= ord(letter) <= value[1])
    if kind == "CATEGORY":
        _, *negated, name = str(value).split("_")  # CATEGORY_DIGIT, CATEGORY_NOT_DIGIT
        return (_CLASSES[name].match(letter) is not None) is not bool(negated)
    return bool(ord(letter) == value)


def _bits(number: int) -> Iterable[int]:
    while number:
        bit = number & -number
        yield bit
        number ^= bit
