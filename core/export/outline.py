"""What an export needs to know of the base: its shapes and its configuration. No weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lora_rt.core.base.load import base_facts
from lora_rt.core.base.prepare import locate_base
from lora_rt.core.base.reading import UNREADABLE, first_line
from lora_rt.core.base.silence import silence_libraries
from lora_rt.core.base.source import BaseError, BaseSource, parse_base
from lora_rt.core.engine.topology import features, find_linears
from lora_rt.plugins.contract import BaseFacts
from lora_rt.registry.card import BaseIdentity


@dataclass(frozen=True, slots=True)
class Outline:
    """A base without its weights.

    `linears` are its linear layers, path to (out_features, in_features); `transposed` those whose weight is kept as
    (in, out); `parameters` counts its weights.
    """

    source: BaseSource
    identity: BaseIdentity
    facts: BaseFacts
    config: Any
    linears: dict[str, tuple[int, int]]
    transposed: frozenset[str]
    parameters: int


def outline(text: str) -> Outline:
    """The outline of what `--base` means.

    Raises:
        BaseError: it can't be found, or is no model that transformers knows.
    """
    silence_libraries()
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    source = parse_base(text)
    located = locate_base(source)
    try:
        config = AutoConfig.from_pretrained(located.folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except UNREADABLE as error:
        text = f"{located.folder} can't be understood: {first_line(error)}"
        raise BaseError(text, next_step="Fetch the model again, or check that transformers can load it") from error
    linears = find_linears(model)
    return Outline(
        source=source,
        identity=located.identity,
        facts=base_facts(config, located.identity, "float32"),
        config=config,
        linears={name: features(module) for name, module in linears.items()},
        transposed=frozenset(name for name, module in linears.items() if isinstance(module, Conv1D)),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
