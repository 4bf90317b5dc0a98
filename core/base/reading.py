"""Reads a model with transformers, and takes nothing but a whole one."""

from __future__ import annotations

import struct
from typing import Any

from safetensors import SafetensorError

from lora_rt.core.base.source import BaseError

UNREADABLE = (
    ValueError, OSError, LookupError, AttributeError, TypeError, RuntimeError, ImportError, ArithmeticError,
    AssertionError, struct.error, SafetensorError,
)  # fmt: skip
"""What transformers raises for a folder or file that it can't make a model or a tokenizer of."""


def whole_model(where: Any, **arguments: Any) -> Any:
    """The causal language model of a folder.

    Code that comes with a model is never run. transformers fills weights that it does not find with random numbers and
    a warning: here that is an error.

    Raises:
        BaseError: weights are missing. One of `UNREADABLE`: it is no model.
    """
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        where, trust_remote_code=False, output_loading_info=True, **arguments
    )
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"]) + _misshapen(model)
    if missing:
        text = f"{len(missing)} weights of {arguments.get('gguf_file', where)} are missing or have another shape"
        raise BaseError(text, problems=missing[:20], next_step="Fetch the model again")
    return model


def whole_tokenizer(where: Any, **arguments: Any) -> Any:
    """The tokenizer of a folder.

    Raises:
        BaseError: there is none, or it is broken.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=False, **arguments)
    except Exception as error:  # the tokenizers library raises no other kind
        text = f"the tokenizer of {arguments.get('gguf_file', where)} can't be read: {first_line(error)}"
        raise BaseError(text, next_step="Fetch the model again") from error


def _misshapen(model: Any) -> list[str]:
    """Linear layers whose weights have another shape than they say: those that are quantized are not checked before."""
    from torch import nn

    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            state = getattr(module.weight, "quant_state", None)
            shape = tuple(module.weight.shape if state is None else state.shape)
            if shape != (module.out_features, module.in_features):
                found.append(f"{name}: {shape}, should be {(module.out_features, module.in_features)}")
    return found


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
