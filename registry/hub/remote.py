"""What a repository holds at one commit: which of the readable files, how large, with which hashes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

from lora_rt.registry.errors import HubError, RejectedAdapterError
from lora_rt.registry.files import CONFIG, limit_of, select
from lora_rt.registry.hub import library
from lora_rt.registry.hub.client import api, explained
from lora_rt.registry.inspection.kinds import missing_weights
from lora_rt.registry.reference import hub_place, is_commit
from lora_rt.registry.strict_json import shown

MAX_ENTRIES = 10_000


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file on the Hub: its size in bytes and its hash, sha256 for large files, git's blob id (sha1) for others."""

    size: int
    sha256: str | None
    blob_id: str


@dataclass(frozen=True, slots=True)
class RemoteAdapter:
    """A repository, or a folder of it (`org/repo//folder`), at a full commit, with those of its files that are read."""

    repo: str
    commit: str
    files: Mapping[str, RemoteFile]


def place_of(target: str, name: str) -> tuple[str, str]:
    """(org/repo, path in it) of a file of an adapter."""
    repo, folder = hub_place(target)
    return repo, f"{folder}/{name}" if folder else name


def commit_of(repo: str, revision: str | None) -> str:
    """The full commit that a revision of a repository is now, one request; a folder in it has the repository's.

    Raises:
        HubError: it can not be found or reached, or the answer is no commit.
    """
    with explained(repo, revision):
        commit = api().model_info(hub_place(repo)[0], revision=revision or "main").sha
    if not isinstance(commit, str) or not is_commit(commit):
        raise HubError(
            f"the Hub answered with the commit {shown(commit)} for {repo}, which is not 40 hexadecimal digits",
            next_step="Nothing was installed; check HF_ENDPOINT",
        )
    return commit


def look(repo: str, commit: str) -> RemoteAdapter:
    """List a repository at a commit.

    Raises:
        HubError: it can not be found or reached.
        RejectedAdapterError: what it holds is no adapter, by its names and sizes alone.
    """
    name, folder = hub_place(repo)
    with explained(repo, commit):
        tree = api().list_repo_tree(name, revision=commit, recursive=True)
        entries = [item for item in islice(tree, MAX_ENTRIES) if isinstance(item, library.RepoFile)]
        start = f"{folder}/" if folder else ""
        here = {item.path.removeprefix(start): item for item in entries if item.path.startswith(start)}
        found = {name: _remote_file(here[name]) for name in select(here)}
    problems = _problems(found, [path for path in here if "/" not in path])
    if problems:
        elsewhere = sorted(item.path.rpartition("/")[0] for item in entries if item.path.endswith(f"/{CONFIG}"))
        next_step = f"Adapters are in: {', '.join(f'{name}//{place}' for place in elsewhere[:20])}" if elsewhere else ""
        text = f"{repo} at {commit[:12]} is not an adapter that can be loaded"
        raise RejectedAdapterError(text, problems=problems, next_step=next_step)
    return RemoteAdapter(repo, commit, found)


def _remote_file(item: library.RepoFile) -> RemoteFile:
    """What the Hub says of a file; a ValueError where that is not what a Hub says."""
    size = item.lfs.size if item.lfs else item.size
    sha256 = item.lfs.sha256 if item.lfs else None
    if not isinstance(size, int) or size < 0:
        raise ValueError(f"the size of {item.path} is {shown(size)}")
    if not isinstance(item.blob_id, str) or not (sha256 is None or isinstance(sha256, str)):
        raise ValueError(f"the hashes of {item.path} are not texts")
    return RemoteFile(size, sha256, item.blob_id)


def _problems(found: Mapping[str, RemoteFile], names: list[str]) -> list[str]:
    problems = [] if CONFIG in found else [f"{CONFIG} is missing"]
    problems += [missing] if (missing := missing_weights(names)) else []
    problems += [
        f"{name} has {file.size:,} bytes, more than the {limit_of(name):,} that are read"
        for name, file in found.items()
        if file.size > (limit_of(name) or 0)
    ]
    return problems
