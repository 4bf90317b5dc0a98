"""Files from the Hub into a staging folder: through the client's cache, and hashed on the way."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lora_rt.registry.card import read_card
from lora_rt.registry.errors import ChangedAdapterError, HubError
from lora_rt.registry.files import (
    CARD,
    CHUNK,
    CONFIG,
    README,
    SHARD_INDEX,
    STATE,
    WEIGHTS,
    limit_of,
    open_plain,
    present,
    shard_number,
)
from lora_rt.registry.hub import library
from lora_rt.registry.hub.client import api, explained
from lora_rt.registry.hub.internals import mark_absent, read_listing
from lora_rt.registry.hub.remote import RemoteAdapter, RemoteFile, place_of
from lora_rt.registry.reference import is_commit

_log = logging.getLogger("lora_rt.registry")

Report = Callable[[str, int, int], None]
"""Called with a file's name, the bytes that arrived since the last call, and the bytes that it will have."""


def silent(name: str, arrived: int, total: int) -> None:
    """A report that nobody reads."""


def fetch(remote: RemoteAdapter, folder: Path, report: Report = silent) -> None:
    """Bring every file of a remote adapter into an empty folder.

    A file of the cache that does not have the hash that the Hub states is downloaded once more. What the adapter does
    without is marked in the cache, so that offline the same files are taken from it.

    Raises:
        HubError: not reachable, or more bytes than stated.
        ChangedAdapterError: a file does not have the stated hash.
    """
    for name, file in sorted(remote.files.items()):
        tries = (_download(remote, name, file, report, again=again) for again in (False, True))
        if not any(_copy(path, folder / name, file) for path in tries):
            raise ChangedAdapterError(
                f"{name} of {remote.repo} arrived with another content than the Hub states for {remote.commit[:12]}",
                next_step="Nothing was installed; try again, or ask its author",
            )
    for name in {CARD, README, SHARD_INDEX} - remote.files.keys():
        mark_absent(*place_of(remote.repo, name), remote.commit)


def fetch_cached(repo: str, commit: str, names: list[str] | None, folder: Path) -> None:
    """The same without any request, from the client's cache, whose files are named by their hash.

    Without names, all that the repository has of an adapter is taken; see `_all_of`.

    Raises:
        HubError: the cache lacks a file.
        ChangedAdapterError: a file of the cache is damaged.
    """
    if names is None:
        names = _all_of(repo, commit)
    for name in names:
        with explained(repo, commit):
            path = Path(library.hf_hub_download(*place_of(repo, name), revision=commit, local_files_only=True))
        real = _inside_cache(path)
        expected = RemoteFile(real.stat().st_size, real.name if len(real.name) == 64 else None, real.name)
        if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", real.name) or not _copy(path, folder / name, expected):
            raise ChangedAdapterError(
                f"{name} of {repo} in the Hub's cache is damaged", next_step=f"Go online and type: lora-rt pull {repo}"
            )


def _all_of(repo: str, commit: str) -> list[str]:
    """The files that a repository has of an adapter at a commit, as far as the client's cache knows it.

    Other programs fetch the configuration and the weights alone. Without its card an adapter may be another one, so
    that is told, and a later pull looks for the card (`is_settled`).

    Raises:
        RejectedAdapterError: the card is no card.
    """
    config = _cached(repo, CONFIG, commit)
    has = present(Path(config).parent) if isinstance(config, str) else []
    is_sharded = any(map(shard_number, has))
    names = {*has, CONFIG} if is_sharded else {*has, CONFIG, WEIGHTS}
    card = read_card(Path(config).parent) if CARD in has else None
    optional = {CARD} | ({SHARD_INDEX} if is_sharded else set()) | ({STATE} if card and card.state else set())
    if unknown := [name for name in sorted(optional - names) if not _is_known(repo, name, commit)]:
        without = " and ".join(unknown)
        _log.warning(
            "the Hub's cache has a part of %s alone: taken without %s, if it has any; online, lora-rt pull %s looks",
            *(repo, without, repo),
        )
    return sorted(names)


def is_settled(repo: str, commit: str, files: Iterable[str]) -> bool:
    """Whether an installed commit has its card, or is known to have none; a part of it may have come from the cache."""
    return CARD in files or _is_known(repo, CARD, commit)


def _cached(repo: str, name: str, commit: str) -> Any:
    """A file's path, None where nothing is known of it, and something else where it is known not to be there."""
    return library.try_to_load_from_cache(*place_of(repo, name), revision=commit)


def _is_known(repo: str, name: str, commit: str) -> bool:
    """Whether the client's cache has a file, or knows that the repository doesn't."""
    listing = read_listing(place_of(repo, CONFIG)[0], commit)
    absent = listing is not None and place_of(repo, name)[1] not in listing
    return absent or _cached(repo, name, commit) is not None


def cached_commit(repo: str, revision: str | None) -> str | None:
    """The commit that the client's cache has for a revision of a repository, with its configuration; or None."""
    path = _cached(repo, CONFIG, revision or "main")
    if not isinstance(path, str):
        return None
    depth = place_of(repo, CONFIG)[1].count("/")
    commit = Path(path).parents[depth].name
    return commit if is_commit(commit) else None


def _download(remote: RemoteAdapter, name: str, file: RemoteFile, report: Report, *, again: bool) -> Path:
    bar = _bar(remote.repo, name, file.size, report)
    with explained(remote.repo, remote.commit):
        try:
            path = api().hf_hub_download(
                *place_of(remote.repo, name), revision=remote.commit, tqdm_class=bar, force_download=again
            )
        except OSError as error:
            if "Consistency check failed" not in str(error):
                raise
            raise HubError(
                f"{name} of {remote.repo} arrived cut off or with bytes too many", next_step="Try again"
            ) from error
    return Path(path)


def _copy(source: Path, target: Path, expected: RemoteFile) -> bool:
    """Copy a file of the cache; whether what was copied has the expected hash."""
    real = _inside_cache(source)
    sha256, blob = hashlib.sha256(), hashlib.sha1(f"blob {expected.size}\0".encode(), usedforsecurity=False)
    copied = 0
    with open_plain(real, limit_of(target.name) or 0) as (file, _), open(target, "wb") as copy:
        while chunk := file.read(CHUNK):
            sha256.update(chunk)
            blob.update(chunk)
            copy.write(chunk)
            copied += len(chunk)
    digest = sha256.hexdigest() == expected.sha256 if expected.sha256 else blob.hexdigest() == expected.blob_id
    return digest and copied == expected.size


def _inside_cache(path: Path) -> Path:
    """The file that a path of the cache leads to, which must lie in the cache itself."""
    real, cache = path.resolve(), Path(library.constants.HF_HUB_CACHE).resolve()
    if not real.is_relative_to(cache):
        raise HubError(
            f"the Hub's cache leads out of itself, to {real}",
            next_step="Look at the cache, or set HF_HOME to a new one",
        )
    return real


def _bar(repo: str, name: str, size: int, report: Report) -> type[Any]:
    """A progress bar as the client wants one; it reports, and ends a body that is longer than stated."""

    class Counting(library.tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            self.arrived = int(kwargs.get("initial") or 0)
            # Over Xet there is a second bar for the bytes on the wire, which are compressed chunks, not the file.
            self.counts = not str(kwargs.get("desc", "")).endswith("downloading bytes")

        def update(self, n: float | None = 1) -> None:
            if not self.counts:
                return
            self.arrived += int(n or 0)
            if self.arrived > size:
                raise HubError(
                    f"{name} of {repo} goes on after its {size:,} bytes", next_step="Nothing was installed; try again"
                )
            report(name, int(n or 0), size)

    return Counting
