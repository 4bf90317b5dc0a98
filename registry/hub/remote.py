"""What a repository holds at one commit: which of the readable files, how large, with which hashes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from lora_rt.registry.errors import HubError, RejectedAdapterError
from lora_rt.registry.files import CONFIG, LIMITS, WEIGHTS
from lora_rt.registry.hub.client import api, explained
from lora_rt.registry.reference import is_commit
from lora_rt.registry.strict_json import shown

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

MAX_ENTRIES = 10_000


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file on the Hub: its size in bytes and its hash, sha256 for large files, git's blob id (sha1) for others."""

    size: int
    sha256: str | None
    blob_id: str


@dataclass(frozen=True, slots=True)
class RemoteAdapter:
    """A repository at a full commit, with those of its files that are ever read."""

    repo: str
    commit: str
    files: Mapping[str, RemoteFile]


def commit_of(repo: str, revision: str | None) -> str:
    """The full commit that a revision of a repository is now, one request.

    Raises:
        HubError: it can not be found or reached, or the answer is no commit.
    """
    with explained(repo, revision):
        commit = api().model_info(repo, revision=revision or "main").sha
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
    from huggingface_hub.hf_api import RepoFile

    with explained(repo, commit):
        tree = api().list_repo_tree(repo, revision=commit, recursive=True)
        entries = [item for item in islice(tree, MAX_ENTRIES) if isinstance(item, RepoFile)]
        found = {item.path: _remote_file(item) for item in entries if item.path in LIMITS}
    problems = _problems(found, [item.path for item in entries])
    if problems:
        raise RejectedAdapterError(f"{repo} at {commit[:12]} is no adapter that can be loaded", problems=problems)
    return RemoteAdapter(repo, commit, found)


def _remote_file(item: RepoFile) -> RemoteFile:
    """What the Hub says of a file; a ValueError where that is not what a Hub says."""
    size = item.lfs.size if item.lfs else item.size
    sha256 = item.lfs.sha256 if item.lfs else None
    if not isinstance(size, int) or size < 0:
        raise ValueError(f"the size of {item.path} is {shown(size)}")
    if not isinstance(item.blob_id, str) or not (sha256 is None or isinstance(sha256, str)):
        raise ValueError(f"the hashes of {item.path} are no texts")
    return RemoteFile(size, sha256, item.blob_id)


def _problems(found: Mapping[str, RemoteFile], names: list[str]) -> list[str]:
    problems = [f"{name} is missing" for name in (CONFIG, WEIGHTS) if name not in found]
    if WEIGHTS not in found and "adapter_model.bin" in names:
        problems.append("adapter_model.bin is a pickle, which is never opened; its author can save it as safetensors")
    if WEIGHTS not in found and "model.safetensors" in names:
        problems.append("it holds a whole model; lora-rt adds LoRA adapters to a base")
    problems += [
        f"{name} has {file.size:,} bytes, more than the {LIMITS[name]:,} that are read"
        for name, file in found.items()
        if file.size > LIMITS[name]
    ]
    return problems
