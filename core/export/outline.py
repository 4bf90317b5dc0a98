"""What an export needs to know of the base: its shapes and its configuration. No weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lora_rt.core.base.identity import identify, identify_base
from lora_rt.core.base.load import base_facts
from lora_rt.core.base.reading import auto_class, config_alone, readable
from lora_rt.core.base.roles import ROLES, anywhere, roles_of
from lora_rt.core.base.source import BaseSource, parse_base
from lora_rt.core.engine.topology import embeddings_of, features, find_linears, shapes_of
from lora_rt.plugins.contract import BaseFacts
from lora_rt.registry.card import BaseIdentity


@dataclass(frozen=True, slots=True)
class Outline:
    """A base without its weights.

    `linears` are its linear layers, path to (out_features, in_features); `transposed` those whose weight is kept as
    (in, out); `parameters` counts its weights. `shapes` are those of all layers that an adapter can act on, fused
    experts too, and `embeddings` those of what looks up tokens or positions.
    """

    source: BaseSource
    identity: BaseIdentity
    facts: BaseFacts
    config: Any
    linears: dict[str, tuple[int, int]]
    shapes: dict[str, tuple[int, ...]]
    embeddings: dict[str, tuple[int, ...]]
    transposed: frozenset[str]
    parameters: int

    def document(self) -> list[dict[str, Any]]:
        """Role -> layers -> shape, as `lora-rt show --base` has it. A layer that serves several roles is in each."""
        rows: dict[tuple[str, str, tuple[int, ...]], list[str]] = {}
        for name, shape in self.shapes.items():
            for role in roles_of(name) or ("",):
                rows.setdefault((role, anywhere(name), shape), []).append(name)
        order = {role: number for number, role in enumerate((*ROLES, ""))}
        found = sorted(rows.items(), key=lambda item: order[item[0][0]])
        return [{"role": role or None, "modules": names, "shape": list(shape)} for (role, _, shape), names in found]


def outline(text: str, *, quick: bool = False) -> Outline:
    """The outline of what `--base` means; `quick` leaves large weights that were never hashed before unread.

    Raises:
        BaseError: it can't be found, or is no model that transformers knows.
    """
    from transformers.pytorch_utils import Conv1D

    source = parse_base(text)
    config = config_alone(source)
    identity = identify_base(text) if quick else identify(source)
    with readable(f"{source.text} can't be understood"), torch.device("meta"):
        model = auto_class(config).from_config(config, trust_remote_code=False)
    linears = find_linears(model)
    return Outline(
        source=source,
        identity=identity,
        facts=base_facts(model, identity, "float32"),
        config=config,
        linears={name: features(module) for name, module in linears.items()},
        shapes=shapes_of(model),
        embeddings=embeddings_of(model),
        transposed=frozenset(name for name, module in linears.items() if isinstance(module, Conv1D)),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
