"""Keys and values with room for the tokens to come, so that a step writes its own and does not copy all before them.

    buffer    (rows, heads, columns, size)    of which those up to `end` are written
    keys      a view of them                  [ seen | 32 columns for what comes ]

transformers' dynamic layers put old and new together in new memory at every token: of 16 rows of 90 tokens of a base of
135 million parameters 66 MB are moved at each, of one row of 1,500 as many. What a layer shows is never written again,
so what somebody else holds of it stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

_ROOM = 32  # columns; of a base of seven billion parameters 16 MB a row


class _Growing:
    """Keys or values of one layer."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._shown: Tensor | None = None
        self._end = 0

    def appended(self, there: Tensor, new: Tensor) -> Tensor:
        """What is there and the new columns behind it, (rows, heads, columns, size)."""
        buffer, columns = self._buffer, new.shape[2]
        seen = there.shape[2] if there.numel() else 0  # an empty layer holds an empty list of numbers
        if buffer is None or there is not self._shown or not _has_room(buffer, self._end + columns):
            rows, heads, _, size = new.shape
            self._buffer = buffer = new.new_empty(rows, heads, seen + columns + _ROOM, size)
            self._end = seen
            if seen:
                buffer[:, :, :seen] = there
        end = self._end + columns
        buffer[:, :, self._end : end] = new
        return buffer[:, :, self._end - seen : end]

    def stretched(self, there: Tensor) -> Tensor | None:
        """What is there and one more column, in which anything stands; None where there is no room for it."""
        buffer, end = self._buffer, self._end + 1
        if buffer is None or there is not self._shown or not _has_room(buffer, end):
            return None
        columns = there.shape[2] + 1
        return buffer.narrow(2, end - columns, columns)

    def shown(self, part: Tensor, new: int) -> Tensor:
        """Note what the layer shows from now on, which ends `new` columns further on; anything else is copied."""
        self._shown, self._end = part, self._end + new
        return part


def _has_room(buffer: Tensor, end: int) -> bool:
    # What was made in inference mode can be written there alone.
    return end <= buffer.shape[2] and (torch.is_inference_mode_enabled() or not buffer.is_inference())


def _can_grow(new: Tensor, there: Tensor | None) -> bool:
    """Whether it is a step of the same rows, which nobody wants to record or a gradient of."""
    few = new.dim() == 4 and new.shape[2] <= _ROOM
    same = there is None or not there.numel() or there.shape[:2] == new.shape[:2]
    return few and same and new.is_cpu and not torch.is_grad_enabled()


class _WithRoom:
    """What both kinds of layers below do alike."""

    keys: Tensor
    values: Tensor
    is_initialized: bool
    lazy_initialization: Callable[[Tensor, Tensor], None]
    _keys: _Growing
    _values: _Growing

    def _appended(self, new_keys: Tensor, new_values: Tensor) -> tuple[Tensor, Tensor] | None:
        """All keys and values; None where it has to be done as transformers does it, and no room is kept."""
        if not (_can_grow(new_keys, self.keys) and _can_grow(new_values, self.values)):
            self._keys, self._values = _Growing(), _Growing()
            return None
        if not self.is_initialized:
            self.lazy_initialization(new_keys, new_values)
        return self._keys.appended(self.keys, new_keys), self._values.appended(self.values, new_values)


class GrowingLayer(_WithRoom, DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """A layer that keeps all tokens."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._keys, self._values = _Growing(), _Growing()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, the new tokens' behind them."""
        found = self._appended(key_states, value_states)
        if found is None:
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        keys, values = found
        new = key_states.shape[2]
        self.keys, self.values = self._keys.shown(keys, new), self._values.shown(values, new)
        return keys, values

    def stretched(self, rows: int) -> tuple[Tensor, Tensor] | None:
        """All keys and values with one more column, which whoever asks for it writes.

        None where they have no room for it, or are of another number of rows.
        """
        keys, values = self._keys.stretched(self.keys), self._values.stretched(self.values)
        if keys is None or values is None or torch.is_grad_enabled() or not len(keys) == len(values) == rows:
            return None
        self.keys, self.values = self._keys.shown(keys, 1), self._values.shown(values, 1)
        return keys, values


class GrowingWindow(_WithRoom, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A layer that keeps the tokens which the next one still sees."""

    def __init__(self, sliding_window: int, **kwargs: Any) -> None:
        super().__init__(sliding_window, **kwargs)
        self._keys, self._values = _Growing(), _Growing()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What the new tokens see, theirs behind it."""
        found = None if self.record_past else self._appended(key_states, value_states)
        if found is None:
            return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]
        keys, values = found
        kept, new = slice(1 - self.sliding_window, None), key_states.shape[2]
        self.keys, self.values = self._keys.shown(keys[:, :, kept], new), self._values.shown(values[:, :, kept], new)
        self.cumulative_length += new
        return keys, values


def let_grow(cache: Any) -> Any:
    """The same cache, still empty, whose layers have room; layers of other kinds stay as they are."""
    for number, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[number] = GrowingLayer()
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[number] = GrowingWindow(layer.sliding_window)
    return cache
