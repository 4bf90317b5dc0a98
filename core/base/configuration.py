"""A base folder's config.json and its weight files, looked at before anything is built from them.

What a configuration asks for is built layer by layer, so a million layers or a word for a number cost minutes or a
traceback: numbers are held against bounds first, and against the size of the weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_rt.core.base.choices import QUANTIZED, described
from lora_rt.core.base.source import BaseError, BaseSource, parse_base
from lora_rt.registry.files import POINTER

CONFIG = "config.json"
_MAX_CONFIG_BYTES = 16 << 20
_POINTERS = 1024  # bytes: those of Git LFS have fewer
_BOUNDS = {
    "num_hidden_layers": 2_000, "n_layer": 2_000, "n_layers": 2_000, "num_layers": 2_000,
    "hidden_size": 1 << 20, "n_embd": 1 << 20, "intermediate_size": 1 << 24, "vocab_size": 1 << 24,
    "num_attention_heads": 1 << 16, "num_key_value_heads": 1 << 16, "n_head": 1 << 16, "head_dim": 1 << 16,
    "max_position_embeddings": 1 << 31, "num_experts": 1 << 16, "num_local_experts": 1 << 16,
}  # fmt: skip
"""What a count may be at most: several times that of any model there is."""
_MAY_BE_ZERO = ("num_experts", "num_local_experts", "intermediate_size", "max_position_embeddings")


def read_configuration(folder: Path) -> dict[str, Any]:
    """The document in config.json, whose counts are counts.

    Raises:
        BaseError: it is not JSON, or says what no model can be built from.
    """
    try:
        with (folder / CONFIG).open("rb") as file:
            content = file.read(_MAX_CONFIG_BYTES + 1)
        if len(content) > _MAX_CONFIG_BYTES:
            raise ValueError(f"it has more than {_MAX_CONFIG_BYTES:,} bytes")
        document = json.loads(content)
    except RecursionError as error:
        raise _unusable(folder, "is nested too deep") from error
    except (ValueError, OSError) as error:
        raise _unusable(folder, f"is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise _unusable(folder, "is not a JSON object")
    if problems := list(_problems(document)):
        raise BaseError(
            f"{folder}/{CONFIG} does not describe a model", problems=problems, next_step="Fetch the model again"
        )
    return document


def quantization_of(folder: Path) -> str | None:
    """The precision that a folder was saved in, or in words what others have quantized it to; None where it is dense.

    Raises:
        BaseError: as `read_configuration`.
    """
    quantization = read_configuration(folder).get("quantization_config")
    return described(quantization) if quantization else None


def check_base(base: str, precision: str) -> BaseSource:
    """Where a base comes from, once all is said that can be wrong with it and is known without reading its weights.

    Raises:
        UsageError, BaseError: it is not a base, or one that can't be loaded so.
    """
    source = parse_base(base)
    if source.kind == "folder":
        assert source.path is not None
        check_folder(source.path, precision)
    return source


def check_folder(folder: Path, precision: str) -> str | None:
    """`quantization_of` a folder whose weights are there, and can be had in that precision.

    Raises:
        BaseError: they are not, or can't.
    """
    check_weights(folder)
    kept = quantization_of(folder)
    if kept in QUANTIZED and kept != precision:
        advice = f"Use --precision {kept}, or a dense copy of it"
        raise BaseError(f"{folder.name} is already quantized to {kept}", next_step=advice)
    return kept


def check_weights(folder: Path) -> None:
    """Raises BaseError where a folder has no weights that are read, or lacks some of them."""
    read_configuration(folder)
    _check_fetched(folder)
    files = weight_files(folder)
    if not files:
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".pkl"))
        if pickles:
            text = f"{folder} holds its weights as a pickle ({pickles[0]}), which can run code and is never opened"
            raise BaseError(text, next_step="Save the model as safetensors, or fetch a copy that is")
        raise BaseError(f"{folder} holds no weights (no .safetensors file)", next_step="Fetch the model again")
    if lost := [file.name for file in files if not file.is_file()]:
        raise BaseError(f"weight files of {folder} are missing", problems=lost, next_step="Fetch the model again")


def _check_fetched(folder: Path) -> None:
    """Raises BaseError where Git, which had no LFS, has left pointers in the place of files."""
    if pointers := [file.name for file in sorted(folder.iterdir()) if file.is_file() and _is_pointer(file)]:
        text = f"{folder} was fetched without Git LFS, and has pointers in the place of files"
        raise BaseError(text, problems=pointers, next_step="Run in that folder: git lfs pull")


def _is_pointer(file: Path) -> bool:
    if file.stat().st_size > _POINTERS:
        return False
    with file.open("rb") as opened:
        return opened.read(len(POINTER)) == POINTER


def check_size(folder: Path, config: Any) -> None:
    """Raises BaseError where transformers' configuration asks for far more than the weights hold: it would be made up.

    Sizes that config.json leaves out are those of the architecture's largest model.
    """
    text = config.get_text_config()
    layers, hidden, words = (getattr(text, key, None) for key in ("num_hidden_layers", "hidden_size", "vocab_size"))
    there = sum(file.stat().st_size for file in weight_files(folder))
    if not (isinstance(layers, int) and isinstance(hidden, int) and isinstance(words, int)):
        return
    least = (words * hidden + layers * hidden * hidden) // 4  # bytes: a quarter of one for each weight
    if least > there:
        raise BaseError(
            f"{folder}/{CONFIG} asks for far more weights than there are",
            problems=[f"{layers:,} layers of {hidden:,} and {words:,} words in {there:,} bytes"],
            next_step="Fetch the model again",
        )


def weight_files(folder: Path) -> list[Path]:
    """The files that a folder's weights are read from: its own, not those of an adapter that lies beside them."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            names = set(json.loads(index.read_bytes())["weight_map"].values())
            if all(isinstance(name, str) and name == Path(name).name for name in names):
                return sorted(folder / name for name in names)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        raise BaseError(f"{index} is not an index of weights", next_step="Fetch the model again")
    return sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("adapter_"))


def _problems(document: Mapping[str, Any]) -> Iterator[str]:
    quantization = document.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        yield f"quantization_config is {_shown(quantization)}, not an object"
    parts = [("", document)]
    if (text := document.get("text_config")) is not None:
        if isinstance(text, dict):
            parts.append(("text_config.", text))
        else:
            yield f"text_config is {_shown(text)}, not an object"
    for prefix, part in parts:
        for key, most in _BOUNDS.items():
            value = part.get(key)
            several = value if isinstance(value, list) else [value]
            for one in several:
                if one is None:
                    continue
                if not isinstance(one, int) or isinstance(one, bool):
                    yield f"{prefix}{key} is {_shown(value)}, not a whole number"
                elif not (least := 0 if key in _MAY_BE_ZERO else 1) <= one <= most:
                    yield f"{prefix}{key} is {_shown(value)}, and can be at most {most:,} and not less than {least}"
                else:
                    continue
                break


def _shown(value: object) -> str:
    plain = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**30
    text = f"{value:,}" if plain else repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


def _unusable(folder: Path, what: str) -> BaseError:
    return BaseError(f"{folder}/{CONFIG} {what}", next_step="Fetch the model again")
