"""What all systems of a run share: the base's weights, the adapters, the prompts and the device's clock."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn

from lora_rt.core.base.load import load_base
from lora_rt.core.benchmark.random_base import random_base
from lora_rt.core.benchmark.workloads import Origin, Workload, resident_name
from lora_rt.core.engine.topology import features, find_linears
from lora_rt.core.step.settings import choose_targets
from lora_rt.registry.files import WEIGHTS

_ORDINARY = 0.1  # of the vocabulary: what comes before may be special tokens
_B_SIZE = 0.01  # small beside a base's own outputs: the text stays finite under any weights


class Lab:
    """One base, whose model nobody hooks up or wraps: every system gets a module tree of its own over its weights."""

    def __init__(self, origin: Origin, folder: Path) -> None:
        """Loads the base; `folder` takes adapters and other files.

        Raises:
            LoraRtError: the base can't be loaded.
        """
        self.origin = origin
        if origin.random is not None:
            self.base = random_base(origin.random, origin.precision, origin.device)
        else:
            self.base = load_base(origin.base, origin.precision, origin.device)
        self.device = self.base.device
        self.folder = folder
        self.linears = find_linears(self.base.model)
        ids = torch.zeros((1, 2), dtype=torch.long, device=self.device)
        # bitsandbytes repacks at the first forward: once for all trees, and not in inference mode
        with torch.no_grad():
            self.base.model(input_ids=ids, use_cache=False)

    def elsewhere(self) -> Origin:
        """The same base for another process, which need not find the home where it is prepared."""
        base = self.origin.base if self.origin.random else str(self.base.folder)
        return replace(self.origin, base=base, precision=self.base.precision, device=str(self.device))

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
        shape = (workload.rows, workload.prompt_tokens)
        ids = torch.randint(int(size * _ORDINARY), size, shape, generator=torch.Generator().manual_seed(0))
        return [[int(i) for i in row] for row in ids]

    def adapters(self, workload: Workload) -> dict[str, Path]:
        """Resident name -> PEFT directory, of all residents; written once, so that all systems load the same files."""
        shelf = self.folder / "adapters" / f"{'-'.join(workload.targets)}-r{workload.rank}"
        found = {resident_name(index): shelf / resident_name(index) for index in range(workload.resident)}
        for index, folder in enumerate(found.values()):
            if not folder.exists():
                self._write_adapter(folder, workload, index)
        return found

    def now(self) -> float:
        """Seconds, once all work that was given to the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _write_adapter(self, folder: Path, workload: Workload, seed: int) -> None:
        head = self.base.model.get_output_embeddings()
        inner = {name: module for name, module in self.linears.items() if module is not head}
        names = choose_targets(workload.targets, list(inner))
        chosen = {name: inner[name] for name in names}
        folder.mkdir(parents=True)
        config = LoraConfig(r=workload.rank, lora_alpha=workload.rank, target_modules=names, task_type="CAUSAL_LM")
        config.inference_mode = True
        config.save_pretrained(folder)
        save_file(_random_factors(chosen, workload.rank, seed), folder / WEIGHTS, {"format": "pt"})


def twin(model: Any) -> Any:
    """A copy of a model's modules over the same parameters and buffers, quantization scales included."""
    shared: list[Any] = [*model.parameters(), *model.buffers(), model.config, model.generation_config]
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            shared.append(state)
    return copy.deepcopy(model, memo={id(thing): thing for thing in shared})


def _random_factors(modules: dict[str, nn.Module], rank: int, seed: int) -> dict[str, torch.Tensor]:
    """A so that A x is about as large as x, B small, both different from zero; bfloat16 as in trained adapters."""
    generator = torch.Generator().manual_seed(1 + seed)
    tensors = {}
    for name, module in modules.items():
        out, inner = features(module)
        a = torch.randn(rank, inner, generator=generator) * inner**-0.5
        b = torch.randn(out, rank, generator=generator) * _B_SIZE
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.bfloat16()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.bfloat16()
    return tensors
