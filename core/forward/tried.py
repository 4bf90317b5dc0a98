"""What trying a base has shown, remembered in the home, so that the next process need not run the same passes.

It lies in `tried.json`: base, precision, machine and versions -> question -> answer. A base of another digest, another
release of a library or another processor is tried anew, and so is a file that can't be read.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from lora_rt.core.multiply.measured import machine_name
from lora_rt.registry import durable, home
from lora_rt.version import __version__

_BASES = 64  # that are remembered, the latest


class Tried:
    """The questions about one base that were answered."""

    def __init__(self, base: str | None = None) -> None:
        """Without a base nothing is remembered: a model that is a caller's may be any."""
        self._base = base

    def answer(self, question: str, found: Callable[[], bool]) -> bool:
        """The answer that is remembered, else the one that is found now."""
        if self._base is None:
            return found()
        key = f"{self._base}, {machine_name()}, transformers {metadata.version('transformers')}, lora-rt {__version__}"
        known = _remembered().get(key, {}).get(question)
        if known is None:
            known = found()
            _remember(key, question, known)
        return known


def _remembered() -> dict[str, dict[str, bool]]:
    try:
        document = json.loads(_file().read_text())
        return {
            key: {question: answer for question, answer in answers.items() if isinstance(answer, bool)}
            for key, answers in document.items()
        }
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def _remember(key: str, question: str, answer: bool) -> None:
    """Two processes at once may lose what the other one found; it is tried again next time."""
    document = _remembered()
    answers = document.pop(key, {}) | {question: answer}
    latest = list(document.items())[-(_BASES - 1) :]
    with suppress(OSError):  # a home that can't be written costs time alone
        _file().parent.mkdir(parents=True, exist_ok=True)
        durable.write_text(_file(), json.dumps(dict([*latest, (key, answers)]), indent=1))


def _file() -> Path:
    return home.home() / "tried.json"
