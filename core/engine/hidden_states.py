"""The base's early hidden state: a pass that stops after the first blocks, with no adapter applied."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from lora_rt.core.base.shape import blocks_of
from lora_rt.core.engine.causal_lm import CausalLM

_wanted: ContextVar[bool] = ContextVar("lora_rt_early", default=False)
_DEPTH = 4  # a quarter of the blocks


class _Reached(BaseException):
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class EarlyHidden:
    """Gives the output of the block a quarter of the way up. Its hook does nothing outside `__call__`."""

    def __init__(self, lm: CausalLM, layers: int) -> None:
        self._lm = lm
        self._hook = blocks_of(lm.model)[max(0, layers // _DEPTH - 1)].register_forward_hook(self._stop)

    @staticmethod
    def _stop(_module: nn.Module, _arguments: Any, output: Any) -> None:
        if _wanted.get():
            raise _Reached(output[0] if isinstance(output, tuple) else output)

    def close(self) -> None:
        """Take the hook off the model."""
        self._hook.remove()

    def __call__(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """(rows, tokens, hidden) for ids, mask and positions (rows, tokens); the rows may share a pass."""
        token = _wanted.set(True)
        try:
            with torch.inference_mode():
                self._lm.forward(ids, mask, positions)
        except _Reached as reached:
            return reached.hidden
        finally:
            _wanted.reset(token)
        raise RuntimeError("the model has no blocks to stop at")
