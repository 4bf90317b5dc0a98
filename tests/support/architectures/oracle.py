"""What PEFT computes: its own layers, with the tensors that it has in memory, one row a pass."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_ATTENTION = re.compile(r".*(attn|attention|mixer|temporal_block)[^.]*\..*|.*\.(c_attn|Wqkv|query_key_value)")

_NOT_OUT_PROJ = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")


class Oracle:
    """PEFT's adapters `one` (everything linear) and `two` (attention alone, where there is any) over one model."""

    def __init__(self, model: Any) -> None:
        from peft import get_peft_model

        self.attention = attention_of(model)
        conv = any(type(module).__name__ == "Conv1D" for module in model.modules())
        self._options = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "fan_in_fan_out": conv}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model = get_peft_model(model, self._config(everything(model)), adapter_name="one")
            again = self.model.peft_config["one"]
            self.model.add_adapter("two", self._config(self.attention) if self.attention else copy.copy(again))
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_" in name:
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(noise * 0.1)
        self.model.eval()
        self._scalings: dict[tuple[int, str], float] = {}

    def _config(self, targets: Any) -> Any:
        from peft import LoraConfig

        return LoraConfig(**self._options, target_modules=targets)

    def save(self, folder: Path) -> tuple[Path, Path]:
        """The folders of both adapters, as PEFT writes them."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model.save_pretrained(folder, save_embedding_layers=False)
        return folder / "one", folder / "two"

    def logits(self, ids: Sequence[int], weights: Mapping[str, float]) -> Tensor:
        """(tokens, vocab) of one row under these adapters."""
        from peft.tuners.lora import LoraLayer

        active = [name for name, weight in weights.items() if weight]
        with torch.no_grad():
            for module in self.model.modules():
                if isinstance(module, LoraLayer):
                    for name in ("one", "two"):
                        if name in module.scaling:
                            own = self._scalings.setdefault((id(module), name), module.scaling[name])
                            module.scaling[name] = own * weights.get(name, 0.0)
            given = {"input_ids": torch.tensor([list(ids)])}
            if not active:
                with self.model.disable_adapter():
                    return self.model(**given).logits[0]  # type: ignore[no-any-return]
            self.model.base_model.set_adapter(active)
            logits: Tensor = self.model(**given).logits[0]
        return logits

    def greedy(self, ids: Sequence[int], weights: Mapping[str, float], tokens: int) -> list[int]:
        """The next tokens, each from a pass over all before it."""
        row = list(ids)
        for _ in range(tokens):
            row.append(int(self.logits(row, weights)[-1].argmax()))
        return row[len(ids) :]


def everything(model: Any) -> str | list[str]:
    """What PEFT calls all linear layers, without those with which PEFT fails.

    It refuses some of a Mamba by their names, and breaks layers that are linear by inheritance alone.
    """
    head = model.get_output_embeddings()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    left = [name for name, module in linears.items() if not _is_plain(module)]
    if model.config.model_type in _NOT_OUT_PROJ:
        left += [name for name in linears if name.rsplit(".", 1)[-1] in ("out_proj", "conv1d")]
    return [name for name in linears if name not in left] if left else "all-linear"


def _is_plain(module: Any) -> bool:
    """Whether a layer gives W x + b."""
    if "quant_state" in vars(module.weight) or module.weight.dtype == torch.int8:
        return True
    x = torch.randn(1, 2, module.in_features).to(module.weight)
    try:
        with torch.no_grad():
            y = module(x)
    except RuntimeError:
        return False
    wanted = torch.nn.functional.linear(x, module.weight, module.bias)
    return isinstance(y, Tensor) and y.shape == wanted.shape and torch.allclose(y, wanted, atol=0.05)


def attention_of(model: Any) -> list[str]:
    """Full names of the linear layers that lie in an attention module, or in what stands in its place."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if module is not head
        and (isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D")
        and (type(module).__name__ == "Conv1D" or _is_plain(module))
        and _ATTENTION.fullmatch(name)
        and not (model.config.model_type in _NOT_OUT_PROJ and name.endswith("out_proj"))
    ]
