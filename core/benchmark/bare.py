"""A bare script: transformers, and PEFT where adapters are named, from the import to the first token.

    python bare.py FOLDER DTYPE DEVICE PROMPT [NAME=WEIGHT=ADAPTER ...]

It is what lora-rt's cold start is compared with, and imports nothing of lora-rt.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Load, read the prompt, and print the first token."""
    folder, dtype, device, prompt, *adapters = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), device_map={"": device})
    if adapters:
        terms = (adapter.split("=", 2) for adapter in adapters)
        model = with_adapters(model, [(name, float(weight), Path(path)) for name, weight, path in terms])
    if templated := bool(tokenizer.chat_template):
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not templated)
    given = {key: inputs[key].to(device) for key in ("input_ids", "attention_mask")}
    output = model.generate(**given, max_new_tokens=1, do_sample=False)
    print(repr(tokenizer.decode(output[0, given["input_ids"].shape[1] :])), flush=True)


def with_adapters(model: Any, adapters: Sequence[tuple[str, float, Path]]) -> Any:
    """A PeftModel with all of them active; each is its name, weight and folder."""
    from peft import PeftModel

    (first, _, folder), *others = adapters
    model = PeftModel.from_pretrained(model, folder, adapter_name=first)
    for name, _, folder in others:
        model.load_adapter(folder, name)
    activate(model, [(name, weight) for name, weight, _ in adapters])
    return model


def activate(model: Any, weights: Sequence[tuple[str, float]]) -> None:
    """Make these the active adapters of a PeftModel, each with its weight, in every layer."""
    from peft.tuners.lora import LoraLayer

    model.base_model.set_adapter([name for name, _ in weights], inference_mode=True)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, weight in weights:
                module.set_scale(name, weight)


if __name__ == "__main__":
    main()
