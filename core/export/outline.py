"""What an export needs to know of the base: its shapes and its configuration. No weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lora_rt.core.base.identity import identify, identify_base
from lora_rt.core.base.load import base_facts
from lora_rt.core.base.reading import UNREADABLE, auto_class, config_alone
from lora_rt.core.base.source import BaseError, BaseSource, first_line, parse_base
from lora_rt.core.engine.topology import features, find_linears, shapes_of
from lora_rt.plugins.contract import BaseFacts
from lora_rt.registry.card import BaseIdentity


@dataclass(frozen=True, slots=True)
class Outline:
    """A base without its weights.

    `linears` are its linear layers, path to (out_features, in_features); `transposed` those whose weight is kept as
    (in, out); `parameters` counts its weights. `shapes` are those of all that an adapter can act on, fused experts too.
    """

    source: BaseSource
    identity: BaseIdentity
    facts: BaseFacts
    config: Any
    linears: dict[str, tuple[int, int]]
    shapes: dict[str, tuple[int, ...]]
    transposed: frozenset[str]
    parameters: int


def outline(text: str, *, quick: bool = False) -> Outline:
    """The outline of what `--base` means; `quick` leaves large weights that were never hashed before unread.

    Raises:
        BaseError: it can't be found, or is no model that transformers knows.
    """
    from transformers.pytorch_utils import Conv1D

    source = parse_base(text)
    config = config_alone(source)
    identity = identify_base(text) if quick else identify(source)
    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(config, trust_remote_code=False)
    except UNREADABLE as error:
        text = f"{source.text} can't be understood: {first_line(error)}"
        raise BaseError(text, next_step="Fetch the model again, or check that transformers can load it") from error
    linears = find_linears(model)
    return Outline(
        source=source,
        identity=identity,
        facts=base_facts(model, identity, "float32"),
        config=config,
        linears={name: features(module) for name, module in linears.items()},
        shapes=shapes_of(model),
        transposed=frozenset(name for name, module in linears.items() if isinstance(module, Conv1D)),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
