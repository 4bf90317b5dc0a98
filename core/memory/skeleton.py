"""A base without its weights: fake tensors of the shapes and dtypes that loading would give, and no memory behind them.

The skeleton is transformers' own on the meta device, with the layers replaced by its own quantizer. Fake tensors
(`torch._subclasses.fake_tensor`, what torch.compile reasons with) then take the place of its parameters; unlike those
of the meta device they say that they are on a CPU, so that attention and dropout take the path that they really take.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lora_rt.core.base.choices import Precision
from lora_rt.core.base.fused import run_without_values
from lora_rt.core.base.load import scales
from lora_rt.core.base.packed import fit_to_model
from lora_rt.core.base.precision import compute_dtype, quantization_config
from lora_rt.core.base.reading import auto_class
from lora_rt.core.base.repacking import forbid_repacking, forbid_uneven_repacking
from lora_rt.core.base.shape import blocks_of
from lora_rt.core.base.source import first_line
from lora_rt.core.base.upstream import own_tensors, quantize_layers
from lora_rt.core.memory.upstream import empty_4bit, empty_8bit_state, storage_key
from lora_rt.core.memory.workload import Device, EstimateError
from lora_rt.core.multiply.ways import is_4bit

TRACED = (2, 3)
"""A model whose blocks are alike is run with so many of them: the first, the last, and one in between."""


def skeleton(config: Any, precision: Precision) -> Any:
    """The model of a configuration on the meta device: eval mode, frozen, its layers those of the precision."""
    dense = copy.deepcopy(config)
    if getattr(dense, "quantization_config", None) is not None:
        del dense.quantization_config
    with torch.device("meta"):
        model = auto_class(dense).from_config(dense, dtype=compute_dtype(precision))
    if (how := quantization_config(precision)) is not None:
        quantize_layers(model, how)
        fit_to_model(model)
    model.requires_grad_(False)
    run_without_values(model)
    return model.eval()


def over_blocks(config: Any, precision: Precision, measure: Callable[[Any, nn.ModuleList], Sequence[int]]) -> list[int]:
    """What `measure` says of the model and its blocks; from two and three of them where all are alike.

    Every number has to grow by the same with each further block.

    Raises:
        EstimateError: the model computes with what only its data tells, such as which expert a token goes to.
    """
    model = skeleton(config, precision)
    blocks = blocks_of(model)
    layers = len(blocks)
    with _explained(type(model).__name__):
        if layers <= max(TRACED) or not uniform(blocks):
            return list(measure(model, blocks))
        few, more = (measure(*_cut(config, precision, count)) for count in TRACED)
    return [a + (b - a) * (layers - TRACED[0]) for a, b in zip(few, more, strict=True)]


@contextmanager
def _explained(model: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        text = f"{model} can't be run without its weights: {first_line(error)}"
        raise EstimateError(text, next_step="Load it and look at the memory that it takes") from error


def _cut(config: Any, precision: Precision, count: int) -> tuple[Any, nn.ModuleList]:
    model = skeleton(config, precision)
    blocks = blocks_of(model)
    del blocks[count:]
    return model, blocks


def uniform(blocks: nn.ModuleList) -> bool:
    """Whether all blocks have parameters of the same names, shapes and dtypes."""
    kinds = {tuple((name, p.shape, p.dtype) for name, p in block.named_parameters()) for block in blocks}
    return len(kinds) == 1


def materialise(model: Any, device: Device, *, for_training: bool = False) -> None:
    """Put fake tensors in place of the meta device's, as `load_base` would leave the model on that device.

    Has to run under a FakeTensorMode. Tied parameters stay tied.
    """
    fakes: dict[int, nn.Parameter] = {}
    for module in model.modules():
        parameters, buffers = own_tensors(module)
        for name, parameter in parameters.items():
            if parameter is not None:
                parameters[name] = fakes.setdefault(id(parameter), _fake(module, name, parameter))
        for name, buffer in buffers.items():
            if buffer is not None:
                buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        empty_8bit_state(module)
    forbid_uneven_repacking(model)
    if for_training or device != "cpu":
        forbid_repacking(model)


def _fake(module: nn.Module, name: str, parameter: Tensor) -> nn.Parameter:
    if name == "weight" and type(parameter).__name__ == "Params4bit":
        return empty_4bit(module, parameter)
    return nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=parameter.requires_grad)


def resident(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that a model keeps: parameters, buffers and the scales of quantized weights."""
    yield from chain(model.parameters(), model.buffers(), (tensor for _, tensor in scales(model)))


def bytes_of(model: nn.Module) -> int:
    """Bytes of all that a model keeps, what is shared counted once; of a real model as well as of a fake one."""
    sizes = {storage_key(tensor): tensor.untyped_storage().nbytes() for tensor in resident(model)}
    return sum(sizes.values())


def largest_dequantized(model: nn.Module, precision: Precision) -> int:
    """Bytes of the largest quantized layer in the compute dtype: its matmul unpacks it, unseen by PyTorch."""
    quantized = [m for m in model.modules() if type(m).__module__.startswith("bitsandbytes") and hasattr(m, "weight")]
    sizes = [m.in_features * m.out_features for m in quantized if isinstance(m, nn.Linear)]
    return max(sizes, default=0) * compute_dtype(precision).itemsize


def most_copies(model: nn.Module, precision: Precision, device: Device) -> int:
    """Bytes of all dense copies that a CPU may keep (see `base.fastest`): in the compute dtype, and in float32."""
    if device != "cpu" or precision in ("float32", "int8"):
        return 0
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    narrow = compute_dtype(precision).itemsize
    return sum(m.in_features * m.out_features * (4 + (narrow if is_4bit(m) else 0)) for m in layers)
