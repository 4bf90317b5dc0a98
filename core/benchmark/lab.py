"""What all systems of a run share: the base's weights, the adapters, the prompts and the device's clock."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from lora_rt.core.base.load import load_base
from lora_rt.core.base.machine import now
from lora_rt.core.base.random_base import random_base
from lora_rt.core.base.repacking import over_the_same_weights
from lora_rt.core.benchmark.workloads import Origin, Workload
from lora_rt.core.engine.topology import features
from lora_rt.core.step.adapter import targets
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
        self.folder = folder
        load, name = (load_base, origin.base) if origin.random is None else (random_base, origin.random)
        self.base = load(name, origin.precision, origin.device)
        self.device = self.base.device
        self.now = partial(now, self.device)

    def elsewhere(self) -> Origin:
        """The same base for another process, which need not find the home where it is prepared."""
        base = self.origin.base if self.origin.random else str(self.base.folder)
        return replace(self.origin, base=base, precision=self.base.precision, device=str(self.device))

    def model(self) -> Any:
        """Modules of its own for a system, over the base's weights."""
        return over_the_same_weights(self.base.model)

    def prompts(self, workload: Workload) -> list[list[int]]:
        """Random tokens, (rows, prompt tokens), the same ones for everybody."""
        size, dice = self.base.facts.vocab_size, torch.Generator().manual_seed(0)
        shape = workload.rows, workload.prompt_tokens
        ids: list[list[int]] = torch.randint(int(size * _ORDINARY), size, shape, generator=dice).tolist()
        return ids

    def adapters(self, workload: Workload) -> dict[str, Path]:
        """Resident name -> PEFT directory, of all residents; written once, so that all systems load the same files."""
        shelf = self.folder / "adapters" / f"{'-'.join(workload.targets)}-r{workload.rank}"
        found = {name: shelf / name for name in workload.residents}
        for index, folder in enumerate(found.values()):
            if not folder.exists():
                self._write_adapter(folder, workload, index)
        return found

    def _write_adapter(self, folder: Path, workload: Workload, seed: int) -> None:
        """A so that A x is about as large as x, B small, both different from zero; bfloat16 as in trained adapters."""
        names, _ = targets(self.base.model, workload.targets)
        dice, rank = torch.Generator().manual_seed(1 + seed), workload.rank
        tensors = {}
        for name in names:
            out, inner = features(self.base.model.get_submodule(name))
            a = torch.randn(rank, inner, generator=dice) * inner**-0.5
            b = torch.randn(out, rank, generator=dice) * _B_SIZE
            tensors[f"base_model.model.{name}.lora_A.weight"] = a.bfloat16()
            tensors[f"base_model.model.{name}.lora_B.weight"] = b.bfloat16()
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names, task_type="CAUSAL_LM", inference_mode=True)
        config.save_pretrained(folder)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
