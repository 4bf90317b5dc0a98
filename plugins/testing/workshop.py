"""A mode at work on a tiny base: an adapter trained with it, versions of that adapter, and runtimes that use them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from lora_rt.core.base.load import load_base
from lora_rt.core.runtime import Runtime
from lora_rt.core.step.settings import TrainSettings
from lora_rt.core.training.run import train
from lora_rt.plugins.testing.contexts import objective_context
from lora_rt.plugins.testing.tiny import tiny_base
from lora_rt.registry.registry import Registry

if TYPE_CHECKING:
    from lora_rt.core.training.run import TrainResult
    from lora_rt.plugins.contract import Objective
    from lora_rt.plugins.manager import ModeHost

EXAMPLES: tuple[Mapping[str, str], ...] = (
    {"scene": "rain, tin roof", "text": "Rain drums on the tin roof."},
    {"scene": "cold kitchen", "text": "The kitchen is cold."},
    {"scene": "late bus, wet shoes", "text": "My wet shoes wait for a late bus."},
    {"scene": "тишина, жар", "text": "Тишина и жар."},
    {"scene": "an open gate", "text": "The gate stays open."},
    {"scene": "bread, morning", "text": "Morning smells of bread."},
)
_OUTPUT_ONLY = "output-only"


@dataclass
class Workshop:
    """Everything about one mode and one tiny base, made when it is first asked for.

    `strong` adapters have large random weights, so that what a gate does to them is seen in the logits.
    """

    folder: Path
    host: ModeHost
    mode: str
    options: Mapping[str, str]
    examples: Sequence[Mapping[str, Any]]
    scene_types: Sequence[str]

    @cached_property
    def base(self) -> Path:
        """The folder of the tiny base."""
        return tiny_base(self.folder / "tiny")

    @property
    def trains(self) -> bool:
        """Whether the mode has an objective; one without is tried on an adapter that output-only trained."""
        return self.host.implements(self.mode, "lora_rt_objective")

    @cached_property
    def result(self) -> TrainResult:
        """A run of a few steps with the mode's objective."""
        return self._train(self.mode if self.trains else _OUTPUT_ONLY, self.folder / "trained")

    @cached_property
    def trained(self) -> Path:
        """The adapter of that run."""
        return _with_mode(self.result.folder, self.mode)

    @cached_property
    def strong(self) -> Path:
        """The trained adapter, state included, with large random weights."""
        return _filled(self.trained, self.folder / "strong", 0.5)

    @cached_property
    def untrained(self) -> Path:
        """The adapter at its start (B is zero), with the mode's state as it is before training."""
        copy = _filled(self.trained, self.folder / "untrained", 0.0)
        self._reset_state(copy)
        return copy

    @cached_property
    def untuned(self) -> Path:
        """Large random weights with the mode's state as it is before training."""
        copy = _filled(self.trained, self.folder / "untuned", 0.5)
        self._reset_state(copy)
        return copy

    @cached_property
    def plain(self) -> Path:
        """The weights of `untuned` as an output-only adapter: what static composition gives."""
        copy = Path(shutil.copytree(self.untuned, self.folder / "plain"))
        (copy / "mode.safetensors").unlink(missing_ok=True)
        return _with_mode(copy, _OUTPUT_ONLY)

    @cached_property
    def runtime(self) -> Runtime:
        """A runtime with the residents `strong` and `plain`."""
        runtime = self.new_runtime()
        runtime.load_adapter(str(self.strong), name="strong")
        runtime.load_adapter(str(self.plain), name="plain")
        return runtime

    def new_runtime(self) -> Runtime:
        """A runtime over the tiny base, in float32 on the CPU, without residents."""
        registry = Registry(home=self.folder / "home", project=self.folder)
        return Runtime(load_base(str(self.base), "float32", "cpu"), self.host, registry)

    def objective(self, **changed: Any) -> Objective:
        """The mode's objective, of a run with the workshop's options unless told otherwise."""
        settings = {"options": self.options, "scene_types": tuple(self.scene_types)}
        objective = self.host.objective(self.mode, objective_context(**(settings | changed)))
        assert objective is not None, "lora_rt_objective returned None: this mode can't be trained"
        return objective

    def _train(self, mode: str, folder: Path) -> TrainResult:
        data = self.folder / "data.jsonl"
        data.write_text("".join(json.dumps(example) + "\n" for example in self.examples), encoding="utf-8")
        folder.mkdir()
        settings = TrainSettings(
            register="mine",
            mode=mode,
            data=data,
            held_out=data,
            base=str(self.base),
            precision="float32",
            device="cpu",
            r=4,
            alpha=8,
            dropout=0.0,
            target_modules=("q_proj", "v_proj", "o_proj"),
            epochs=1,
            batch_size=4,
            scene_types=tuple(self.scene_types),
            options=self.options if mode == self.mode else {},
        )
        return train(settings, self.host, folder)

    def _reset_state(self, folder: Path) -> None:
        state = self.objective().state if self.trains else None
        if state is not None:
            save_file({k: v.contiguous() for k, v in state.state_dict().items()}, folder / "mode.safetensors")


def _with_mode(folder: Path, mode: str) -> Path:
    """The folder, whose card now states this mode."""
    card = folder / "register.json"
    document = json.loads(card.read_text(encoding="utf-8")) | {"mode": mode}
    if mode == _OUTPUT_ONLY:
        document["state"] = {}
    card.write_text(json.dumps(document), encoding="utf-8")
    return folder


def _filled(source: Path, target: Path, scale: float) -> Path:
    """A copy of an adapter with normally distributed weights; a scale of 0 leaves A and makes B zero."""
    shutil.copytree(source, target)
    file = target / "adapter_model.safetensors"
    random = torch.Generator().manual_seed(7)
    tensors = {}
    for name, tensor in load_file(file).items():
        noise = torch.randn(tensor.shape, generator=random) * scale
        tensors[name] = (noise if scale or ".lora_B." in name else tensor).to(tensor.dtype).contiguous()
    save_file(tensors, file, {"format": "pt"})
    return target
