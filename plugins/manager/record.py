"""What became of one plugin, the errors that name it, and how a stranger's exception is told in one line.

A gate fails while `compose` runs, and `lora-rt plugins` is another process. So the last failure of a plugin is kept in
the home, and forgotten when the same hook works again, or when another version of the package is installed.
"""

from __future__ import annotations

import importlib
import os
from contextlib import suppress
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from pathlib import Path
from traceback import walk_tb
from types import TracebackType
from typing import Literal
from urllib.parse import quote

import pluggy

from lora_rt.errors import LoraRtError
from lora_rt.registry import home

GROUP, OTHERS = "lora_rt.modes", "lora_rt.plugins"
"""The groups of entry points: of modes, and of plugins that are none."""
OURS = "lora-rt"
NAMELESS = "?"

Status = Literal["ok", "faulty", "broken", "blocked"]
_LONGEST = 300
_NOT_THE_PLUGIN = (
    "<frozen ",
    *(str(Path(file).parent) + os.sep for file in (pluggy.__file__, importlib.__file__, __file__) if file),
)
"""How the files of the frames before a plugin's first one begin: the import system's, pluggy's and this package's."""


class PluginError(LoraRtError):
    """A plugin broke its contract; the message names the plugin, the hook and the reason."""


class UnknownModeError(LoraRtError):
    """No plugin that can be used provides this mode."""


@dataclass(slots=True)
class PluginRecord:
    """What became of one entry point; `reason` is empty exactly where the status is "ok".

    "faulty" plugins are used: a call of theirs failed, or something that they offer was refused. "broken" ones could
    not be loaded, or left a call hanging, and are not used. "blocked" ones were never imported.
    `summary` is the first line of the module's docstring, known once it was imported.
    """

    name: str
    package: str
    version: str
    hooks: tuple[str, ...] = ()
    status: Status = "ok"
    reason: str = ""
    summary: str = ""

    @property
    def usable(self) -> bool:
        """Whether its hooks are called."""
        return self.status in ("ok", "faulty")

    @property
    def origin(self) -> str:
        """Package and version."""
        return f"{self.package} {self.version}".strip()

    def mark(self, status: Status, reason: str) -> None:
        """Note what is wrong. A broken record stays broken."""
        self.reason = reason
        if self.status != "broken":
            self.status = status


def describe(error: object) -> str:
    """One line, without control characters: a text as it is, an exception with its type and the plugin's own line."""
    if not isinstance(error, BaseException):
        return _one_line(str(error))
    text = _one_line(str(error))
    told = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return told + _place(error.__traceback__)


def _one_line(text: str) -> str:
    """Printable and not too long: the text is a stranger's and goes to a terminal."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))
    return plain if len(plain) <= _LONGEST else plain[: _LONGEST - 3] + "..."


def _place(trace: TracebackType | None) -> str:
    """ " (file.py, line 3)": where the plugin was, even if a library that it called raised; "" if that is not known."""
    frames = [(frame.f_code.co_filename, line) for frame, line in walk_tb(trace)]
    inside = list(dropwhile(lambda at: at[0].startswith(_NOT_THE_PLUGIN), frames))
    own = list(takewhile(lambda at: at[0] == inside[0][0], inside))
    return f" ({Path(own[-1][0]).name}, line {own[-1][1]})" if own else ""


def remember(record: PluginRecord, reason: str) -> None:
    """Keep a failure. Where the home can't be written to, it is not kept: the error itself is what the user sees."""
    home.remember(_file(record.name), {"package": record.package, "version": record.version, "reason": reason})


def recall(record: PluginRecord) -> str:
    """The failure that this version of the plugin left behind ("hook: why"), or an empty text."""
    found = home.remembered(_file(record.name))
    same = (found.get("package"), found.get("version")) == (record.package, record.version)
    return str(found.get("reason", "")) if same else ""


def forget(record: PluginRecord) -> None:
    """Remove what was kept of a plugin."""
    with suppress(OSError):
        (home.home() / _file(record.name)).unlink(missing_ok=True)


def _file(name: str) -> str:
    # A stranger chose the name: with "/" escaped it can't leave the folder.
    return f"plugin-failures/{quote(name, safe='')}.json"
