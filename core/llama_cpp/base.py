"""The GGUF file of a base, used as it is, and what is kept beside it so that it speaks without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lora_rt.core.base import default
from lora_rt.core.base.identity import identify, sha256_of
from lora_rt.core.base.prepare import keep, prepare_base
from lora_rt.core.base.source import BaseError, BaseSource, parse_base
from lora_rt.core.generation.prompts import TextFormat
from lora_rt.core.llama_cpp.words import Words
from lora_rt.plugins.contract import BaseFacts
from lora_rt.registry.card import BaseIdentity

KINDS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "Q8_0", "int4": "Q4_1"}
"""How a precision of ours is written, by llama.cpp's names."""
_KEPT = "llama.cpp"
_GGUF = "base.gguf"
_FACTS = "llama_cpp.json"


@dataclass(frozen=True, slots=True)
class GgufBase:
    """A base for llama.cpp.

    Args:
        gguf: the file.
        folder: what is kept of it: tokenizer and facts.
        identity, facts: which base it is; `facts.precision` is the quantization of the file, as "Q4_1".
        context: how many tokens it can hold.
        text: how it reads and writes text.
    """

    gguf: Path
    folder: Path
    identity: BaseIdentity
    facts: BaseFacts
    context: int
    text: TextFormat


def open_base(
    text: str, precision: str, variables: Mapping[str, Any] | None = None, *, special_tokens: bool = False
) -> GgufBase:
    """The base that `--base` means, its words and facts kept for the next time.

    Args:
        text: a GGUF file is used as it is, a dense base converted once.
        precision: that a dense base is converted to (see `lora_rt.core.llama_cpp.convert`).
        variables, special_tokens: as for `TextFormat`.

    Raises:
        BaseError: there is no such base, or it can't be converted.
        PromptError: its chat template has no such variables.
    """
    source = parse_base(text)
    gguf, identity, folder = _file(source), None, None
    if gguf is None:
        identity, gguf = _converted(source, precision)
        folder = gguf.parent
    else:
        identity = identify(source)
        folder = keep(identity, _KEPT, partial(_make, text, gguf, None)).folder
    document = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    facts = BaseFacts(**document["facts"])
    words = TextFormat(
        _tokenizer(folder, document["words"]),
        vocabulary=facts.vocab_size,
        configured_ends=document["ends"],
        variables=variables,
        special_tokens=special_tokens,
    )
    return GgufBase(gguf, folder, identity, facts, document["context"], words)


def _file(source: BaseSource) -> Path | None:
    """The GGUF file that a base is; None where it is none."""
    if source.kind == "gguf":
        assert source.path is not None
        return source.path
    if source.kind == "default":
        found = default.downloaded()
        whole = found.is_file() and sha256_of(found) == default.GGUF_SHA256
        return found if whole else default.fetch_gguf(found.parent)
    return None


def _converted(source: BaseSource, precision: str) -> tuple[BaseIdentity, Path]:
    """Which base it is, and its GGUF file in this precision."""
    dense = prepare_base(source, "float32")
    if dense.foreign is not None:
        text = f"{source.text} is quantized by others ({dense.foreign}), and llama.cpp can't read that"
        raise BaseError(text, next_step="Give --base a .gguf file of this model, or use --engine torch")
    kind = KINDS[precision]
    build = partial(_make, source.text, dense.folder, kind)
    return dense.identity, keep(dense.identity, f"{_KEPT}-{kind}", build).folder / _GGUF


def _make(text: str, words: Path, kind: str | None, folder: Path) -> None:
    """Fill a folder with what is kept of a base; the one time that torch and transformers are needed.

    Args:
        text: of the base.
        words: its GGUF file, or the folder of a dense one.
        kind: that a dense one is written as; None for a GGUF file.
        folder: to fill.
    """
    from lora_rt.core.llama_cpp.convert import write_facts, write_gguf_base

    if kind is not None:
        write_gguf_base(folder / _GGUF, words, kind)
    write_facts(folder / _FACTS, text, words, words if kind is None else folder / _GGUF)


def _tokenizer(folder: Path, words: dict[str, Any] | None) -> Any:
    """The kept tokenizer."""
    if words is not None:
        return Words(folder, words)
    from lora_rt.core.base.reading import whole_tokenizer

    return whole_tokenizer(folder)
