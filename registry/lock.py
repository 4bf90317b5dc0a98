"""`lora-rt.lock`: the adapters of a project, each pinned to a full commit and the sha256 of every file.

TOML in a stable order, made for version control:

    version = 1

    [[adapter]]
    name = "emotion"
    source = "someone/emotion-lora@v1"
    revision = "3f2a91c0..."
    base = "HuggingFaceTB/SmolLM2-135M-Instruct"
    sha256 = "9b1c..."

    [adapter.files]
    "adapter_config.json" = "..."
    "adapter_model.safetensors" = "..."

Named compositions follow (see `lora_rt.registry.locked_compositions`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_rt.registry import durable, files, locked_compositions
from lora_rt.registry.compositions import NamedComposition
from lora_rt.registry.errors import InvalidReferenceError, ProjectError
from lora_rt.registry.files import LIMITS
from lora_rt.registry.project import LOCK_FILE, read_toml
from lora_rt.registry.reference import Reference, is_commit, is_name
from lora_rt.registry.strict_json import shown

VERSION = 1
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, order=True)
class Locked:
    """One pinned adapter. `source` is the reference it came from; `revision` its commit, empty for a folder."""

    name: str
    base: str
    source: str
    revision: str
    sha256: str
    files: dict[str, str] = field(compare=False)

    @property
    def reference(self) -> Reference:
        """Where it comes from."""
        return Reference.parse(self.source)


def read_lock(folder: Path) -> list[Locked] | None:
    """The lock of a project's folder, in order, or None where there is none.

    Raises:
        ProjectError: `problems` names every entry that is wrong.
    """
    document = read_toml(folder / LOCK_FILE)
    if document is None:
        return None
    if document.get("version") != VERSION:
        raise ProjectError(
            f"{LOCK_FILE} has version {shown(document.get('version'))}, this lora-rt reads {VERSION}",
            next_step="Make it anew: lora-rt lock",
        )
    entries = document.get("adapter", [])
    if not isinstance(entries, list):
        raise ProjectError(f"adapter in {LOCK_FILE} is no list of tables", next_step="Make it anew: lora-rt lock")
    problems = [problem for number, entry in enumerate(entries, 1) for problem in _problems(number, entry)]
    if problems:
        raise ProjectError(f"{LOCK_FILE} is damaged", next_step="Make it anew: lora-rt lock", problems=problems)
    return sorted(_locked(entry) for entry in entries)


def write_lock(folder: Path, entries: Sequence[Locked], mixes: Sequence[NamedComposition] = ()) -> bool:
    """Write the lock, whole or not at all; whether anything changed."""
    text = render(entries, mixes)
    path = folder / LOCK_FILE
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    durable.write_text(path, text)
    return True


def render(entries: Sequence[Locked], mixes: Sequence[NamedComposition] = ()) -> str:
    """The lock as text; the same entries and compositions give the same text in any order."""
    import tomlkit

    document = tomlkit.document()
    document.add(
        tomlkit.comment("Made by `lora-rt lock`. Keep it in version control; `lora-rt sync` installs exactly this.")
    )
    document["version"] = VERSION
    tables = tomlkit.aot()
    for entry in sorted(entries):
        table = tomlkit.table()
        table.update({"name": entry.name, "source": entry.source, "revision": entry.revision})
        table.update({"base": entry.base, "sha256": entry.sha256})
        table["files"] = dict(sorted(entry.files.items()))
        tables.append(table)
    document["adapter"] = tables
    if mixes:
        document[locked_compositions.KEY] = locked_compositions.tables(mixes)
    return tomlkit.dumps(document)


def _locked(entry: dict[str, Any]) -> Locked:
    return Locked(**{key: entry[key] for key in ("name", "base", "source", "revision", "sha256", "files")})


def _problems(number: int, entry: Any) -> list[str]:
    if not isinstance(entry, dict):
        return [f"adapter {number} is no table"]
    texts = ("name", "base", "source", "revision", "sha256")
    wrong = [key for key in texts if not isinstance(entry.get(key), str)]
    pins = entry.get("files")
    if not isinstance(pins, dict) or not all(isinstance(value, str) for value in pins.values()):
        wrong.append("files")
    if wrong:
        return [f"adapter {number} has no proper {', '.join(wrong)}"]
    return [f"adapter {number} ({shown(entry['name'])}): {text}" for text in _value_problems(entry)]


def _value_problems(entry: dict[str, Any]) -> list[str]:
    problems = [] if is_name(entry["name"]) else ["that is not a name"]
    try:
        kind = Reference.parse(entry["source"]).kind
    except InvalidReferenceError as error:
        return [*problems, error.message]
    if kind == "name":
        problems.append("its source is neither a repository nor a path")
    if kind == "hub" and not is_commit(entry["revision"]):
        problems.append(f"its revision {shown(entry['revision'])} is not a full commit")
    problems += [f"it pins {shown(name)}, which is never read" for name in entry["files"] if name not in LIMITS]
    problems += [f"the sha256 of {name} is none" for name, pin in entry["files"].items() if not _SHA256.fullmatch(pin)]
    if not problems and files.combined(entry["files"]) != entry["sha256"]:
        problems.append("its sha256 does not follow from those of its files")
    return problems
