"""From `lora-rt.toml` to `lora-rt.lock`, and from the lock to the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora_rt.registry.compositions import NamedComposition
from lora_rt.registry.errors import ChangedAdapterError, ProjectError
from lora_rt.registry.hub.download import Report, silent
from lora_rt.registry.hub.pull import holder_of, install, obtain
from lora_rt.registry.inspection import inspect_adapter
from lora_rt.registry.lock import Locked, read_lock, write_lock
from lora_rt.registry.project import LOCK_FILE, PROJECT_FILE, Project, read_project
from lora_rt.registry.records import Record
from lora_rt.registry.reference import Reference
from lora_rt.registry.registry import Registry
from lora_rt.registry.resolved import Resolved, changes
from lora_rt.registry.sync_compositions import install_mixes, mix_differences, mixes_to_lock


def make_lock(registry: Registry, *, offline: bool = False, report: Report = silent) -> tuple[list[Locked], bool]:
    """Pin everything that the project names and write the lock; the adapters' entries, and whether the lock changed.

    Entries that are locked already and whose source did not change stay as they are. Without a `lora-rt.toml`, what was
    pulled into the store is pinned. Named compositions are locked beside them.
    """
    project = read_project(registry.folder)
    old = read_lock(registry.folder) or []
    mixes: list[NamedComposition] = []
    if project is None:
        mixes = mixes_to_lock(registry, None)
        entries = [_of_record(record) for record in registry.store.records.all() if record.source.startswith("hub ")]
        if not entries and not mixes:
            raise ProjectError(
                f"there is no {PROJECT_FILE} here and nothing was pulled from the Hub, so there is nothing to lock",
                next_step=f'Write {PROJECT_FILE}: [adapters] and lines such as emotion = "someone/emotion-lora@v1"',
            )
    else:
        entries = [
            _pin(registry, name, source, old, offline, report)
            for name, sources in project.adapters.items()
            for source in sources
        ]
        mixes = mixes_to_lock(registry, project)  # after the adapters were fetched, which are its terms
    return sorted(entries), write_lock(registry.folder, entries, mixes)


def check_lock(registry: Registry) -> list[str]:
    """What in the lock does not fit the project or the folders it names; no requests, nothing is written."""
    entries = read_lock(registry.folder)
    if entries is None:
        return [f"there is no {LOCK_FILE}"]
    project = read_project(registry.folder)
    problems = _differences(project, entries) if project else []
    problems += mix_differences(registry, project)
    for entry in entries:
        if entry.reference.kind == "path":
            folder = registry.folder / Path(entry.reference.target).expanduser()
            problems += [f"{entry.name}: {problem}" for problem in changes(folder, entry.files)]
    return problems


def sync(
    registry: Registry, *, frozen: bool = False, offline: bool = False, report: Report = silent
) -> tuple[list[Resolved], bool]:
    """Install exactly what the lock says; the adapters installed then, and whether the lock was changed for it.

    `frozen` refuses to change the lock; `offline` asks nobody.

    Raises:
        ProjectError: there is no lock, or under `frozen` it does not fit the project.
        ChangedAdapterError: something is not what was locked.
    """
    problems = check_lock(registry)
    changed = False
    if problems and frozen:
        raise ProjectError(
            f"{LOCK_FILE} does not fit, and --frozen forbids to change it",
            next_step="lora-rt lock, and keep the result in version control",
            problems=problems,
        )
    if problems and (read_project(registry.folder) is not None):
        _, changed = make_lock(registry, offline=offline, report=report)
    entries = read_lock(registry.folder)
    if entries is None:
        raise ProjectError(f"there is no {LOCK_FILE} here", next_step="lora-rt lock")
    found = [_install(registry, entry, offline, report) for entry in entries]
    install_mixes(registry)
    return found, changed


def _install(registry: Registry, entry: Locked, offline: bool, report: Report) -> Resolved:
    reference = entry.reference
    if reference.kind == "hub":
        requested = None if reference.revision in (None, "main") else reference.revision
        return install(
            registry.store,
            reference.target,
            entry.revision,
            entry.name,
            requested=requested,
            expected=entry.files,
            offline=offline,
            take_name=holder_of(registry.store, entry.name, reference.target, entry.base) is None,
            report=report,
        )
    found = registry.resolve(reference)
    problems = changes(found.folder, entry.files)
    if problems:
        raise ChangedAdapterError(
            f"{entry.name} in {entry.source} is not what was locked", next_step="lora-rt lock", problems=problems
        )
    return replace(found, name=entry.name)


def _pin(
    registry: Registry, name: str, source: Reference, old: Sequence[Locked], offline: bool, report: Report
) -> Locked:
    if source.kind == "path":
        found = registry.resolve(source)
        inspect_adapter(found.folder, name=name)
    else:
        kept = next((entry for entry in old if entry.name == name and entry.source == source.text), None)
        if kept is not None:
            return kept
        found = obtain(registry.store, source, name=name, fresh=True, offline=offline, report=report)
    base = found.card.base.id if found.card else ""
    return Locked(name, base, source.text, found.revision or "", found.sha256, dict(found.files))


def _of_record(record: Record) -> Locked:
    repo = record.source.removeprefix("hub ")
    source = f"{repo}@{record.requested}" if record.requested else repo
    return Locked(record.name, record.base, source, record.revision or "", record.sha256, record.files)


def _differences(project: Project, entries: Sequence[Locked]) -> list[str]:
    named = {(name, source.text) for name, sources in project.adapters.items() for source in sources}
    locked = {(entry.name, entry.source) for entry in entries}
    problems = [f"{name} = {source!r} is not locked" for name, source in sorted(named - locked)]
    return problems + [
        f"{name} from {source} is locked, but not in the project" for name, source in sorted(locked - named)
    ]
