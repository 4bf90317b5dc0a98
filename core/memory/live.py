"""How much memory is alive while code runs over fake tensors, and the most that ever was."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from lora_rt.core.memory.upstream import TorchDispatchMode, storage_key, tree_iter


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of every storage that an operation makes, until the last tensor over it is gone.

    Args:
        known: tensors that were there before; their storages are not counted.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._counted: dict[int, int] = {}
        for tensor in known:
            self._note(tensor, counts=False)

    def __torch_dispatch__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._note(value)
        return out

    def restart(self) -> int:
        """The peak so far; from now on the peak is that of what follows."""
        before, self.peak = self.peak, self.now
        return before

    def _note(self, tensor: Tensor, *, counts: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage_key(tensor)
        if key in self._counted:
            return
        self._counted[key] = storage.nbytes() if counts else 0
        self.now += self._counted[key]
        self.peak = max(self.peak, self.now)
        # PyTorch keeps one Python object per storage for as long as the storage lives, so its end is the storage's.
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._counted.pop(key)
