"""The plain greedy loop: a cache, one forward pass a step, argmax. The same for the base alone and for PEFT.

Tokens stay on the device until the end: the loop gives its models the best that a plain loop can give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.numbers import Sample
from lora_rt.core.benchmark.systems.system import Repeat
from lora_rt.core.benchmark.workloads import Workload


def greedy_steps(model: Any, prompts: Sequence[Sequence[int]], steps: int, **arguments: Any) -> Iterator[Tensor]:
    """Yields the next token of every row, (rows,), after the prompt and after each further step."""
    from transformers import DynamicCache

    ids = torch.tensor(prompts, device=model.device)
    cache = DynamicCache(config=model.config)
    for _ in range(steps):
        with torch.inference_mode():
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **arguments)
            chosen = output.logits[:, -1].argmax(-1)
        yield chosen
        ids = chosen[:, None]


def greedy_tokens(lab: Lab, model: Any, workload: Workload, **arguments: Any) -> list[list[int]]:
    """All tokens of a decoding workload, (rows, new tokens + 1)."""
    steps = greedy_steps(model, lab.prompts(workload), workload.new_tokens + 1, **arguments)
    rows: list[list[int]] = torch.stack(list(steps), dim=1).tolist()
    return rows


def greedy_repeat(lab: Lab, model: Any, workload: Workload, **arguments: Any) -> Repeat:
    """The repeat of a decode or prefill workload."""
    prompts = lab.prompts(workload)
    return lambda: timed(lab, workload, lambda: greedy_steps(model, prompts, wanted_steps(workload), **arguments))


def wanted_steps(workload: Workload) -> int:
    """Of a loop: the first token comes out of the prompt, and only what follows is decoding."""
    return 1 if workload.kind == "prefill" else workload.new_tokens + 1


def timed(lab: Lab, workload: Workload, begin: Callable[[], Iterator[Any]]) -> Sample:
    """Times the beginning and the first step of a loop as prefill, or all other steps as decoding."""
    start = lab.now()
    steps = begin()
    next(steps)
    first = lab.now()
    if workload.kind == "prefill":
        return Sample(first - start, workload.rows * workload.prompt_tokens)
    for _ in steps:
        pass
    return Sample(lab.now() - first, workload.rows * workload.new_tokens)
