"""Reads a model with transformers, and takes nothing but a whole one."""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from lora_rt.core.base import default, hub
from lora_rt.core.base.choices import Precision
from lora_rt.core.base.configuration import check_size, read_configuration
from lora_rt.core.base.precision import compute_dtype, quantization_config
from lora_rt.core.base.silence import libraries_silenced
from lora_rt.core.base.source import BaseError, BaseSource, first_line
from lora_rt.core.base.upstream import attention_of, forget_attention

UNREADABLE = (
    ValueError, OSError, LookupError, AttributeError, TypeError, RuntimeError, ImportError, ArithmeticError,
    AssertionError, struct.error, SafetensorError, StrictDataclassError,
)  # fmt: skip
"""What transformers raises for a folder or file that it can't make a model or a tokenizer of."""

_FETCH = "Fetch the model again, or check that transformers can load it"
_LOGGER = logging.getLogger("lora_rt.base")
_LORA = re.compile(r"\.lora_|\.base_layer\.")
_NO_ADAPTER = {"subfolder": "no-adapter-is-looked-for"}
"""transformers adds an adapter that lies beside a model to it, and then saves that adapter in place of the model."""


def _transformers() -> Any:
    """Imported for the first base: what exports is imported into processes of vLLM that may never ask for one."""
    import transformers

    return transformers


@contextmanager
def readable(told: str, next_step: str = _FETCH) -> Iterator[None]:
    """Raise a BaseError of what in its body is `UNREADABLE`; `told` says of what, and in which way it is."""
    try:
        yield
    except UNREADABLE as error:
        raise BaseError(f"{told}: {first_line(error)}", next_step=next_step) from error


def whole_model(where: Any, **arguments: Any) -> Any:
    """The causal language model of a folder.

    Code that comes with a model is never run, pickles are never opened, and an adapter that lies beside the model
    is not looked at. transformers fills weights that it does not find with random numbers and a warning: here that
    is an error; and it passes over those that its model has no place for, which would then be another one.

    Raises:
        BaseError: weights are missing, or no layer takes them. One of `UNREADABLE`: it is no model.
    """
    auto = _transformers()
    kind: Any = auto.AutoModelForCausalLM
    if "gguf_file" not in arguments:
        arguments["use_safetensors"] = True
        config = auto.AutoConfig.from_pretrained(where, trust_remote_code=False)
        check_size(Path(where), config)
        kind = auto_class(config)
        if attention_of(config) not in (None, "eager", "sdpa"):
            forget_attention(config)  # that of who saved it, which may not be installed here
            arguments["config"] = config
    model, report = kind.from_pretrained(
        where, trust_remote_code=False, output_loading_info=True, adapter_kwargs=_NO_ADAPTER, **arguments
    )
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"]) + _misshapen(model)
    if missing:
        text = f"{len(missing)} weights of {arguments.get('gguf_file', where)} are missing or have another shape"
        raise BaseError(text, problems=missing[:20], next_step=_next_step(report["unexpected_keys"]))
    if "gguf_file" not in arguments:
        _check_unused(model, sorted(report["unexpected_keys"]), where)
    return model


def _check_unused(model: Any, keys: Sequence[str], where: Any) -> None:
    """Raises BaseError for weights that belong to a layer of the model, which computes without them.

    Other ones that nothing reads are named in the log: heads that guess further tokens, say, which many files have.
    """
    layers = {name for name, module in model.named_modules() if getattr(module, "weight", None) is not None}
    layers |= {name.removeprefix(f"{model.base_model_prefix}.") for name in layers}
    of_layers = [key for key in keys if key.rpartition(".")[0] in layers or _LORA.split(key)[0] in layers]
    if of_layers:
        text = f"weights of {where} belong to layers that have no such weights by its config.json"
        raise BaseError(text, problems=of_layers[:20], next_step=_next_step(of_layers))
    if keys:
        named = ", ".join(keys[:3]) + (" and others" if len(keys) > 3 else "")
        _LOGGER.warning("nothing reads these weights of %s: %s", where, named)


def _next_step(unused: Iterable[str]) -> str:
    adapted = any(_LORA.search(key) for key in unused)
    return "Merge the adapter that is saved in it into the model" if adapted else "Fetch the whole model again"


def auto_class(config: Any) -> Any:
    """The class of transformers' that makes a causal language model of a configuration.

    Models that see know several: of those that transformers does not count among the causal ones (LLaVA, Qwen2-VL,
    Mistral 3), the whole model is taken, whose text part speaks as well without an image.
    """
    auto = _transformers()
    known = auto.models.auto.modeling_auto
    sees = type(config) in known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if sees and type(config) not in known.MODEL_FOR_CAUSAL_LM_MAPPING and not config.is_encoder_decoder:
        return auto.AutoModelForImageTextToText
    return auto.AutoModelForCausalLM


def config_alone(source: BaseSource) -> Any:
    """transformers' configuration of a base, of which nothing else is fetched, converted or loaded.

    Raises:
        BaseError: there is none, it can't be fetched, or transformers can't read it.
    """
    what = f"the configuration of {source.text} can't be read"
    with libraries_silenced(), readable(what, "Give a causal language model that transformers knows"):
        if source.kind == "default":
            return _transformers().LlamaConfig(**default.CONFIG)
        if source.kind == "gguf":
            assert source.path is not None
            return _transformers().AutoConfig.from_pretrained(source.path.parent, gguf_file=source.path.name)
        folder = hub.fetch_config(source) if source.path is None else source.path
        read_configuration(folder)
        return _transformers().AutoConfig.from_pretrained(folder, trust_remote_code=False)


def whole_tokenizer(where: Any, **arguments: Any) -> Any:
    """The tokenizer of a folder.

    Raises:
        BaseError: there is none, or it is broken.
    """
    try:
        return _transformers().AutoTokenizer.from_pretrained(where, trust_remote_code=False, **arguments)
    except Exception as error:  # the tokenizers library raises no other kind
        if "gguf_file" not in arguments and not any(map(_is_of_a_tokenizer, Path(where).iterdir())):
            step = "Put those of the model that it was made of into it: tokenizer.json, tokenizer_config.json"
            raise BaseError(f"{where} has no files of a tokenizer", next_step=step) from error
        text = f"the tokenizer of {arguments.get('gguf_file', where)} can't be read: {first_line(error)}"
        raise BaseError(text, next_step=_how_to_read(where)) from error


def model_and_tokenizer(where: Path, precision: Precision, told: str, **file: Any) -> tuple[Any, Any]:
    """Both of a folder, or of the GGUF file in it that is the `file`; the model is quantized while it is loaded.

    Raises:
        BaseError: with what is `told`, or what `whole_model` says.
    """
    how = quantization_config(precision)
    quantized = {} if how is None else {"quantization_config": how}
    with readable(told, "Fetch it again, or give a folder" if file else _FETCH):
        model = whole_model(where, dtype=compute_dtype(precision), **quantized, **file)
        return model, whole_tokenizer(where, **file)


def _is_of_a_tokenizer(file: Path) -> bool:
    """Whether a file of a model's folder may hold the words of a tokenizer."""
    return file.name.startswith(("tokenizer.", "vocab.")) or file.suffix in (".model", ".tiktoken", ".vocab")


def _how_to_read(where: Any) -> str:
    """What a tokenizer that can't be read lacks: the files of sentencepiece and tiktoken need those to be converted."""
    absent = [name for name in ("sentencepiece", "tiktoken") if find_spec(name) is None]
    if absent and not Path(where, "tokenizer.json").exists() and any(Path(where).glob("*.model")):
        return f"Install what reads such files with: pip install {' '.join(absent)}"
    return "Fetch the model again"


def _misshapen(model: Any) -> list[str]:
    """Linear layers whose weights have another shape than they say: those that are quantized are not checked before.

    Or no scales: transformers reads some layers of bitsandbytes (in convolutions) back as bare whole numbers.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            state = getattr(module.weight, "quant_state", None)
            shape = tuple(module.weight.shape if state is None else state.shape)
            if shape != (module.out_features, module.in_features):
                found.append(f"{name}: {shape}, should be {(module.out_features, module.in_features)}")
            elif type(module).__name__ == "Linear8bitLt" and type(module.weight) is nn.Parameter:
                found.append(f"{name}: its weight has no scales")
    return found
