"""What went wrong in earlier processes.

A gate fails while `compose` runs, and `lora-rt plugins` is another process. So the last failure of a mode is kept in
the home, and forgotten when the same hook works again, or when another version of the package is installed.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

from lora_rt.plugins.manager.record import PluginRecord
from lora_rt.registry import durable
from lora_rt.registry.home import home

_FOLDER = "plugin-failures"


@dataclass(frozen=True, slots=True)
class Failure:
    """One failure: of which package's hook, and why."""

    package: str
    version: str
    hook: str
    reason: str


def remember(record: PluginRecord, hook: str, reason: str) -> None:
    """Keep a failure. Where the home can't be written to, it is not kept: the error itself is what the user sees."""
    failure = Failure(record.package, record.version, hook, reason)
    with suppress(OSError):
        file = _file(record.name)
        file.parent.mkdir(parents=True, exist_ok=True)
        durable.write_text(file, json.dumps(asdict(failure), ensure_ascii=False))


def recall(record: PluginRecord) -> Failure | None:
    """The failure that this version of the plugin left behind, or None."""
    try:
        failure = Failure(**json.loads(_file(record.name).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # not there, or not what we wrote
        return None
    return failure if (failure.package, failure.version) == (record.package, record.version) else None


def forget(record: PluginRecord) -> None:
    """Remove what was kept of a mode."""
    with suppress(OSError):
        _file(record.name).unlink(missing_ok=True)


def _file(mode: str) -> Path:
    # A stranger chose the name: with "/" escaped it can't leave the folder.
    return home() / _FOLDER / f"{quote(mode, safe='')}.json"
