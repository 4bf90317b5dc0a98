"""What went wrong in earlier processes.

A gate fails while `compose` runs, and `lora-rt plugins` is another process. So the last failure of a plugin is kept in
the home, and forgotten when the same hook works again, or when another version of the package is installed.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from lora_rt.plugins.manager.record import PluginRecord
from lora_rt.registry import durable
from lora_rt.registry.home import home


def remember(record: PluginRecord, reason: str) -> None:
    """Keep a failure. Where the home can't be written to, it is not kept: the error itself is what the user sees."""
    failure = {"package": record.package, "version": record.version, "reason": reason}
    with suppress(OSError):
        file = _file(record.name)
        file.parent.mkdir(parents=True, exist_ok=True)
        durable.write_text(file, json.dumps(failure, ensure_ascii=False))


def recall(record: PluginRecord) -> str:
    """The failure that this version of the plugin left behind ("hook: why"), or an empty text."""
    try:
        found = json.loads(_file(record.name).read_text(encoding="utf-8"))
        same = (found["package"], found["version"]) == (record.package, record.version)
        return str(found["reason"]) if same else ""
    except (OSError, ValueError, TypeError, KeyError):  # not there, or not what we wrote
        return ""


def forget(record: PluginRecord) -> None:
    """Remove what was kept of a plugin."""
    with suppress(OSError):
        _file(record.name).unlink(missing_ok=True)


def _file(name: str) -> Path:
    # A stranger chose the name: with "/" escaped it can't leave the folder.
    return home() / "plugin-failures" / f"{quote(name, safe='')}.json"
