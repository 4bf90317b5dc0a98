"""Turns a base source into a folder that loads with a plain read: converted from GGUF and quantized once, then kept.

    home/bases/<name>-<digest>/<precision>/     an ordinary transformers folder + lora-rt-base.json, written last

A folder without that file, or whose files have other sizes than it says, is not used and is made again.
"""

from __future__ import annotations

import errno
import gc
import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError

from lora_rt.core.base import default
from lora_rt.core.base.choices import QUANTIZED, Precision
from lora_rt.core.base.configuration import check_folder, weight_files
from lora_rt.core.base.identity import MANIFEST, identify, identify_folder, manifest_of
from lora_rt.core.base.progress import step
from lora_rt.core.base.silence import libraries_silenced
from lora_rt.core.base.source import BaseError, BaseSource, first_line, sha256_file
from lora_rt.registry import durable, home
from lora_rt.registry.card import BaseIdentity

_LOGGER = logging.getLogger("lora_rt.base")


@dataclass(frozen=True, slots=True)
class PreparedBase:
    """A folder that transformers loads as it is, and which base it holds.

    `foreign` is how others have quantized it, in words; None where it is in a precision of ours. `dense` is the folder
    that a quantized one was made of, where that is still there.
    """

    folder: Path
    identity: BaseIdentity
    foreign: str | None = None
    dense: Path | None = None


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
        return keep(identify(source), precision, lambda folder: _convert_gguf(gguf, folder, precision))
    if source.kind == "hub":
        return _prepare_folder(_fetch_hub(source), precision, source.text)
    assert source.path is not None
    return _prepare_folder(source.path, precision)


def _prepare_default(precision: Precision) -> PreparedBase:
    def build(folder: Path) -> None:
        gguf = default.fetch_gguf(home.bases() / "downloads")
        _convert_gguf(gguf, folder, precision)

    return keep(default.IDENTITY, precision, build)


def _prepare_folder(dense: Path, precision: Precision, hub_id: str | None = None) -> PreparedBase:
    """Dense precisions read the folder itself; a quantized one is made once, unless the folder is quantized already.

    What others have quantized is loaded as it is, whatever precision is wanted.
    """
    kept = check_folder(dense, precision)
    _mention_adapter(dense)
    identity = identify_folder(dense)
    if hub_id is not None:
        identity = BaseIdentity(hub_id, dense.name, identity.digest)
    if kept is not None or precision not in QUANTIZED:
        return PreparedBase(dense, identity, kept if kept not in (None, *QUANTIZED) else None)
    kept_folder = keep(identity, precision, lambda folder: _quantize(dense, folder, precision))
    return replace(kept_folder, dense=dense)


def keep(identity: BaseIdentity, form: str, build: Callable[[Path], None]) -> PreparedBase:
    """The kept folder of a form of the base, as a precision is one; where there is none, `build` fills an empty one.

    One builder at a time.
    """
    name = re.sub(r"[^A-Za-z0-9.]+", "-", identity.id).strip("-.") or "base"
    family = home.bases() / f"{name}-{identity.digest[:12]}"
    folder = family / form
    if _is_whole(folder, identity):
        return PreparedBase(folder, identity)
    family.mkdir(parents=True, exist_ok=True)
    with FileLock(family / f".{form}.lock"):
        if not _is_whole(folder, identity):
            _build(folder, identity, build)
    return PreparedBase(folder, identity)


def _build(folder: Path, identity: BaseIdentity, build: Callable[[Path], None]) -> None:
    try:
        with durable.replaced_folder(folder) as scratch:
            build(scratch)
            _write_manifest(scratch, identity)
    except (OSError, SafetensorError) as error:
        raise _explain(error, folder.parent) from error


def _explain(error: Exception, family: Path) -> BaseError:
    """safetensors reports a full disk in words of its own."""
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return BaseError(f"there is no room on the disk under {family}", next_step="Free some space and try again")
    return BaseError(
        f"the base can't be kept under {family}: {first_line(error)}",
        next_step="Check that folder: whether you may write there, and whether its disk is full",
    )


def _write_manifest(folder: Path, identity: BaseIdentity) -> None:
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    weights = {file.name: sha256_file(file) for file in weight_files(folder)}
    document = {"base": asdict(identity), "files": sizes, "weights": weights}
    durable.write_text(folder / MANIFEST, json.dumps(document, indent=2))


def _is_whole(folder: Path, identity: BaseIdentity) -> bool:
    kept = manifest_of(folder)
    return kept is not None and kept.digest == identity.digest


def _convert_gguf(gguf: Path, folder: Path, precision: Precision) -> None:
    with libraries_silenced(gguf=True), step(f"converting {gguf.name}"):
        told, first = f"{gguf.name} can't be read as a GGUF model", "float32" if precision in QUANTIZED else precision
        model, tokenizer = _read(gguf.parent, first, told, gguf_file=gguf.name)
        # It is dense by now; without this, transformers refuses to save what came out of a GGUF file.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        dense = folder if precision not in QUANTIZED else folder / "dense"
        _save(model, tokenizer, dense)
    if precision in QUANTIZED:
        _quantize(dense, folder, precision)
        shutil.rmtree(dense)


def _quantize(dense: Path, folder: Path, precision: Precision) -> None:
    """Quantize at loading and save before any forward: bitsandbytes repacks 4-bit weights in place at the first one."""
    with libraries_silenced(), step(f"quantizing to {precision} (once; the result is kept)"):
        model, tokenizer = _read(dense, precision, f"{dense} can't be loaded")
        _save(model, tokenizer, folder)
        del model
        gc.collect()  # a quantized layer and its weight hold each other: until then both lie where it was quantized


def _read(where: Path, precision: Precision, told: str, **file: Any) -> tuple[Any, Any]:
    """Model and tokenizer; what is kept already is found without torch, which takes seconds to import."""
    from lora_rt.core.base.reading import model_and_tokenizer

    return model_and_tokenizer(where, precision, told, **file)


def _fetch_hub(source: BaseSource) -> Path:
    """The repository's snapshot in the Hub's own cache."""
    from lora_rt.core.base.hub import fetch  # it brings the Hub's client

    return fetch(source)


@lru_cache
def _mention_adapter(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        _LOGGER.warning(
            "%s holds a model and an adapter: the model alone is loaded. The adapter is used with: "
            "lora-rt compose %s --base %s",
            *(folder, folder, folder),
        )


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Keep a model, and make sure that it is the whole model which was kept."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tensors = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    kept = sum(file.stat().st_size for file in weight_files(folder))
    if kept < sum(tensors.values()):
        text = f"transformers kept {kept:,} bytes of a model of {sum(tensors.values()):,}"
        raise BaseError(text, next_step="Give another base, or report it")
