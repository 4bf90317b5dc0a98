"""The GGUF file of a base, used as it is, and what is kept beside it so that it speaks without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lora_rt.core.base import default
from lora_rt.core.base.identity import identify, sha256_of
from lora_rt.core.base.prepare import keep
from lora_rt.core.base.progress import step
from lora_rt.core.base.source import BaseError, BaseSource, parse_base
from lora_rt.core.generation.prompts import TextFormat
from lora_rt.core.llama_cpp.words import FILE, Words, facts_of, same_words
from lora_rt.plugins.contract import BaseFacts
from lora_rt.registry import home
from lora_rt.registry.card import BaseIdentity

_KEPT = "llama.cpp"
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


def open_base(text: str, variables: Mapping[str, Any] | None = None, *, special_tokens: bool = False) -> GgufBase:
    """The base that `--base` means, its words and facts kept for the next time.

    Raises:
        BaseError: there is no such base, or it is no GGUF file.
        PromptError: its chat template has no such variables.
    """
    source = parse_base(text)
    gguf = _file(source)
    identity = identify(source)
    folder = keep(identity, _KEPT, partial(_write, text, gguf)).folder
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


def _file(source: BaseSource) -> Path:
    if source.kind == "gguf":
        assert source.path is not None
        return source.path
    if source.kind == "default":
        found = home.bases() / "downloads" / Path(default.MEMBER).name
        whole = found.is_file() and sha256_of(found) == default.GGUF_SHA256
        return found if whole else default.fetch_gguf(found.parent)
    text = f"llama.cpp reads GGUF files, and {source.text} is none"
    raise BaseError(text, next_step="Give --base a .gguf file of this model, or use --engine torch")


def _write(text: str, gguf: Path, folder: Path) -> None:
    """Fill a folder with the base's tokenizer and facts; the one time that torch and transformers are needed."""
    from lora_rt.core.base.bounded import hold_to_limits
    from lora_rt.core.base.reading import whole_tokenizer
    from lora_rt.core.base.silence import libraries_silenced
    from lora_rt.core.export.outline import outline

    with libraries_silenced(gguf=True), step(f"reading the words of {gguf.name} (once; they are kept)"):
        base = outline(text)
        tokenizer = whole_tokenizer(gguf.parent, gguf_file=gguf.name)
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
