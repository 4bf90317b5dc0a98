"""The configuration of a base, read without fetching or loading its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_rt.core.base import default, hub
from lora_rt.core.base.reading import UNREADABLE, first_line
from lora_rt.core.base.silence import silence_libraries
from lora_rt.core.base.source import BaseError, BaseSource, parse_base
from lora_rt.errors import LoraRtError

DEFAULT: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""What the default base's GGUF file says of its shape, so that planning it fetches nothing."""


class PlanError(LoraRtError):
    """Memory that can't be told in advance."""


@dataclass(frozen=True, slots=True)
class BaseConfig:
    """A base's name and transformers' configuration of it."""

    name: str
    config: Any

    @property
    def text(self) -> Any:
        """The part of the configuration that describes the language model."""
        return self.config.get_text_config()


def read_config(base: str) -> BaseConfig:
    """The configuration of "default", a folder, a GGUF file (its header), or a hub id (config.json alone).

    Raises:
        BaseError: there is none, it can't be fetched, or transformers can't read it.
    """
    source = parse_base(base)
    silence_libraries()
    try:
        name, config = _read(source)
    except BaseError:
        raise
    except UNREADABLE as error:
        text = f"the configuration of {base} can't be read: {first_line(error)}"
        raise BaseError(text, next_step="Give a causal language model that transformers knows") from error
    return BaseConfig(name, config)


def _read(source: BaseSource) -> tuple[str, Any]:
    from transformers import AutoConfig, LlamaConfig

    if source.kind == "default":
        return default.IDENTITY.id, LlamaConfig(**DEFAULT)
    if source.kind == "hub":
        return source.text, AutoConfig.from_pretrained(_fetch(source), trust_remote_code=False)
    assert source.path is not None
    if source.kind == "gguf":
        return source.path.stem, AutoConfig.from_pretrained(source.path.parent, gguf_file=source.path.name)
    return source.path.name, AutoConfig.from_pretrained(source.path, trust_remote_code=False)


def _fetch(source: BaseSource) -> Path:
    """The folder of the Hub's cache that holds the repository's config.json."""
    from huggingface_hub import hf_hub_download

    with hub.explained(source):
        return Path(hf_hub_download(source.text, "config.json", revision=source.revision)).parent
