"""From `lora-rt.toml` to `lora-rt.lock`, and from the lock to the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lora_rt.errors import LoraRtError
from lora_rt.registry.card import BaseIdentity
from lora_rt.registry.compositions import NamedComposition
from lora_rt.registry.errors import ChangedAdapterError, ProjectError
from lora_rt.registry.hub.download import Report, silent
from lora_rt.registry.hub.pull import install_pinned, obtain
from lora_rt.registry.inspection import inspect_adapter
from lora_rt.registry.lock import Locked, check_meanings, read_lock, read_locked_compositions, write_lock
from lora_rt.registry.paths import folder_of
from lora_rt.registry.pinned import as_pinned
from lora_rt.registry.project import LOCK_FILE, PROJECT_FILE, Project, read_project
from lora_rt.registry.records import Record
from lora_rt.registry.reference import Reference
from lora_rt.registry.registry import Registry
from lora_rt.registry.resolved import Resolved, changes


def make_lock(registry: Registry, *, offline: bool = False, report: Report = silent) -> tuple[list[Locked], bool]:
    """Pin everything that the project names and write the lock; the adapters' entries, and whether the lock changed.

    Entries that are locked already and whose source did not change stay as they are. Without a `lora-rt.toml`, what was
    pulled into the store is pinned. Named compositions are locked beside them.
    """
    project = read_project(registry.folder)
    old = read_lock(registry.folder) or []
    if project is None:
        compositions = _portable_compositions(registry)
        entries = _stored_entries(registry, old)
        if not entries and not compositions:
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
        check_meanings(PROJECT_FILE, [(entry.name, entry.base, entry.sha256, entry.meaning) for entry in entries])
        compositions = _project_compositions(registry, project)  # after the adapters were fetched, which are its terms
    return sorted(entries), write_lock(registry.folder, entries, compositions)


def check_lock(registry: Registry) -> list[str]:
    """What in the lock does not fit the project or the folders it names; no requests, nothing is written."""
    entries = read_lock(registry.folder)
    if entries is None:
        return [f"there is no {LOCK_FILE}"]
    project = read_project(registry.folder)
    problems = _differences(project, entries) if project else []
    problems += _composition_differences(registry, project)
    for entry in entries:
        if entry.reference.kind == "path":
            folder = folder_of(registry.folder, entry.reference)
            problems += [f"{entry.name}: {problem}" for problem in changes(folder, entry.files)]
    return problems


def sync(
    registry: Registry, *, frozen: bool = False, offline: bool = False, report: Report = silent
) -> tuple[list[Resolved], bool]:
    """Install exactly what the lock says; the adapters installed then, and whether the lock was changed for it.

    Its names, of adapters and of compositions, hold in this folder; the names of the store stay what they are.
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
            next_step="Run lora-rt lock, and keep the result in version control",
            problems=problems,
        )
    if problems and (read_project(registry.folder) is not None):
        _, changed = make_lock(registry, offline=offline, report=report)
    entries = read_lock(registry.folder)
    if entries is None:
        raise ProjectError(f"there is no {LOCK_FILE} here", next_step="Run: lora-rt lock")
    found = [_install(registry, entry, offline, report) for entry in entries]
    _check_compositions(registry)
    return found, changed


def _install(registry: Registry, entry: Locked, offline: bool, report: Report) -> Resolved:
    reference = entry.reference
    if reference.kind == "hub":
        found = install_pinned(registry.store, entry, offline=offline, report=report)
        return replace(found, name=entry.name, requested=reference.revision)
    return as_pinned(replace(registry.resolve(reference), name=entry.name), entry)


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


def _stored_entries(registry: Registry, old: Sequence[Locked]) -> list[Locked]:
    """What was pulled into the store; and what the lock has under other names and `sync` has fetched for it."""
    records = [record for record in registry.store.records.all() if record.source.startswith("hub ")]
    entries = [_of_record(record) for record in records if record.is_named]
    names, here = {entry.name for entry in entries}, {record.sha256 for record in records}
    return entries + [entry for entry in old if entry.name not in names and entry.sha256 in here]


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


def _portable_compositions(registry: Registry) -> list[NamedComposition]:
    """The compositions, but those that packages ship, whose adapters other machines can get."""
    names = [
        name for name in registry.compositions.names() if not registry.compositions.source(name).startswith("ship")
    ]
    found = [registry.compositions.look_up(name) for name in names]
    return [_whole(registry, item) for item in found if item is not None and _is_portable(registry, item)]


def _whole(registry: Registry, composition: NamedComposition) -> NamedComposition:
    """With the tensors of its mode."""
    if not composition.mode:
        return composition
    return composition.model_copy(update={"tensors": registry.compositions.state(composition)})


def _is_portable(registry: Registry, composition: NamedComposition) -> bool:
    base = BaseIdentity(composition.base, None, "")
    try:
        items = [registry.resolve(term.reference, base, offline=True) for term in composition.terms]
    except LoraRtError:
        return False
    return all(item.source.startswith(("hub ", "shipped ")) for item in items)


def _project_compositions(registry: Registry, project: Project) -> list[NamedComposition]:
    """The compositions that the project names. One that is not in the store stays as it is locked, or as it ships.

    Raises:
        ProjectError: one is neither in the store nor locked, or has terms that can't be used; all are named.
    """
    locked = {item.name: item for item in read_locked_compositions(registry.folder)}
    found: list[NamedComposition] = []
    problems: list[str] = []
    for name in project.compositions:
        kept = registry.compositions.own(name) or locked.get(name) or registry.compositions.look_up(name)
        if kept is None:
            problems.append(f"{name}: there is no such composition here")
        elif name not in locked or kept is not locked[name]:
            problems += [f"{name}: {problem}" for problem in registry.composition_problems(kept)]
        found += [kept] if kept is not None else []
    if problems:
        text = f"compositions of {PROJECT_FILE} can't be locked"
        raise ProjectError(text, next_step="Tune them with: lora-rt tune", problems=problems)
    return [_whole(registry, item) for item in found]


def _composition_differences(registry: Registry, project: Project | None) -> list[str]:
    """What the lock says of compositions and the project, or the store, does not."""
    locked = {item.name: item for item in read_locked_compositions(registry.folder)}
    problems = []
    if project is not None:
        problems += [f"the composition {name} is not locked" for name in project.compositions if name not in locked]
        problems += [
            f"the composition {name} is locked, but not in the project"
            for name in locked
            if name not in project.compositions
        ]
    for name, item in locked.items():
        own = registry.compositions.own(name)
        if own is not None and own.sha256 != item.sha256:
            problems.append(f"the composition {name} is {own.sha256[:12]} here, locked is {item.sha256[:12]}")
    return problems


def _check_compositions(registry: Registry) -> None:
    """Whether the locked compositions can be used with the adapters that are here.

    Raises:
        ChangedAdapterError: one is another in the store, or its adapters are missing or others; all are named.
    """
    problems = _composition_differences(registry, None)
    if problems:
        raise ChangedAdapterError(problems[0], next_step="Keep it with lora-rt lock, or remove it with lora-rt rm")
    locked = read_locked_compositions(registry.folder)
    broken = [f"{item.name}: {problem}" for item in locked for problem in registry.composition_problems(item)]
    if broken:
        text = "locked compositions can't be used with the adapters here"
        step = "Install the adapters that they were tuned over, or tune them again"
        raise ChangedAdapterError(text, next_step=step, problems=broken)
