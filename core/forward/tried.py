"""What trying a base has shown, remembered in the home, so that the next process need not run the same passes.

It lies in `tried.json`: base, precision, machine and versions -> question -> answer. A base of another digest, another
release of a library or another processor is tried anew, and so is a file that can't be read.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata

from lora_rt.core.multiply.measured import machine_name
from lora_rt.registry import home
from lora_rt.version import __version__

_FILE = "tried.json"
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
        document = home.remembered(_FILE)
        answers = document.pop(key, None)
        answers = answers if isinstance(answers, dict) else {}
        known = answers.get(question)
        if not isinstance(known, bool):
            known = found()
            latest = list(document.items())[-(_BASES - 1) :]
            home.remember(_FILE, dict([*latest, (key, {**answers, question: known})]))
        return known
