"""The configuration of a base, read without fetching or loading its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_rt.core.base.identity import label_of
from lora_rt.core.base.reading import config_alone
from lora_rt.core.base.source import parse_base


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
    return BaseConfig(label_of(source), config_alone(source))
