"""Loads a prepared base: weights, tokenizer, and the facts about it that everybody else needs."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_rt.core.base.bounded import hold_to_limits
from lora_rt.core.base.choices import QUANTIZED, Precision, check_precision
from lora_rt.core.base.fused import pack_experts
from lora_rt.core.base.packed import fit_to_model, remark
from lora_rt.core.base.precision import choose_device, compute_dtype, quantization_config
from lora_rt.core.base.prepare import PreparedBase, prepare_base
from lora_rt.core.base.progress import step
from lora_rt.core.base.reading import UNREADABLE, whole_model, whole_tokenizer
from lora_rt.core.base.repacking import forbid_repacking, forbid_uneven_repacking
from lora_rt.core.base.shape import blocks_of, heads_of, vocabulary_of, width_of
from lora_rt.core.base.silence import libraries_silenced
from lora_rt.core.base.source import BaseError, first_line, parse_base
from lora_rt.plugins.contract import BaseFacts
from lora_rt.registry.card import BaseIdentity

_LOGGER = logging.getLogger("lora_rt.base")


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """The model in memory (eval mode, frozen), its tokenizer, and what it is.

    `precision` is one of ours, or in words what others have quantized it to. `give_back` undoes what was done to a
    model that is a caller's; one that we loaded is ours. What trying it has shown is remembered under the name
    `remembered_as`, where it has one.
    """

    model: Any
    tokenizer: Any
    identity: BaseIdentity
    facts: BaseFacts
    folder: Path
    precision: str
    device: torch.device
    dtype: torch.dtype
    give_back: Callable[[], None] = field(default=lambda: None)
    remembered_as: str | None = None

    def digest(self) -> str:
        """The sha256 of every parameter, buffer and quantization scale as it lies in memory.

        Not of `state_dict()`: asking bitsandbytes for that repacks 4-bit weights.
        """
        total = hashlib.sha256()
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers(), *scales(self.model)]:
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            for part in plain_parts(tensor.detach()):
                total.update(part.reshape(-1).contiguous().view(torch.uint8).cpu().numpy().tobytes())
        return total.hexdigest()


def plain_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that a tensor consists of: torchao keeps a weight as several. Of what is kept elsewhere, none."""
    if tensor.device.type == "meta":
        return
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_parts(getattr(tensor, name))
    else:
        yield tensor


def scales(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """bitsandbytes keeps the scales of its weights beside them, neither as parameters nor as buffers."""
    for name, module in model.named_modules():
        found: dict[str, object] = {}
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        while state is not None:  # int4; the scales are quantized themselves
            found |= {f"{len(found)}.{key}": value for key, value in vars(state).items()}
            state = getattr(state, "state2", None)
        if (state8 := getattr(module, "state", None)) is not None:
            found["SCB"] = getattr(state8, "SCB", None)
        yield from ((f"{name}.{key}", value) for key, value in found.items() if isinstance(value, torch.Tensor))


def load_base(
    text: str = "default", precision: str = "int4", device: str = "auto", *, for_training: bool = False
) -> LoadedBase:
    """Load a base.

    Args:
        text: "default", a folder, a GGUF file, or a hub id with an optional @revision.
        precision: float32, bfloat16, float16, int8 or int4.
        device: "auto", "cpu", "cuda" or "cuda:N".
        for_training: keep 4-bit weights in the layout whose matmul has a gradient (see `forbid_repacking`).

    Raises:
        LoraRtError: with what to do next.
    """
    chosen = check_precision(precision)
    target = choose_device(device, chosen)
    prepared = prepare_base(parse_base(text), chosen)
    kept = prepared.foreign or chosen
    dtype: torch.dtype | None = compute_dtype(chosen)
    if prepared.foreign is not None:
        if for_training:
            text = f"{prepared.identity.id} is quantized by others ({kept}), and no adapter is trained over that"
            raise BaseError(text, next_step="Train over the dense model; the adapter can be used over this one")
        _LOGGER.info("%s is quantized by others (%s): loaded as it is", prepared.identity.id, kept)
        dtype = None
    with libraries_silenced(), step(f"loading {prepared.identity.id} ({kept})"):
        model, tokenizer = _read_kept(prepared, target, dtype, chosen)
        if prepared.foreign is not None and not getattr(model.config, "quantization_config", None):
            kept = f"{kept}, unpacked to {str(compute_dtype_of(model)).removeprefix('torch.')}"
        model.requires_grad_(False)
        model.eval()
        forbid_uneven_repacking(model)
        if for_training:
            forbid_repacking(model)
        elif kept == "int4":
            pack_experts(model)  # PEFT trains the parameters of experts, and has to find them
        if kept in QUANTIZED:
            fit_to_model(model)  # behind the above: it may run the model
    if (found := remark(model, kept)) is not None:
        _LOGGER.warning("%s is %s", prepared.identity.id, found)
    return LoadedBase(
        model=model,
        tokenizer=tokenizer,
        identity=prepared.identity,
        facts=base_facts(model, prepared.identity, kept),
        folder=prepared.folder,
        precision=kept,
        device=target,
        dtype=dtype or compute_dtype_of(model),
        remembered_as=f"{prepared.identity.digest} {kept} {target}",
    )


def compute_dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of a model's activations: that of its first weights of 16 or 32 bits."""
    floats = (p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1)
    return next(floats, torch.float32)


def _read_kept(
    prepared: PreparedBase, device: torch.device, dtype: torch.dtype | None, precision: Precision
) -> tuple[Any, Any]:
    """What was kept; some models can be quantized while they are loaded, and not be read again in that form."""
    try:
        return _read(prepared.folder, device, dtype, prepared.foreign)
    except BaseError as error:
        if prepared.dense is None or isinstance(error.__cause__, torch.OutOfMemoryError):
            raise
        reason = "%s can't be read from what is kept of it in %s: it is quantized anew at every start"
        _LOGGER.warning(reason, prepared.identity.id, precision)
        return _read(prepared.dense, device, dtype, None, quantization_config=quantization_config(precision))


def _read(
    folder: Path, device: torch.device, dtype: torch.dtype | None, foreign: str | None, **how: Any
) -> tuple[Any, Any]:
    hold_to_limits(folder)
    try:
        # HQQ takes no map of a CPU, which is where models are loaded anyway.
        place = {} if foreign is not None and device.type == "cpu" else {"device_map": {"": device}}
        model = whole_model(folder, dtype=dtype or "auto", **place, **how)
        tokenizer = whole_tokenizer(folder)
    except torch.OutOfMemoryError as error:
        text = f"{folder.name} does not fit into the memory of {device}"
        raise BaseError(text, next_step="Use --precision int4, or a smaller base") from error
    except UNREADABLE as error:
        if foreign is not None:
            text = f"{folder.name} is quantized by others ({foreign}), and can't be loaded on {device} here"
            ways = ("Install that, or give" if isinstance(error, ImportError) else "Give") + " a dense copy of it"
            raise BaseError(f"{text}: {first_line(error)}", next_step=ways) from error
        text = f"{folder} can't be loaded: {first_line(error)}"
        raise BaseError(text, next_step="Fetch the model again, or check that transformers can load it") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def base_facts(model: Any, identity: BaseIdentity, precision: str) -> BaseFacts:
    """The facts about a base: its blocks are counted in the model, which may be on the meta device."""
    heads, embeddings = heads_of(model.config), model.get_input_embeddings()
    return BaseFacts(
        id=identity.id,
        revision=identity.revision,
        digest=identity.digest,
        precision=precision,
        layers=len(blocks_of(model)),
        hidden_size=width_of(model.config) or int(embeddings.weight.shape[-1]),
        heads=heads.queries,
        kv_heads=heads.keys,
        head_dim=heads.size,
        vocab_size=vocabulary_of(model.config),
    )
