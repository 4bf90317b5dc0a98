"""What a base takes of transformers beyond its documented face; `tests/base/test_upstream.py` holds each fact.

_is_stateful      a model that keeps more of the tokens that it has read than keys and values
AutoHfQuantizer   its own replacement of layers, without weights
"""

from __future__ import annotations

from typing import Any


def keeps_a_state(model: Any) -> bool:
    """Whether the model has a recurrent state, which no cache of keys and values holds."""
    return bool(getattr(model, "_is_stateful", False))


def quantize_layers(model: Any, how: Any) -> None:
    """Replace the layers of a model on the meta device by those of a transformers quantization configuration."""
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(how, pre_quantized=True)
    quantizer.preprocess_model(model, device_map=None)
    quantizer.postprocess_model(model)
