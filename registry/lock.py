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

Named compositions follow whole, so that another machine can use them:

    [[composition]]
    name = "my-mix"
    base = "HuggingFaceTB/SmolLM2-135M-Instruct"
    sha256 = "51d0..."

    [[composition.terms]]
    reference = "emotion"
    sha256 = "9b1c..."
    weight = 0.61
    layers = []

One with a mode, which decides for its adapters, has the mode's tensors as base64 of a safetensors file.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from lora_rt.registry import durable, files
from lora_rt.registry.compositions import OF_A_MODE, NamedComposition
from lora_rt.registry.errors import ProjectError
from lora_rt.registry.files import MEGABYTE
from lora_rt.registry.models import Name, Pins, SourceText, Text, problems_of, validated
from lora_rt.registry.project import LOCK_FILE, read_toml
from lora_rt.registry.reference import Reference, is_commit, name_problem
from lora_rt.registry.strict_json import shown

T = TypeVar("T")
VERSION = 1
ADAPTERS, COMPOSITIONS = "adapter", "composition"
_ANEW = f"Delete {LOCK_FILE}, then run: lora-rt lock"


@dataclass(frozen=True, slots=True, order=True)
class Locked:
    """One pinned adapter. `source` is the reference it came from; `revision` its commit, empty for a folder."""

    name: Name
    base: Text
    source: SourceText
    revision: Text
    sha256: Text
    files: Pins = field(compare=False)

    @property
    def reference(self) -> Reference:
        """Where it comes from."""
        return Reference.parse(self.source)

    @property
    def meaning(self) -> str:
        """What its name stands for, in one line."""
        return f"{self.source} ({(self.revision or self.sha256)[:12]})"


def read_lock(folder: Path) -> list[Locked] | None:
    """The adapters of a lock, in order, or None where the folder has no lock.

    Raises:
        ProjectError: `problems` names every entry that is wrong.
    """
    document = _document(folder)
    if document is None:
        return None
    found = sorted(_entries(document, ADAPTERS, _locked))
    check_meanings(LOCK_FILE, [(entry.name, entry.base, entry.sha256, entry.meaning) for entry in found])
    return found


def read_locked_compositions(folder: Path) -> list[NamedComposition]:
    """The compositions of a lock, by name; none where there is no lock.

    Raises:
        ProjectError: `problems` names every entry that is wrong.
    """
    found = _entries(_document(folder) or {}, COMPOSITIONS, _locked_composition)
    check_meanings(LOCK_FILE, [(item.name, "", item.sha256, f"{item} ({item.sha256[:12]})") for item in found])
    return sorted(found, key=lambda composition: composition.name)


def check_meanings(file: str, told: Iterable[tuple[str, str, str, str]]) -> None:
    """Each (name, base, sha256, meaning) of a file: that no name means two things for one base, as after a git merge.

    Raises:
        ProjectError: `problems` names every one that does.
    """
    meanings: dict[tuple[str, str], dict[str, str]] = {}
    for name, base, sha256, meaning in told:
        meanings.setdefault((name, base), {})[sha256] = meaning
    problems = [
        f"{name}{f' for {base}' if base else ''}: {' and '.join(several.values())}"
        for (name, base), several in meanings.items()
        if len(several) > 1
    ]
    if problems:
        text = f"{file} gives a name two meanings for the same base"
        raise ProjectError(text, next_step=f"Take all but one of them out of {file}", problems=problems)


def write_lock(folder: Path, entries: Sequence[Locked], compositions: Sequence[NamedComposition] = ()) -> bool:
    """Write the lock, whole or not at all; whether anything changed.

    Raises:
        ProjectError: it is too large to be read again.
    """
    text = render(entries, compositions)
    if len(text.encode()) > MEGABYTE:  # it could not be read again
        sizes = [f"{item.name}: {len(item.tensors):,} bytes of tensors" for item in compositions if item.tensors]
        told = f"{LOCK_FILE} would be larger than 1 MB"
        raise ProjectError(told, next_step="Leave compositions out, or fit routers with fewer groups", problems=sizes)
    path = folder / LOCK_FILE
    if path.is_file() and path.read_bytes() == text.encode():
        return False
    durable.write_text(path, text)
    return True


def render(entries: Sequence[Locked], compositions: Sequence[NamedComposition] = ()) -> str:
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
    document[ADAPTERS] = tables
    if compositions:
        document[COMPOSITIONS] = [
            _entry(item) for item in sorted(compositions, key=lambda composition: composition.name)
        ]
    return tomlkit.dumps(document)


def _entry(item: NamedComposition) -> dict[str, Any]:
    terms = [term.model_dump(mode="json") for term in item.terms]
    decided: dict[str, Any] = {}
    if item.mode:
        facts = item.model_dump(mode="json", include=set(OF_A_MODE), exclude_none=True)
        decided = {**facts, "tensors": base64.b64encode(item.tensors).decode()}
    return {"name": item.name, "base": item.base, "sha256": item.sha256, **decided, "terms": terms}


def _document(folder: Path) -> dict[str, object] | None:
    document = read_toml(folder / LOCK_FILE, _ANEW)
    if document is not None and document.get("version") != VERSION:
        raise ProjectError(
            f"{LOCK_FILE} has version {shown(document.get('version'))}, this lora-rt reads {VERSION}", next_step=_ANEW
        )
    return document


def _entries(document: dict[str, object], key: str, read: Callable[[Any], T]) -> list[T]:
    """The tables of one kind, each read; all that are wrong are named at once."""
    entries = document.get(key, [])
    found: list[T] = []
    problems: list[str] = []
    for number, entry in enumerate(entries if isinstance(entries, list) else [None], 1):
        place = f"{key} {number}"
        if isinstance(entry, dict) and isinstance(entry.get("name"), str):
            place += f" ({shown(entry['name'])})"
        try:
            found.append(read(entry))
        except ValueError as error:
            wrong = problems_of(error) if isinstance(error, ValidationError) else [str(error)]
            problems += [f"{place}: {problem}" for problem in wrong]
    if problems:
        raise ProjectError(f"{LOCK_FILE} is damaged", next_step=_ANEW, problems=problems)
    return found


def _locked(entry: Any) -> Locked:
    locked = validated(Locked, entry)
    if locked.reference.kind == "hub" and not is_commit(locked.revision):
        raise ValueError(f"its revision {shown(locked.revision)} is not a full commit")
    if files.combined(locked.files) != locked.sha256:
        raise ValueError("its sha256 does not follow from those of its files")
    return locked


def _locked_composition(entry: Any) -> NamedComposition:
    composition = NamedComposition.model_validate(entry)
    for problem in name_problem(composition.name):
        raise ValueError(problem)
    if entry.get("sha256") != composition.sha256:
        raise ValueError("its sha256 does not follow from its terms")
    if composition.mode and files.sha256_bytes(composition.tensors) != composition.state:
        raise ValueError(f"the tensors of its mode {composition.mode!r} are others")
    return composition
