"""What a base takes of transformers beyond its documented face; `tests/base/test_upstream.py` holds each fact.

_is_stateful    a model that keeps more of the tokens that it has read than keys and values
"""

from __future__ import annotations

from typing import Any


def keeps_a_state(model: Any) -> bool:
    """Whether the model has a recurrent state, which no cache of keys and values holds."""
    return bool(getattr(model, "_is_stateful", False))
