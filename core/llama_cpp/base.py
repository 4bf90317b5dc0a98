"""The GGUF file of a base, used as it is, and what is kept beside it so that it speaks without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lora_rt.core.base import default
from lora_rt.core.base.bounded import hold_to_limits
from lora_rt.core.base.identity import identify, sha256_of
from lora_rt.core.base.prepare import keep, prepare_base
from lora_rt.core.base.progress import step
from lora_rt.core.base.silence import libraries_silenced
from lora_rt.core.base.source import BaseError, BaseSource, parse_base
from lora_rt.core.generation.prompts import TextFormat
from lora_rt.core.llama_cpp.words import FILE, Words, facts_of, same_words
from lora_rt.plugins.contract import BaseFacts
from lora_rt.registry.card import BaseIdentity

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
        folder = keep(identity, _KEPT, partial(_write, text, gguf, gguf)).folder
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
    from lora_rt.core.llama_cpp.convert import KINDS, write_gguf_base

    dense = prepare_base(source, "float32")
    if dense.foreign is not None:
        text = f"{source.text} is quantized by others ({dense.foreign}), and llama.cpp can't read that"
        raise BaseError(text, next_step="Give --base a .gguf file of this model, or use --engine torch")

    def build(folder: Path) -> None:
        write_gguf_base(folder / _GGUF, dense.folder, precision)
        _write(source.text, dense.folder, folder / _GGUF, folder)

    return dense.identity, keep(dense.identity, f"{_KEPT}-{KINDS[precision]}", build).folder / _GGUF


def _write(text: str, words: Path, gguf: Path, folder: Path) -> None:
    """Fill a folder with the base's tokenizer and facts; the one time that torch and transformers are needed.

    Args:
        text: of the base.
        words: the file or folder that its tokenizer is read from.
        gguf: the base's file.
        folder: to fill.
    """
    from lora_rt.core.base.reading import whole_tokenizer
    from lora_rt.core.export.outline import outline

    with libraries_silenced(gguf=True), step(f"reading the words of {words.name} (once; they are kept)"):
        base = outline(text)
        inside = {"gguf_file": words.name} if words.is_file() else {}
        tokenizer = whole_tokenizer(words.parent if inside else words, **inside)
        tokenizer.save_pretrained(folder)
    hold_to_limits(folder)
    config = base.config.get_text_config()
    ends = config.eos_token_id
    document = {
        "facts": asdict(base.facts) | {"precision": _quantization(gguf)},
        "context": int(config.max_position_embeddings),
        "ends": ends if isinstance(ends, list) else [ends] if ends is not None else [],
        "words": _words(folder, tokenizer),
    }
    (folder / _FACTS).write_text(json.dumps(document, indent=2), encoding="utf-8")


def _words(folder: Path, tokenizer: Any) -> dict[str, Any] | None:
    """What `Words` needs besides the folder, None where the tokenizer's own class is needed."""
    facts = facts_of(tokenizer)
    return facts if (folder / FILE).is_file() and same_words(tokenizer, Words(folder, facts)) else None


def _tokenizer(folder: Path, words: dict[str, Any] | None) -> Any:
    """The kept tokenizer."""
    if words is not None:
        return Words(folder, words)
    from lora_rt.core.base.reading import whole_tokenizer

    return whole_tokenizer(folder)


def _quantization(gguf: Path) -> str:
    """How most of a file's weights are kept, as it says itself."""
    from gguf import GGUFReader, LlamaFileType

    field = GGUFReader(gguf).fields.get("general.file_type")
    return "GGUF" if field is None else LlamaFileType(int(field.contents())).name.removeprefix("MOSTLY_")
