"""The base alone: the plain transformers model, which nobody hooked up, in a plain loop and in its own `generate`.

The plain loop is the denominator of every ratio, and PEFT runs in it too: a cache, one forward pass a step, tokens that
stay on the device until the end. It gives its models the best that a plain loop can give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.system import System, Turn, timed
from lora_rt.core.benchmark.workloads import SAMPLED, Workload


def run_plainly(lab: Lab, model: Any, workload: Workload, **arguments: Any) -> Turn:
    """The plain loop over a model; `arguments` go with every pass."""
    prompts = lab.prompts(workload)
    choose = _chooser(workload, lab.device)
    return timed(lab, lambda: _steps(model, prompts, workload.steps, choose, arguments))


def _steps(
    model: Any, prompts: Sequence[Sequence[int]], steps: int, choose: Callable[..., Tensor], arguments: dict[str, Any]
) -> Iterator[Tensor]:
    """Yields the next token of every row, (rows,), after the prompt and after each further step."""
    from transformers import DynamicCache

    ids = torch.tensor(prompts, device=model.device)
    said = ids[:, :0]
    cache = DynamicCache(config=model.config)
    for _ in range(steps):
        with torch.inference_mode():
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **arguments)
            ids = choose(said, output.logits[:, -1])
            said = torch.cat([said, ids], dim=1)
        yield ids[:, 0]


def _chooser(workload: Workload, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """(tokens said (rows, steps), logits (rows, vocab)) -> tokens (rows, 1), by transformers' own processors."""
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopPLogitsWarper,
    )

    if not workload.sampled:
        return lambda _said, logits: logits.argmax(-1, keepdim=True)
    generator = torch.Generator(device).manual_seed(0)
    penalty = RepetitionPenaltyLogitsProcessor(SAMPLED["repetition_penalty"])
    warpers = TemperatureLogitsWarper(SAMPLED["temperature"]), TopPLogitsWarper(SAMPLED["top_p"])
    process = LogitsProcessorList([penalty, *warpers])
    return lambda said, logits: process(said, logits.float()).softmax(-1).multinomial(1, generator=generator)


class BaseAlone(System):
    """The plain loop, without any adapter."""

    name = "base"

    @cached_property
    def _model(self) -> Any:
        return self.lab.model()

    def reason(self, workload: Workload) -> str | None:
        """It has no composition, and nothing to train."""
        return {"change": "has no composition", "training": "trains nothing"}.get(workload.kind)

    def run(self, workload: Workload) -> Turn:
        """What the base says."""
        return run_plainly(self.lab, self._model, workload)


class Generate(BaseAlone):
    """`model.generate`: what people run. Its streamer tells prefill and decoding apart."""

    name = "generate"

    def reason(self, workload: Workload) -> str | None:
        """The base alone stands for it in what is no decoding."""
        return None if workload.kind in ("decode", "prefill") else "as the base"

    def run(self, workload: Workload) -> Turn:
        """Prompt and steps by `generate`."""
        prompts = torch.tensor(self.lab.prompts(workload), device=self.lab.device)
        drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if workload.sampled:
            drawn = {"do_sample": True, "top_k": 0, **SAMPLED}
        bounds = {"max_new_tokens": workload.steps, "min_new_tokens": workload.steps, "pad_token_id": 0}
        watch = _Watch(self.lab)
        start = self.lab.now()
        output = self._model.generate(
            prompts, attention_mask=torch.ones_like(prompts), streamer=watch, **bounds, **drawn
        )
        first, last = watch.times[1], watch.times[-1]  # the streamer is given the prompt before anything is computed
        return Turn(first - start, last - first, output[:, workload.prompt_tokens :].tolist())


class _Watch:
    """A streamer (transformers' BaseStreamer) that notes when the prompt and each step came."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.times: list[float] = []

    def put(self, _tokens: Any) -> None:
        self.times.append(self._lab.now())

    def end(self) -> None:
        pass
