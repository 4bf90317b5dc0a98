"""Reads a model with transformers, and takes nothing but a whole one."""

from __future__ import annotations

from typing import Any

from safetensors import SafetensorError

from lora_rt.core.base.source import BaseError

UNREADABLE = (ValueError, OSError, KeyError, AttributeError, TypeError, RuntimeError, ImportError, SafetensorError)
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
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        text = f"{len(missing)} weights of {arguments.get('gguf_file', where)} are missing or have another shape"
        raise BaseError(text, problems=missing[:20], next_step="Fetch the model again")
    return model


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
