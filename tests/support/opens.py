"""How often files are opened, by Python and by safetensors' own reader together; and how often modes and registry are.

Python tells of what it opens by audit events; safetensors' `safe_open` opens in Rust, where no event is heard. All its
functions that read a file (`safetensors.torch.load_file` and its likes) go through it; `deserialize` opens nothing, for
it is given bytes.
"""

from __future__ import annotations

import functools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lora_rt.plugins.manager import ModeHost
from lora_rt.registry.registry import Registry

_watching: list[Counter[str]] = []
_heard: list[object] = []


class Opens:
    """What was opened since the watch began; a link is the file that it leads to."""

    def __init__(self, counted: Counter[str]) -> None:
        self._counted = counted

    def of(self, path: Path) -> int:
        return self._counted[os.path.realpath(path)]

    def named(self, name: str) -> int:
        """Of all files of this name."""
        return sum(count for path, count in self._counted.items() if Path(path).name == name)


@contextmanager
def opens() -> Iterator[Opens]:
    """Count until the block ends.

    Whoever wrote `from safetensors import safe_open` holds the reader itself, so every module's own is replaced, and
    given back at the end, to modules too that were imported in between.
    """
    from safetensors import safe_open

    def counting(path: Any, *arguments: Any, **named: Any) -> Any:
        _note(path)
        return safe_open(path, *arguments, **named)

    if not _heard:
        sys.addaudithook(_hear)  # can't be taken away again
        _heard.append(_hear)
    counted: Counter[str] = Counter()
    _watching.append(counted)
    _replace(safe_open, counting)
    try:
        yield Opens(counted)
    finally:
        _replace(counting, safe_open)
        _watching.remove(counted)


def _replace(old: object, new: object) -> None:
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", None) or {}  # what stands among modules need not be one
        for name in [name for name, value in list(names.items()) if value is old]:
            names[name] = new


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _watching:
        _note(arguments[0])


def _note(path: Any) -> None:
    if isinstance(path, str | bytes | os.PathLike):  # a number is a file that was opened already
        for counted in _watching:
            counted[os.path.realpath(os.fsdecode(path))] += 1


def opened_from_now_on(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """ "ModeHost" and "Registry", once for each that is opened until the test ends."""
    made: list[str] = []
    for kind in (Registry, ModeHost):
        noting = functools.partialmethod(_begun, kind.__init__, made, kind.__name__)
        monkeypatch.setattr(kind, "__init__", noting)
    return made


def _begun(self: object, once: Callable[..., None], made: list[str], name: str, *given: Any, **named: Any) -> None:
    made.append(name)
    once(self, *given, **named)
