"""Which base this is: a digest of everything that decides what it computes, and what can be said before it is loaded.

A digest covers config.json and every byte of the weights. Reading tens of gigabytes takes a while, so the sha256 of
each file is remembered in the home under what changes whenever the file does.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from lora_rt.core.base import default
from lora_rt.core.base.configuration import weight_files
from lora_rt.core.base.progress import step
from lora_rt.core.base.source import BaseSource, parse_base, sha256_file
from lora_rt.registry import home
from lora_rt.registry.card import BaseIdentity
from lora_rt.registry.files import stamp
from lora_rt.registry.inspection.safetensors_header import read_header

MANIFEST = "lora-rt-base.json"
"""Written last into a folder that we prepared: `base` is which base it holds, `files` the size of each file and
`weights` the sha256 of those that hold weights."""

_QUICK_BYTES = 256 << 20
_ANNOUNCED_BYTES = 1 << 30
_UNSETTLED_NS = 50_000_000  # a file that changed so lately may change again within one tick of the file system's clock
_FILE, _REMEMBERED = "digests.json", 2000
_SNAPSHOT = re.compile(r"models--([\w.-]+?)(?:--([\w.-]+))?/snapshots/([0-9a-f]{40})")


def identify_base(text: str) -> BaseIdentity:
    """Which base `--base` means, told in a fraction of a second: nothing is fetched, converted or loaded.

    The digest is "" where finding it takes longer than that: a repository that is not cached, or weights of more than
    256 MiB that were never read before. Ids are only labels: compare with `BaseIdentity.contradicts`.

    Raises:
        BaseError: there is no such base.
    """
    return _identify(parse_base(text), _quick_sha256)


def identify(source: BaseSource) -> BaseIdentity:
    """The same, with the digest of whatever lies on this machine, however long that takes."""
    return _identify(source, sha256_of)


def identify_folder(folder: Path) -> BaseIdentity:
    """Which base a folder holds; a copy of it elsewhere is the same base, and one changed byte makes it another."""
    return _of_folder(folder, sha256_of)


def known_linears(source: BaseSource) -> list[str]:
    """The names of a base's linear layers as the weights on this machine have them; none where that does not settle it.

    It does where they are called as Llama's are: transformers gives layers of other architectures other names than
    their files have, and may put experts together.
    """
    if source.kind == "default":
        return default.linears()
    folder = _cached(source) if source.kind == "hub" else source.path
    if folder is None or not folder.is_dir():
        return []
    keys = [key for file in weight_files(folder) if file.is_file() for key in _keys(file)]
    names = [key.removesuffix(".weight") for key in keys if key.endswith(".weight") and ".layers." in key]
    linears = [name for name in names if name.endswith("_proj")]
    like_llama = {name.rsplit(".", 1)[-1] for name in linears} == set(default.LINEARS)
    return linears if like_llama and not any("expert" in key for key in keys) else []


def _keys(file: Path) -> list[str]:
    with file.open("rb") as stream:
        entries, problems = read_header(stream, file.stat().st_size)
    return [] if problems else list(entries)


def label_of(source: BaseSource) -> str:
    """What a base is called, from its text alone."""
    if source.kind == "default":
        return default.IDENTITY.id
    if source.path is None:
        return source.text
    return source.path.stem if source.kind == "gguf" else source.path.name


def sha256_of(path: Path) -> str:
    """The sha256 of a file, read once for as long as it stays what it is."""
    key = stamp(path)
    found = recall(key)
    if found is None:
        if path.stat().st_size < _ANNOUNCED_BYTES:
            found = sha256_file(path)
        else:
            with step(f"reading {path.name} to know which base it is (once)"):
                found = sha256_file(path)
        if key == stamp(path) and time.time_ns() - path.stat().st_mtime_ns > _UNSETTLED_NS:
            remember(key, found)
    return found


def manifest_of(folder: Path) -> BaseIdentity | None:
    """Which base a folder holds that we prepared; None where it is no such folder or not as it was left."""
    try:
        document = json.loads((folder / MANIFEST).read_text())
        identity = TypeAdapter(BaseIdentity).validate_python(document["base"])
        if any((folder / name).stat().st_size != size for name, size in document["files"].items()):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError, RecursionError):
        return None
    return identity


def _identify(source: BaseSource, sha256: Callable[[Path], str]) -> BaseIdentity:
    if source.kind == "default":
        return default.IDENTITY
    if source.kind == "hub":
        folder = _cached(source)
        if folder is None:
            return BaseIdentity(source.text, source.revision, "")
        return BaseIdentity(source.text, folder.name, _of_folder(folder, sha256).digest)
    assert source.path is not None
    if source.kind == "gguf":
        return BaseIdentity(source.path.stem, None, sha256(source.path))
    return _of_folder(source.path, sha256)


def _of_folder(folder: Path, sha256: Callable[[Path], str]) -> BaseIdentity:
    if (made := _prepared(folder, sha256)) is not None:
        return made
    weights = weight_files(folder)
    fetched = all(file.is_file() for file in weights)  # of a repository the configuration alone may have been fetched
    parts = [(file.name, sha256(file)) for file in weights] if fetched else []
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for name, content in parts:
        digest.update(f"{name}:{content}".encode())
    known = digest.hexdigest() if parts and all(content for _, content in parts) else ""
    if snapshot := _SNAPSHOT.search(folder.as_posix()):
        return BaseIdentity("/".join(filter(None, snapshot.groups()[:2])), snapshot[3], known)
    return BaseIdentity(folder.name, None, known)


def _prepared(folder: Path, sha256: Callable[[Path], str]) -> BaseIdentity | None:
    """What the manifest says, if the weights are still those that it speaks of."""
    identity = manifest_of(folder)
    if identity is None or _SNAPSHOT.search(folder.as_posix()):
        return None  # a stranger's repository may hold any file, this one too
    weights = json.loads((folder / MANIFEST).read_text()).get("weights", {})
    if not isinstance(weights, dict):
        return None
    found = {name: sha256(folder / name) for name in weights}
    return identity if all(found[name] in ("", wanted) for name, wanted in weights.items()) else None


def _cached(source: BaseSource) -> Path | None:
    """The folder of the Hub client's cache that holds this repository, as far as no request is needed to tell."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source.text, "config.json", revision=source.revision)
    return Path(found).parent if isinstance(found, str) else None


def _quick_sha256(path: Path) -> str:
    if path.stat().st_size > _QUICK_BYTES:
        return recall(stamp(path)) or ""
    return sha256_of(path)


def recall(key: str) -> str | None:
    """What was remembered under a key."""
    return home.remembered(_FILE).get(key)


def remember(key: str, digest: str) -> None:
    """Keep it for later starts."""
    home.remember(_FILE, dict([*home.remembered(_FILE).items(), (key, digest)][-_REMEMBERED:]))
