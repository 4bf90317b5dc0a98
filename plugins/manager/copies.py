"""What hooks get to see is theirs: a gate that writes into its context must not change other rows and requests.

torch has no read-only tensors, so the small ones are copied; a tensor of the state is when it is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from lora_rt.plugins.contract import GateContext

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class Copies(Mapping[str, "Tensor"]):
    """A mapping that gives a copy of a tensor at each look."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].clone()

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def private(context: T) -> T:
    """A context (or a term of one) whose card, state and tensors a hook may write to, or can't."""
    given: Any = context
    own: dict[str, Any] = {"card": MappingProxyType(dict(given.card)), "state": Copies(given.state)}
    if isinstance(context, GateContext):
        own |= {name: getattr(context, name).clone() for name in ("input_ids", "positions", "prompt_lengths")}
        own["hidden"] = lambda: context.hidden().clone()
        own["history"] = lambda: tuple(tensor.clone() for tensor in context.history())
    changed: T = replace(given, **own)
    return changed
