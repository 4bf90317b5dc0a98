"""An adapter from the Hub into the store: pinned to a commit, checked whole, downloaded once, however many ask."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from filelock import BaseFileLock, FileLock

from lora_rt.registry.errors import ChangedAdapterError, HubError, StoreError
from lora_rt.registry.hub.client import asks_nobody
from lora_rt.registry.hub.download import Report, cached_commit, fetch, fetch_cached, is_settled, silent
from lora_rt.registry.hub.remote import commit_of, look
from lora_rt.registry.inspection import inspect_adapter
from lora_rt.registry.lock import Locked
from lora_rt.registry.records import Record
from lora_rt.registry.reference import Reference, check_name, composed, hub_place, is_commit, is_name
from lora_rt.registry.resolved import Resolved
from lora_rt.registry.store import Store, is_whole


def pull(
    store: Store,
    reference: Reference,
    *,
    name: str | None = None,
    offline: bool = False,
    report: Report = silent,
) -> Resolved:
    """Install `org/repo[@revision]` under a name, by default the repository's.

    Raises:
        HubError: not there, no access, no network.
        ChangedAdapterError: the tag moved since it was pulled last, or a file is not what the Hub states.
        RejectedAdapterError: it is no adapter that may be loaded.
        StoreError: the name belongs to another adapter.
    """
    name = composed(name or default_name(reference))
    check_name(name)  # before anything is fetched
    commit = _commit(store, reference, offline)
    if commit is None:
        record = find_installed(store, reference)[0]
        return _name_it(store, record, name, record.requested)
    return install(
        store, reference.target, commit, name, requested=_requested(reference), offline=offline, report=report
    )


def obtain(
    store: Store,
    reference: Reference,
    *,
    name: str | None = None,
    fresh: bool = False,
    offline: bool = False,
    report: Report = silent,
) -> Resolved:
    """The adapter of a repository for whoever uses it by its id: no name in the store comes to mean it.

    What is installed at this revision is taken as it is, unless `fresh` asks the Hub first.
    """
    name = name or default_name(reference)
    found = [] if fresh and not (offline or asks_nobody()) else find_installed(store, reference)
    if found:
        return replace(store.resolved(found[0]), name=name)
    commit = _commit(store, reference, offline)
    assert commit is not None  # offline, with nothing installed, ends in an error before this line
    item = install(store, reference.target, commit, requested=_requested(reference), offline=offline, report=report)
    return replace(item, name=name)


def install(
    store: Store,
    repo: str,
    commit: str,
    name: str | None = None,
    *,
    requested: str | None = None,
    expected: Mapping[str, str] | None = None,
    offline: bool = False,
    report: Report = silent,
) -> Resolved:
    """Install a repository at a full commit.

    Without a name it is kept under the repository's id, and nothing that anybody types by name changes its meaning.
    `expected` are the sha256 of its files where they are pinned already.
    """
    offline = offline or asks_nobody()
    have = partial(_at_hand, store, repo, commit, name, requested, expected, offline)
    if found := have():  # a home that can't be written has no lock
        return found
    with _one_at_a_time(store, repo, commit):
        if found := have():
            return found
        with store.staging() as folder:
            if offline:
                fetch_cached(repo, commit, sorted(expected) if expected else None, folder)
            else:
                fetch(look(repo, commit), folder, report)
            inspected = inspect_adapter(folder, name=name or repo)
            if expected is not None:
                _check_files(repo, commit, inspected.files, expected)
            if name is not None:
                _check_is_free(store, name, repo, inspected.card.base.id if inspected.card else "")
            return store.publish(folder, name or repo, source=source_of(repo), revision=commit, requested=requested)


def _at_hand(
    store: Store,
    repo: str,
    commit: str,
    name: str | None,
    requested: str | None,
    expected: Mapping[str, str] | None,
    offline: bool,
) -> Resolved | None:
    """What is installed of a commit, named or kept as it was asked for; None where it has to be fetched."""
    have = _installed(store, repo, commit, expected)
    if have is None or not (offline or expected is not None or is_settled(repo, commit, have.files)):
        return None
    return _name_it(store, have, name, requested) if name is not None else _keep(store, have, requested)


def install_pinned(store: Store, pin: Locked, *, offline: bool = False, report: Report = silent) -> Resolved:
    """Install what a lock pins.

    It is recorded as that commit and not as the tag that the lock names beside it: what a lock says of a tag holds in
    its folder alone.
    """
    return install(
        store,
        pin.reference.target,
        pin.revision,
        requested=pin.revision,
        expected=pin.files,
        offline=offline,
        report=report,
    )


def default_name(reference: Reference) -> str:
    """The name that an adapter gets where none is given: its repository's without the owner, or its folder's."""
    repo, folder = hub_place(reference.target)
    own = folder.rpartition("/")[2]
    return own if own and not own.startswith("checkpoint") and is_name(own) else repo.rpartition("/")[2]


def source_of(repo: str) -> str:
    """How a record names the Hub repository that it came from."""
    return f"hub {repo}"


def find_installed(store: Store, reference: Reference) -> list[Record]:
    """The records of a repository, of this revision if the reference has one; the first is what it means."""
    source, revision = source_of(reference.target), reference.revision
    if revision in (None, "main"):
        return _asked_as(store, source, None)
    return [
        record
        for record in store.records.all()
        if record.source == source
        and (record.requested == revision or (len(revision) >= 7 and (record.revision or "").startswith(revision)))
    ]


def _asked_as(store: Store, source: str, requested: str | None) -> list[Record]:
    """The records made for this tag or branch; first the one without a name, since others may be of older commits."""
    found = [record for record in store.records.all() if (record.source, record.requested) == (source, requested)]
    return sorted(found, key=lambda record: record.is_named)


def _requested(reference: Reference) -> str | None:
    return None if reference.revision in (None, "main") else reference.revision


def _commit(store: Store, reference: Reference, offline: bool) -> str | None:
    """The full commit that is wanted; None if only the store can say, because the Hub is not asked."""
    requested = _requested(reference)
    if requested is not None and is_commit(requested):
        return requested
    if not (offline or asks_nobody()):
        commit = commit_of(reference.target, requested)
        _check_tag(store, reference, requested, commit)
        return commit
    if find_installed(store, reference):
        return None
    if cached := cached_commit(reference.target, requested):
        return cached
    raise HubError(
        f"{reference.text} is neither in the store nor in the Hub client's cache, and the Hub is not asked",
        next_step=f"Go online and type: lora-rt pull {reference.text}",
    )


def _installed(store: Store, repo: str, commit: str, expected: Mapping[str, str] | None) -> Record | None:
    for record in store.records.all():
        same = record.source == source_of(repo) and record.revision == commit
        pinned = expected is None or record.files == dict(expected)
        if same and pinned and is_whole(store.objects / record.sha256, record.files):
            return record
    return None


def _keep(store: Store, record: Record, requested: str | None) -> Resolved:
    """An installed commit, recorded as what was asked for, so that the Hub need not be asked again."""
    for other in _asked_as(store, record.source, requested)[:1]:
        if other.revision == record.revision:
            return store.resolved(other)
    kept = replace(record, name=record.source.removeprefix("hub "), requested=requested)
    try:
        return store.link(kept)
    except OSError:  # of a home that can't be written what is there is used all the same
        return store.resolved(kept)


def _name_it(store: Store, record: Record, name: str, requested: str | None) -> Resolved:
    _check_is_free(store, name, record.source.removeprefix("hub "), record.base)
    wanted = replace(record, name=name, requested=requested)
    meant = _asked_as(store, record.source, requested)[:1]
    is_so = wanted == record and [other.revision for other in meant] == [record.revision]
    return store.resolved(record) if is_so else store.link(wanted)


def holder_of(store: Store, name: str, repo: str, base: str) -> Record | None:
    """The adapter of another source that has this name for this base; one without a card has it for every base."""
    others = [record for record in store.records.named(name) if record.source != source_of(repo)]
    return next((record for record in others if record.base == base or "" in (record.base, base)), None)


def _check_is_free(store: Store, name: str, repo: str, base: str) -> None:
    holder = holder_of(store, name, repo, base)
    if holder is not None:
        raise StoreError(
            f"the name {name!r} belongs to an adapter {holder.origin}",
            next_step=f"Choose another: lora-rt pull {repo} --as NAME",
        )


def _check_tag(store: Store, reference: Reference, requested: str | None, commit: str) -> None:
    """A tag or branch that was asked for by name must still be the commit that it was."""
    if requested is None:
        return
    for record in store.records.all():
        if record.source == source_of(reference.target) and record.requested == requested and record.revision != commit:
            raise ChangedAdapterError(
                f"{reference.text} moved: it was {record.revision or ''} when it was pulled, now {commit}",
                next_step=f"To take the new one: lora-rt rm {record.name}, then lora-rt pull {reference.text}",
            )


def _check_files(repo: str, commit: str, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    names = sorted({*found, *expected})
    problems = [
        f"{name}: sha256 is {found.get(name, 'missing')}, locked is {expected.get(name, 'nothing')}"
        for name in names
        if found.get(name) != expected.get(name)
    ]
    if problems:
        raise ChangedAdapterError(
            f"{repo}@{commit[:12]} is not what was locked",
            next_step="Do not use it; ask its author what was changed",
            problems=problems,
        )


def _one_at_a_time(store: Store, repo: str, commit: str) -> BaseFileLock:
    """Held while one commit of a repository is fetched, so that others who want it wait and then find it."""
    folder = store.root / "pulling"
    folder.mkdir(parents=True, exist_ok=True)
    # A hash, since the name of a file has 255 bytes at most.
    return FileLock(folder / f"{hashlib.sha256(f'{repo}@{commit}'.encode()).hexdigest()}.lock")
