"""Is everything still what it was? Files against their digests, adapters against the check, tags against the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any

from lora_rt.registry.errors import HubError, RejectedAdapterError, StoreError, UnknownAdapterError
from lora_rt.registry.hub.limits import NEXT_STEP
from lora_rt.registry.hub.remote import commit_of
from lora_rt.registry.inspection import inspect_adapter
from lora_rt.registry.lock import Locked, read_lock
from lora_rt.registry.paths import folder_of
from lora_rt.registry.project import LOCK_FILE
from lora_rt.registry.reference import Reference, composed, is_commit, is_path
from lora_rt.registry.registry import Registry
from lora_rt.registry.resolved import Resolved, changes
from lora_rt.registry.sync import check_lock

COMPOSITION = "composition"
UNREACHABLE = "; it is not asked about the others"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found about one adapter, one named composition, or the lock. It is sound where there are no problems."""

    name: str
    source: str
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()
    todo: str = ""

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return {**asdict(self), "status": "damaged" if self.problems else "ok"}


def verify(registry: Registry, names: Sequence[str] = (), *, offline: bool = False) -> list[Verdict]:
    """Check the named adapters and compositions, or everything that is installed together with the lock.

    Raises:
        InvalidReferenceError: what is not a name.
        UnknownAdapterError: a name leads nowhere.
    """
    names = [name if is_path(name) else composed(name) for name in names]
    items, damaged = registry.installed(), registry.store.records.damaged()
    compositions = registry.compositions.names()
    missing = registry.pinned.missing()
    installed = {*(item.name for item in items), *(item.name for item in damaged)}
    known = {*compositions, *installed, *(name for name, _, _ in missing)}
    unknown = [name for name in names if name not in known]
    for name in unknown:
        Reference.parse(name)
    if unknown:
        text = f"there is no adapter {', '.join(map(repr, unknown))}"
        near = dict.fromkeys(match for name in unknown for match in get_close_matches(name, known, 1))
        text += f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        folder = next(filter(is_path, unknown), None)
        step = f"What is installed is verified, by its name; look at a folder with: lora-rt show {folder}"
        raise UnknownAdapterError(text, next_step="See: lora-rt list" if folder is None else step)
    pins = {pin.name: pin for pin in read_lock(registry.folder) or [] if pin.reference.kind == "path"}
    verdicts: list[Verdict] = []
    for item in items:
        if not names or item.name in names:
            # A Hub that does not answer is asked once, not once for each adapter.
            unheard = any(note.endswith(UNREACHABLE) for verdict in verdicts for note in verdict.notes)
            pin = pins.get(item.name)
            there = None if pin is None else folder_of(registry.folder, pin.reference)
            verdicts.append(_check(item, offline or unheard, pin if there == item.folder else None))
    verdicts += [
        Verdict(item.name, "store", (item.message,), todo=item.todo)
        for item in damaged
        if not names or item.name in names
    ]
    verdicts += [
        Verdict(name, path, ("there is no such folder",), todo=f"put it there, or take its line out of {file}")
        for name, path, file in missing
        if not names or name in names
    ]
    verdicts += [check_composition(registry, name) for name in compositions if not names or name in names]
    if not names and (registry.folder / LOCK_FILE).exists():
        verdicts.append(Verdict(LOCK_FILE, str(registry.folder), tuple(check_lock(registry)), todo="lora-rt lock"))
    return verdicts


def check_composition(registry: Registry, name: str) -> Verdict:
    """Whether a named composition can be read and its adapters are those that it was tuned for; no requests."""
    try:
        composition = registry.compositions.look_up(name)
    except StoreError as error:
        return Verdict(name, COMPOSITION, (error.message,), todo=error.next_step)
    if composition is None:
        return Verdict(name, COMPOSITION, ("it is gone",))
    problems = registry.composition_problems(composition)
    hidden = registry.clashing(name)
    notes = [f"an adapter ({source}) has the same name; the composition is used" for source in hidden]
    todo = f"lora-rt rm {name}, and tune it again, or get its adapters back" if problems else ""
    return Verdict(name, f"{COMPOSITION} {composition}", tuple(problems), tuple(notes), todo)


def _check(item: Resolved, offline: bool, pin: Locked | None = None) -> Verdict:
    problems = changes(item.folder, item.files)
    todo = _repair(item) if problems else ""
    if not problems and pin is not None and (apart := changes(item.folder, pin.files)):
        problems, todo = [f"not what {LOCK_FILE} says: {text}" for text in apart], "lora-rt lock, if that was meant"
    if not problems:
        try:
            inspect_adapter(item.folder, name=item.name)
        except RejectedAdapterError as error:
            problems, todo = list(error.problems), f"lora-rt rm {item.name}"
    moved, notes = ([], []) if offline else _remote(item)
    if moved and not problems:
        todo = f"lora-rt rm {item.name} and pull it again to take the new one; what is installed is what it was"
    return Verdict(item.name, item.source, tuple(problems + moved), tuple(notes), todo)


def _remote(item: Resolved) -> tuple[list[str], list[str]]:
    """Whether the tag or branch that was asked for is still the commit that was pulled."""
    repo = item.source.removeprefix("hub ")
    if repo == item.source or item.requested is None or is_commit(item.requested):
        return [], []
    try:
        commit = commit_of(repo, item.requested)
    except HubError as error:
        away = UNREACHABLE if error.next_step == NEXT_STEP else ""
        return [], [f"not compared with the Hub: {error.message}{away}"]
    if commit == item.revision:
        return [], []
    return [f"{item.requested} of {repo} moved to {commit}"], []


def _repair(item: Resolved) -> str:
    repo = item.source.removeprefix("hub ")
    if "/" in item.name:
        return f"lora-rt rm {item.name}; it is fetched again when it is used"
    if repo != item.source and item.revision:
        return f"lora-rt pull {repo}@{item.requested or item.revision} --as {item.name}"
    if item.source.startswith("shipped"):
        return "install the package again"
    return f"lora-rt rm {item.name}, and train or copy it again"
