"""What all systems of a run share: the base's weights, the adapters, the prompts and the device's clock."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_rt.core.benchmark.adapters import Shelf
from lora_rt.core.benchmark.origin import Origin
from lora_rt.core.benchmark.workloads import Workload

_ORDINARY = 0.1  # of the vocabulary: what comes before may be special tokens


class Lab:
    """One base, whose model nobody hooks up or wraps: every system gets a module tree of its own over its weights."""

    def __init__(self, origin: Origin, folder: Path) -> None:
        """Loads the base; `folder` takes adapters and other files.

        Raises:
            LoraRtError: the base can't be loaded.
        """
        self.origin = origin
        self.base = origin.load()
        self.folder = folder
        self.shelf = Shelf(self.base.model, folder / "adapters")
        ids = torch.zeros((1, 2), dtype=torch.long, device=self.device)
        with (
            torch.no_grad()
        ):  # bitsandbytes repacks at the first forward, once for all trees, and not in inference mode
            self.base.model(input_ids=ids, use_cache=False)

    def elsewhere(self) -> Origin:
        """The same base for another process, which need not find the home where it is prepared."""
        if self.origin.random is not None:
            return self.origin
        return replace(self.origin, base=str(self.base.folder))

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return self.base.device

    def reason(self, workload: Workload) -> str | None:
        """Why no system can do this workload here."""
        if workload.kind in ("cold", "training") and self.origin.random is not None:
            return "a random base is not on disk"
        return None

    def model(self) -> Any:
        """A module tree of its own over the very same weights, so that the base alone stays free of anyone's hooks."""
        return twin(self.base.model)

    def prompts(self, workload: Workload) -> list[list[int]]:
        """Random tokens, (rows, prompt tokens), the same ones for everybody."""
        size = self.base.facts.vocab_size
        generator = torch.Generator().manual_seed(0)
        shape = (workload.rows, workload.prompt_tokens)
        ids = torch.randint(int(size * _ORDINARY), size, shape, generator=generator)
        return [[int(i) for i in row] for row in ids]

    def now(self) -> float:
        """Seconds, once all work that was given to the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def twin(model: Any) -> Any:
    """A copy of a model's modules over the same parameters and buffers, quantization scales included."""
    shared: list[Any] = [*model.parameters(), *model.buffers(), model.config, model.generation_config]
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            shared.append(state)
    return copy.deepcopy(model, memo={id(thing): thing for thing in shared})
