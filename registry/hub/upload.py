"""An adapter to the Hub: its files and a card in one commit, compared afterwards with what the Hub has."""

from __future__ import annotations

import hashlib

from lora_rt.registry.errors import HubError, InvalidReferenceError
from lora_rt.registry.files import README, open_plain
from lora_rt.registry.hub import library
from lora_rt.registry.hub.client import api, explained
from lora_rt.registry.hub.model_card import model_card
from lora_rt.registry.hub.remote import RemoteAdapter, look
from lora_rt.registry.inspection import InspectedAdapter, inspect_adapter
from lora_rt.registry.reference import is_commit, is_hub_id
from lora_rt.registry.resolved import Resolved


def push(adapter: Resolved, repo: str, *, private: bool = False) -> str:
    """Upload an adapter, and give the commit; the repository is made if there is none.

    Raises:
        InvalidReferenceError: `repo` is not of the form org/repo.
        RejectedAdapterError: the adapter would be refused by whoever pulls it.
        HubError: no access, no network, or the Hub has something else afterwards.
    """
    if not is_hub_id(repo):
        raise InvalidReferenceError(f"{repo[:120]!r} is not a repository", next_step="Write org/repo")
    inspected = inspect_adapter(adapter.folder, name=adapter.name, sha256=adapter.sha256)
    readme = model_card(inspected, repo).encode()
    with explained(repo):
        client = api()
        client.create_repo(repo, private=private, exist_ok=True)
        if private and client.model_info(repo).private is False:
            raise HubError(f"{repo} is there and public", next_step="Leave --private out, or choose another repository")
        commit = _commit(client, adapter, inspected, repo, readme)
    if not isinstance(commit, str) or not is_commit(commit):
        raise HubError(f"the Hub did not say which commit it made of {repo}", next_step=f"Look at {repo} on the Hub")
    _compare(look(repo, commit), inspected, readme)
    return commit


def _commit(client: library.HfApi, adapter: Resolved, inspected: InspectedAdapter, repo: str, readme: bytes) -> object:
    operations = _operations(inspected, readme)
    try:
        return client.create_commit(repo, operations, commit_message=f"Add the adapter {adapter.name}").oid
    except RuntimeError as error:
        # The client wraps whatever happens in its upload threads.
        cause = error.__cause__ or error
        if isinstance(cause, HubError):
            raise cause from error
        text = f"the upload to {repo} failed: {' '.join(str(cause).split())[:200]}"
        raise HubError(text, next_step="Try again") from error


def _operations(adapter: InspectedAdapter, readme: bytes) -> list[library.CommitOperationAdd]:
    names = sorted(set(adapter.files) - {README})
    files = [library.CommitOperationAdd(path_in_repo=name, path_or_fileobj=adapter.folder / name) for name in names]
    return [*files, library.CommitOperationAdd(path_in_repo=README, path_or_fileobj=readme)]


def _compare(remote: RemoteAdapter, adapter: InspectedAdapter, readme: bytes) -> None:
    problems = []
    for name in sorted({*adapter.files, README}):
        there = remote.files.get(name)
        if there is None:
            problems.append(f"{name} is missing there")
        elif there.sha256 is not None and name != README:
            problems += [f"{name} has another sha256 there"] if there.sha256 != adapter.files[name] else []
        else:
            content = readme if name == README else _content(adapter, name)
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
            problems += [f"{name} has other bytes there"] if blob != there.blob_id else []
    if problems:
        raise HubError(
            f"{remote.repo} does not hold what was sent",
            next_step="Push again, or look at the repository on the Hub",
            problems=problems,
        )


def _content(adapter: InspectedAdapter, name: str) -> bytes:
    with open_plain(adapter.folder / name, 1 << 30) as (file, _):
        return file.read()
