"""Whether modules and their parameters are still what they were when somebody looked at them.

A step reads what it knows of hundreds of modules without asking them, and anybody may have replaced, hooked or moved
one of them since the last step. So all are asked before each: in loops of Python's own functions, which take some 50 ns
a module. A loop that is written out takes 2 us, and these were a tenth of a step of one row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from operator import is_, itemgetter, methodcaller
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_hooks, _pre_hooks, _parameters = map(itemgetter, ("_forward_hooks", "_forward_pre_hooks", "_parameters"))
_get: Any = dict.get  # of a module's own attributes, or of the modules that it keeps

dtype_of, is_on_cpu, shape_of = (
    getattr(Tensor, name).__get__ for name in ("dtype", "is_cpu", "shape")
)  # attributes as functions
_SEEN = Tensor.data_ptr, Tensor._version.__get__  # type: ignore[attr-defined]
_READ = Tensor.data_ptr, Tensor.numel, Tensor.is_contiguous, dtype_of


class Place(NamedTuple):
    """Where a model keeps a module: a dictionary, the name there, and what stood there; None for nothing."""

    owner: dict[str, Any]
    name: str
    module: Any


def place_in(owner: Any, name: str) -> Place:
    """Where the module `owner` keeps its module `name`."""
    return Place(owner._modules, name, owner._modules.get(name))


def stand(places: Sequence[Place]) -> bool:
    """Whether each module is still in its place."""
    owners, names, modules = zip(*places, strict=True)
    return all(map(is_, map(_get, owners, names), modules))


def have_hooks(modules: Sequence[nn.Module]) -> bool:
    """Whether one of them is to tell somebody of its passes."""
    return any(map(any, zip(map(_hooks, map(vars, modules)), map(_pre_hooks, map(vars, modules)), strict=True)))


def own(modules: Iterable[Any], name: str) -> list[Any]:
    """The attribute of each that was set on itself and not on its class; None for none."""
    return list(map(_get, map(vars, modules), repeat(name)))


class Parameters:
    """The parameters of one name of modules, of which some may have none: which they are, and where they lie."""

    def __init__(self, modules: Sequence[nn.Module], name: str, *, copied: bool = False) -> None:
        """To be made before anything is read of them, which may be changed meanwhile.

        Args:
            copied: whether others are multiplied in their stead, so that numbers that are changed in place make a
                difference, and what shape they have does not. torch does not count the changes of what was made in
                inference mode.
        """
        self._modules, self._name = modules, name
        self._asked = _SEEN if copied else _READ
        self._found = self._now()
        self._facts = self._looked_at()

    def stand(self) -> bool:
        """Whether all are the same, in the same memory."""
        return all(map(is_, self._now(), self._found)) and self._looked_at() == self._facts

    def _now(self) -> list[Any]:
        return list(map(_get, map(_parameters, map(vars, self._modules)), repeat(self._name)))

    def _looked_at(self) -> list[list[Any]]:
        there = [one for one in self._found if one is not None]
        # Past bitsandbytes' weights, which answer through Python: 5 us a question.
        with torch._C.DisableTorchFunctionSubclass():
            return [list(map(ask, there)) for ask in self._asked]


def steps_of(tensors: Iterable[Tensor], axis: int) -> set[int]:
    """How many numbers lie between two places of an axis, in any of the tensors."""
    return set(map(methodcaller("stride", axis), tensors))
