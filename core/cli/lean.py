"""Imports torch, transformers and bitsandbytes without their compilers and without what spreads a model over processes.

Of the time to a first token a third goes into imports that no command needs which speaks: `torch._dynamo` and what it
stands on (transformers marks functions for it), inductor (bitsandbytes hands functions to `torch.compile`), and
`torch.distributed.tensor` (transformers asks whether a tensor is one). This is for a process of our own: an application
that embeds a runtime imports whatever it likes.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

process_is_ours = False
"""Set by the entry point of `lora-rt`, and by nobody who calls the command line as a function."""

_DYNAMO = "torch._dynamo"
_MASKS = f"{_DYNAMO}._trace_wrapped_higher_order_op"  # of which transformers takes a class for masks under vmap


def import_lean() -> None:
    """Import the libraries. In a process that is not ours, or where they are imported already, nothing is done.

    Afterwards transformers holds that torch can't distribute in this process, and torch's compiler is imported when
    somebody first asks for something of it.
    """
    if not process_is_ours or "transformers" in sys.modules or _DYNAMO in sys.modules:
        return
    import torch

    sys.modules[_DYNAMO], sys.modules[_MASKS] = _Later(_DYNAMO), _Later(_MASKS)
    _without_processes(torch.distributed)
    without_compiling(torch)


class _Later(ModuleType):
    """Stands for a module of torch's compiler. Only marks for the compiler are taken; for all else it is imported."""

    def __getattr__(self, name: str) -> Any:
        if self.__name__ == _DYNAMO and name in _MARKS:
            return _MARKS[name]
        if self.__name__ == _MASKS and name == "TransformGetItemToIndex":
            return lambda: getattr(self._itself(), name)()
        # Submodules are found by the path of the module.
        if name.startswith("__") and not (self.__name__ == _DYNAMO and name == "__path__"):
            raise AttributeError(name)
        return getattr(self._itself(), name)

    def _itself(self) -> ModuleType:
        for name in (_DYNAMO, _MASKS):
            if isinstance(sys.modules.get(name), _Later):
                del sys.modules[name]
        return importlib.import_module(self.__name__)


def _not_compiled(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """The function as it is: what a mark makes of it where nothing is compiled."""
    return _not_compiled if function is None else function


_MARKS = dict.fromkeys(("disable", "assume_constant_result", "allow_in_graph"), _not_compiled)


def _without_processes(distributed: Any) -> None:
    """Let transformers find that torch can't distribute, which it asks once and then remembers."""
    asked = distributed.is_available
    distributed.is_available = lambda: False
    try:
        from transformers.utils.import_utils import is_torch_distributed_available

        is_torch_distributed_available()
    finally:
        distributed.is_available = asked


def without_compiling(torch: Any) -> None:
    """Let bitsandbytes keep its functions as they are; `TORCHDYNAMO_DISABLE`, which is set, makes no more of them."""
    asked = torch.compile
    torch.compile = _not_compiled
    try:
        import bitsandbytes  # noqa: F401
    finally:
        torch.compile = asked
