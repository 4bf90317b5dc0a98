"""transformers' own `generate` on the base alone: what people run, beside the strict loop."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.numbers import Sample
from lora_rt.core.benchmark.systems.greedy import wanted_steps
from lora_rt.core.benchmark.systems.system import Repeat
from lora_rt.core.benchmark.workloads import Workload


class Generate:
    """`model.generate`, whose streamer is told of every step: that is how prefill and decoding are told apart."""

    name = "generate"

    def __init__(self, lab: Lab) -> None:
        self._lab = lab

    @cached_property
    def _model(self) -> Any:
        return self._lab.model()

    def reason(self, workload: Workload) -> str | None:
        """The base alone stands for it in what is no decoding."""
        return None if workload.kind in ("decode", "prefill") else "as the base"

    def prepare(self, workload: Workload) -> Repeat:
        """Prompt and steps by `generate`."""
        prompts = torch.tensor(self._lab.prompts(workload), device=self._lab.device)

        def repeat() -> Sample:
            watch = _Watch(self._lab)
            start = self._lab.now()
            self._run(prompts, wanted_steps(workload), watch)
            first, last = watch.times[1], watch.times[-1]
            if workload.kind == "prefill":
                return Sample(first - start, workload.rows * workload.prompt_tokens)
            return Sample(last - first, workload.rows * workload.new_tokens)

        return repeat

    def tokens(self, workload: Workload) -> Sequence[Sequence[int]]:
        """What the base says."""
        prompts = torch.tensor(self._lab.prompts(workload), device=self._lab.device)
        output = self._run(prompts, workload.new_tokens + 1, None)
        rows: list[list[int]] = output[:, workload.prompt_tokens :].tolist()
        return rows

    def _run(self, prompts: torch.Tensor, steps: int, streamer: Any) -> torch.Tensor:
        output: torch.Tensor = self._model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=steps,
            min_new_tokens=steps,
            pad_token_id=0,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            streamer=streamer,
        )
        return output


class _Watch:
    """A streamer (transformers' BaseStreamer) that notes when the prompt and each step came."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.times: list[float] = []

    def put(self, _tokens: Any) -> None:
        self.times.append(self._lab.now())

    def end(self) -> None:
        pass
