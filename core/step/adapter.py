"""PEFT's side of a run: a fresh LoRA on the loaded base, and the adapter directory that comes out of it."""

from __future__ import annotations

import copy
import logging
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from lora_rt.core.base.load import LoadedBase
from lora_rt.core.base.roles import ALL_LINEAR, as_peft_takes_them, resolved
from lora_rt.core.base.silence import libraries_silenced
from lora_rt.core.base.source import first_line
from lora_rt.core.engine.experts import find_parameters
from lora_rt.core.engine.topology import find_linears, shapes_of
from lora_rt.core.step.settings import SettingsError, TrainSettings
from lora_rt.registry.card import AdapterCard, BaseIdentity, StateTensor, write_card
from lora_rt.registry.durable import new_folder
from lora_rt.registry.files import STATE, WEIGHTS, weights_in

_LOGGER = logging.getLogger("lora_rt.training")
_MAMBAS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")  # as PEFT lists them


def fresh_adapter(base: LoadedBase, settings: TrainSettings) -> Any:
    """The base with a new adapter (a PeftModel); B starts at zero, so its first outputs are the base's."""
    torch.manual_seed(settings.seed)
    return with_adapter(base.model, settings)


def adaptable(model: Any) -> dict[str, nn.Module]:
    """Name -> module of the linear layers that `--target-modules` can mean.

    All but the output head, and but those that PEFT refuses in a Mamba, whose fast kernel reads their weights alone.
    """
    head = model.get_output_embeddings()
    refused = ("out_proj",) if model.config.model_type in _MAMBAS else ()
    linears = find_linears(model)
    return {n: m for n, m in linears.items() if m is not head and n.rsplit(".", 1)[-1] not in refused}


def targets(model: Any, wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    """The full names of the layers, and of the parameters of fused experts, that targets mean.

    Raises:
        TargetError: a target that the model has nothing for.
    """
    layers = list(adaptable(model))
    # "all-linear" is what PEFT makes of it, which adds the experts of some architectures by itself.
    fused = [] if ALL_LINEAR in wanted else [name for name, one in find_parameters(model).items() if one.experts]
    chosen = resolved(wanted, [*layers, *fused])
    return [name for name in chosen if name not in fused], [name for name in chosen if name in fused]


@libraries_silenced()
def with_adapter(model: Any, settings: TrainSettings, *, quietly: bool = False) -> Any:
    """The model with a new adapter in it; works on the meta device as well.

    Raises:
        SettingsError: there can't be one on these layers.
    """
    layers, parameters = targets(model, settings.target_modules)
    everything = [name for name, _ in model.named_modules()]
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        target_modules=as_peft_takes_them(layers, everything),
        target_parameters=parameters or None,
        lora_dropout=settings.dropout,
        bias="none",
        fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in adaptable(model).values()),
        task_type=TaskType.CAUSAL_LM,
    )
    try:
        if config.lora_dropout and _reaches_experts(model, config):
            if not quietly:
                _LOGGER.warning("fused experts can't be trained with dropout: it is left out (--dropout 0)")
            config.lora_dropout = 0.0
        with warnings.catch_warnings():  # of patterns that it has made itself, for experts of old files
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys")
            made = get_peft_model(model, config)
    except (ValueError, NotImplementedError) as error:  # it refuses layers by either, the latter perhaps without a word
        text = f"PEFT can't put an adapter on these layers: {first_line(error)[:300]}"
        raise SettingsError(text, next_step="Name other layers with --target-modules") from error
    # Nobody could load what is trained there: better said now than after the training.
    strange = [name for name in made.base_model.targeted_parameter_names if name not in shapes_of(model)]
    if strange:
        text = f"{type(model).__name__} runs its experts in its own way: adapters of {strange[0]} are not composed"
        raise SettingsError(text, next_step="Train its attention alone: --target-modules attention")
    return made


def _reaches_experts(model: Any, config: LoraConfig) -> bool:
    """Whether PEFT will adapt parameters: it takes the names of old experts for the fused ones of today."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    tried = copy.copy(config)
    convert_peft_config_for_transformers(tried, model=model, conversions=None)
    return bool(tried.target_parameters)


def checkpointed(model: Any) -> None:
    """Let every block keep its input alone and run again in the backward pass.

    Raises:
        SettingsError: the model can't.
    """
    base = model.get_base_model()
    if not base.supports_gradient_checkpointing:
        text = f"{type(base).__name__} has no gradient checkpointing"
        raise SettingsError(text, next_step="Use --no-gradient-checkpointing and a smaller --batch-size")
    base.activation_checkpointing_enable({"use_reentrant": False})
    # transformers asks for the embeddings' gradients too, which only the reentrant kind of checkpoint needs.
    base.disable_input_require_grads()


def write_adapter(model: Any, base: BaseIdentity, state: nn.Module | None, folder: Path) -> None:
    """Write adapter_config.json, adapter_model.safetensors (bfloat16) and, for a mode with state, mode.safetensors."""
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    # Only here: while it trains, PEFT looks a hub id up on the Hub at every checkpoint.
    config.base_model_name_or_path = base.id
    config.revision = base.revision
    config.save_pretrained(folder)
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file(
        {k: v.bfloat16().contiguous() for k, v in tensors.items()},
        folder / WEIGHTS,
        {"format": "pt"},
    )
    if state is not None:
        save_file({k: v.contiguous() for k, v in state.state_dict().items()}, folder / STATE)


def described_state(folder: Path) -> dict[str, StateTensor]:
    """What the card says of the adapter's mode.safetensors, tensor by tensor; empty where there is none."""
    if not (folder / STATE).exists():
        return {}
    with safe_open(folder / STATE, framework="pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return {key: StateTensor(dtype=s.get_dtype(), shape=tuple(s.get_shape())) for key, s in slices.items()}


def copy_adapter(source: Path, card: Mapping[str, Any], state: Mapping[str, torch.Tensor], out: Path) -> None:
    """Write an adapter's weights into a new folder, with another card and another state of its mode."""
    with new_folder(out) as folder:
        for name in weights_in(source):
            shutil.copyfile(source / name, folder / name)
        if state:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / STATE)
        write_card(folder, AdapterCard.model_validate({**card, "state": described_state(folder)}))
