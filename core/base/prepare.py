"""Turns a base source into a folder that loads with a plain read: converted from GGUF and quantized once, then kept.

    home/bases/<name>-<digest>/<precision>/     an ordinary transformers folder + lora-rt-base.json, written last

A folder without that file, or whose files have other sizes than it says, is not used and is made again.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError

from lora_rt.core.base import default, hub
from lora_rt.core.base.precision import QUANTIZED, Precision, compute_dtype, quantization_config
from lora_rt.core.base.progress import step
from lora_rt.core.base.reading import UNREADABLE, first_line, whole_model, whole_tokenizer
from lora_rt.core.base.silence import silence_libraries
from lora_rt.core.base.source import BaseError, BaseSource, identify_folder, sha256_file
from lora_rt.registry import home
from lora_rt.registry.card import BaseIdentity

MANIFEST = "lora-rt-base.json"


@dataclass(frozen=True, slots=True)
class PreparedBase:
    """A folder that transformers loads as it is, and which base it holds."""

    folder: Path
    identity: BaseIdentity


def prepare_base(source: BaseSource, precision: Precision) -> PreparedBase:
    """The folder to load for this source and precision, made first where it is not there yet.

    Raises:
        BaseError: the source can't be fetched or converted; nothing half-written is left in its place.
    """
    if source.kind == "default":
        return _prepare_default(precision)
    if source.kind == "gguf":
        assert source.path is not None
        gguf = source.path
        identity = BaseIdentity(id=gguf.stem, revision=None, digest=sha256_file(gguf))
        return _keep(identity, precision, lambda folder: _convert_gguf(gguf, folder, precision))
    if source.kind == "hub":
        dense, identity = _fetch_hub(source)
    else:
        assert source.path is not None
        dense, identity = source.path, identify_folder(source.path)
    return _prepare_folder(dense, identity, precision)


def locate_base(source: BaseSource) -> PreparedBase:
    """The folder of a base whose configuration is wanted and not its weights: any precision that is there will do.

    Raises:
        BaseError: as `prepare_base`.
    """
    if source.kind == "hub":
        return PreparedBase(*_fetch_hub(source))
    if source.kind == "folder":
        assert source.path is not None
        return PreparedBase(source.path, identify_folder(source.path))
    return prepare_base(source, "int4")  # the form in which compose will want it


def _prepare_default(precision: Precision) -> PreparedBase:
    def build(folder: Path) -> None:
        gguf = default.fetch_gguf(home.bases() / "downloads")
        _convert_gguf(gguf, folder, precision)

    return _keep(default.IDENTITY, precision, build)


def _prepare_folder(dense: Path, identity: BaseIdentity, precision: Precision) -> PreparedBase:
    """Dense precisions read the folder itself; a quantized one is made once, unless the folder is quantized already."""
    kept = _quantization_of(dense)
    if kept is not None and kept != precision:
        advice = f"Use --precision {kept}, or a dense copy of it" if kept in QUANTIZED else "Give a dense copy of it"
        raise BaseError(f"{dense.name} is already quantized to {kept}", next_step=advice)
    if kept is not None or precision not in QUANTIZED:
        return PreparedBase(dense, identity)
    return _keep(identity, precision, lambda folder: _quantize(dense, folder, precision))


def _quantization_of(folder: Path) -> str | None:
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise BaseError(f"{folder}/config.json is not JSON: {error}", next_step="Fetch the model again") from error
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    if not quantization:
        return None
    if quantization.get("load_in_4bit"):
        return "int4"
    return "int8" if quantization.get("load_in_8bit") else str(quantization.get("quant_method", "an unknown format"))


def _keep(identity: BaseIdentity, precision: Precision, build: Callable[[Path], None]) -> PreparedBase:
    """The kept folder; `build` fills an empty one beside it first where there is none. One builder at a time."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", identity.id).strip("-.") or "base"
    family = home.bases() / f"{name}-{identity.digest[:12]}"
    folder = family / precision
    if _is_whole(folder):
        return PreparedBase(folder, identity)
    family.mkdir(parents=True, exist_ok=True)
    with FileLock(family / f".{precision}.lock"):
        if not _is_whole(folder):
            _build(family, folder, identity, build)
    return PreparedBase(folder, identity)


def _build(family: Path, folder: Path, identity: BaseIdentity, build: Callable[[Path], None]) -> None:
    for leftover in family.glob(f".building-{folder.name}-*"):  # of a process that was killed: we hold the lock
        shutil.rmtree(leftover)
    scratch = Path(tempfile.mkdtemp(prefix=f".building-{folder.name}-", dir=family))
    try:
        ready = scratch / "ready"
        ready.mkdir()
        build(ready)
        _write_manifest(ready, identity)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(ready, folder)
    except (OSError, SafetensorError) as error:
        raise _explain(error, family) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _explain(error: Exception, family: Path) -> BaseError:
    """safetensors reports a full disk in words of its own."""
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return BaseError(f"there is no room on the disk under {family}", next_step="Free some space and try again")
    return BaseError(f"the base can't be kept under {family}: {first_line(error)}", next_step="Look at that folder")


def _write_manifest(folder: Path, identity: BaseIdentity) -> None:
    sizes = {}
    for file in sorted(folder.iterdir()):
        sizes[file.name] = file.stat().st_size
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    (folder / MANIFEST).write_text(json.dumps({"base": asdict(identity), "files": sizes}, indent=2))


def _is_whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / MANIFEST).read_text())["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _convert_gguf(gguf: Path, folder: Path, precision: Precision) -> None:
    silence_libraries()
    import torch

    dense_dtype = torch.float32 if precision in QUANTIZED else compute_dtype(precision)
    with step(f"converting {gguf.name}"):
        try:
            model = whole_model(gguf.parent, gguf_file=gguf.name, dtype=dense_dtype)
            tokenizer = whole_tokenizer(gguf.parent, gguf_file=gguf.name)
        except UNREADABLE as error:
            text = f"{gguf.name} can't be read as a GGUF model: {first_line(error)}"
            raise BaseError(text, next_step="Fetch it again, or give a folder") from error
        # It is dense by now; without this, transformers refuses to save what came out of a GGUF file.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        dense = folder if precision not in QUANTIZED else folder.parent / "dense"
        model.save_pretrained(dense)
        tokenizer.save_pretrained(dense)
    if precision in QUANTIZED:
        _quantize(dense, folder, precision)


def _quantize(dense: Path, folder: Path, precision: Precision) -> None:
    """Quantize at loading and save before any forward: bitsandbytes repacks 4-bit weights in place at the first one."""
    silence_libraries()
    with step(f"quantizing to {precision} (once; the result is kept)"):
        try:
            how = quantization_config(precision)
            model = whole_model(dense, quantization_config=how, dtype=compute_dtype(precision))
            tokenizer = whole_tokenizer(dense)
        except UNREADABLE as error:
            text = f"{dense} can't be loaded: {first_line(error)}"
            raise BaseError(text, next_step="Fetch the model again, or check that transformers can load it") from error
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _fetch_hub(source: BaseSource) -> tuple[Path, BaseIdentity]:
    """The repository's snapshot in the Hub's own cache; its progress bars and its tokens are the Hub client's."""
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    with hub.explained(source):
        folder = Path(snapshot_download(source.text, revision=source.revision, allow_patterns=wanted))
    if not (folder / "config.json").is_file():
        raise hub.no_model(source)
    revision = folder.name
    return folder, BaseIdentity(id=source.text, revision=revision, digest=identify_folder(folder).digest)
