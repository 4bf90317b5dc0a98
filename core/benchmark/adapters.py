"""Random adapters, written once as PEFT directories, so that every system loads the very same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn

from lora_rt.core.benchmark.workloads import Workload, resident_name
from lora_rt.core.engine.topology import features, find_linears
from lora_rt.core.step.settings import choose_targets
from lora_rt.registry.files import WEIGHTS

_B_SIZE = 0.01  # small beside a base's own outputs: the text stays finite under any weights


class Shelf:
    """Writes adapters for one base into a folder, each when it is first asked for."""

    def __init__(self, model: Any, folder: Path) -> None:
        self._linears = find_linears(model)
        head = model.get_output_embeddings()
        self._inner = {name: module for name, module in self._linears.items() if module is not head}
        self._folder = folder

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The base's linear layers by path, (out_features, in_features)."""
        return {name: features(module) for name, module in self._linears.items()}

    def paths(self, workload: Workload) -> dict[str, Path]:
        """Resident name -> PEFT directory, of all residents of the workload."""
        return {
            resident_name(index): self._path(index, workload.targets, workload.rank)
            for index in range(workload.resident)
        }

    def _path(self, index: int, targets: tuple[str, ...], rank: int) -> Path:
        folder = self._folder / f"{'-'.join(targets)}-r{rank}" / resident_name(index)
        if not folder.exists():
            leaves = choose_targets(targets, list(self._inner))
            modules = {name: m for name, m in self._inner.items() if name.rsplit(".", 1)[-1] in leaves}
            folder.mkdir(parents=True)
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=leaves, task_type="CAUSAL_LM")
            config.inference_mode = True
            config.save_pretrained(folder)
            save_file(_tensors(modules, rank, index), folder / WEIGHTS, {"format": "pt"})
        return folder


def _tensors(modules: dict[str, nn.Module], rank: int, seed: int) -> dict[str, torch.Tensor]:
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
