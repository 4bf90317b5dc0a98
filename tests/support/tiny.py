"""Tiny random models of eight architectures, random adapters written by PEFT, and the dense sum that both must equal.

The dense sum is PEFT's own delta of every module added to the weights of a model that transformers loaded: nothing of
the product is used to make it.
"""

from __future__ import annotations

import functools
import itertools
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_rt.core.base.byte_tokenizer import byte_tokenizer
from lora_rt.core.base.load import load_base
from lora_rt.core.runtime import Runtime
from lora_rt.plugins.manager import ModeHost, load_modes
from lora_rt.registry.card import AdapterCard, BaseIdentity, write_card
from lora_rt.registry.registry import Registry

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2", "opt", "gpt_neox")
_serial = itertools.count()
HIDDEN, LAYERS, HEADS, HEAD_SIZE, VOCAB = 64, 2, 4, 16, 264
EVEN = {"intermediate_size": 128}  # inputs of whole blocks of 64, which alone have a 4-bit kernel on a GPU
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<a>", "<b>", "<c>", "<d>"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TARGETS: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), ("q_proj", "k_proj", "v_proj", "o_proj")),
    "gpt2": ("c_attn", "c_proj"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "gpt_neox": ("query_key_value", "dense"),
}
MLP: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), ("gate_proj", "up_proj", "down_proj")),
    "gpt2": ("c_fc",),
    "opt": ("fc1", "fc2"),
    "gpt_neox": ("dense_h_to_4h", "dense_4h_to_h"),
}


def save_tokenizer(folder: Path, *, chat: bool = True) -> None:
    """A tokenizer whose tokens are bytes, and eight special ones."""
    fast = byte_tokenizer(SPECIAL, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    if chat:
        fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def config_of(architecture: str, **changes: Any) -> Any:
    """A configuration with hidden 64, two layers and four heads, over two key/value heads where the model has them."""
    import transformers as t

    tokens = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    common = tokens | {"tie_word_embeddings": False} | changes  # a tied random model says one token for ever
    usual = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 96,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
    }
    grouped = {**usual, "num_key_value_heads": 2, "head_dim": HEAD_SIZE}
    match architecture:
        case "llama":
            return t.LlamaConfig(**{**grouped, **common})
        case "mistral":
            return t.MistralConfig(**{**grouped, **common})
        case "qwen2":
            return t.Qwen2Config(**{**usual, "num_key_value_heads": 2, **common})
        case "qwen3":
            return t.Qwen3Config(**{**grouped, "head_dim": 24, **common})
        case "gemma":
            return t.GemmaConfig(**{**grouped, "num_key_value_heads": 1, "head_dim": 32, **common})
        case "gpt2":
            return t.GPT2Config(
                **{"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 256, "n_inner": 96}
                | {"initializer_range": 0.1}
                | common
            )
        case "opt":
            return t.OPTConfig(
                **{
                    "hidden_size": HIDDEN,
                    "word_embed_proj_dim": HIDDEN,
                    "num_hidden_layers": LAYERS,
                    "num_attention_heads": HEADS,
                    "ffn_dim": 96,
                    "max_position_embeddings": 256,
                    "init_std": 0.1,
                    **common,
                }
            )
        case "gpt_neox":
            return t.GPTNeoXConfig(**{**usual, **common})
    raise ValueError(architecture)


def random_model(config: Any, seed: int = 0) -> Any:
    """A model with random weights, biases and norms included, in float32."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model.eval()


def save_adapter(folder: Path, config: Any, *, targets: Sequence[str], seed: int = 0, **options: Any) -> Path:
    """A random adapter as PEFT writes it. `options` are those of PEFT's LoraConfig."""
    from peft import LoraConfig, get_peft_model

    if config.model_type == "gpt2":
        options["fan_in_fan_out"] = True
    settings = LoraConfig(
        **{"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM", **options, "target_modules": [*targets]}
    )
    with _peft_is_quiet():
        adapted = get_peft_model(random_model(config), settings)
        torch.manual_seed(1000 + seed)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.05)
        adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def peft_model(base: Path, adapter: Path) -> Any:
    """The base under one adapter, by PEFT alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with _peft_is_quiet():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return PeftModel.from_pretrained(model, adapter).eval()


class _peft_is_quiet(warnings.catch_warnings):  # a context manager, used like a function
    """PEFT warns of adapters over tied output heads and of biases without a base's; both are meant here."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")


Delta = dict[str, tuple[Tensor, Tensor | None]]


@functools.lru_cache(maxsize=64)
def deltas(base: Path, adapter: Path) -> Delta:
    """Module -> PEFT's change of its weight (out, in), and of its bias (out,) or None."""
    from peft.tuners.lora import LoraLayer

    found: Delta = {}
    for name, module in peft_model(base, adapter).named_modules():
        if isinstance(module, LoraLayer):
            weight = module.get_delta_weight("default").detach()
            bias = module.lora_B["default"].bias
            scaled = None if bias is None else bias.detach() * module.scaling["default"]
            transposed = type(module.get_base_layer()).__name__ == "Conv1D"
            found[name.removeprefix("base_model.model.")] = (weight.T if transposed else weight, scaled)
    return found


def dense_model(base: Path, terms: Sequence[tuple[Path, float]]) -> Any:
    """The model whose weights are W + sum_k w_k s_k B_k A_k."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        for adapter, weight in terms:
            for name, (change, bias) in deltas(base, adapter).items():
                module = model.get_submodule(name)
                if any(module.weight is p for p in model.get_input_embeddings().parameters()):
                    module.weight = torch.nn.Parameter(module.weight.clone())  # a tied head changes, not the embedding
                module.weight += weight * (change.T if type(module).__name__ == "Conv1D" else change)
                if bias is not None:
                    old = 0 if module.bias is None else module.bias
                    module.bias = torch.nn.Parameter(old + weight * bias)
    return model


def dense_logits(base: Path, terms: Sequence[tuple[Path, float]], ids: Tensor) -> Tensor:
    """Its logits of unpadded rows, (rows, tokens, vocab)."""
    with torch.inference_mode():
        logits: Tensor = dense_model(base, terms)(input_ids=ids).logits
    return logits


def some_ids(rows: int = 1, tokens: int = 9, seed: int = 0) -> Tensor:
    """Random tokens, none of them special, (rows, tokens)."""
    return torch.randint(len(SPECIAL), VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def mode_host(**hooks_by_mode: Any) -> ModeHost:
    """The installed modes, and modes made of the functions of classes: `mode_host(gated=Gated)`."""
    import sys
    from importlib.metadata import EntryPoint, entry_points

    points = list(entry_points(group="lora_rt.modes"))
    for mode, hooks in hooks_by_mode.items():
        # A module is imported when a hook is first needed: one name for two hosts would give one the other's hooks.
        module: Any = type(sys)(f"tests_mode_{mode}_{next(_serial)}")
        module.LORA_RT_API = 1
        for name, value in vars(hooks).items():
            if name.startswith("lora_rt_"):
                setattr(module, name, value)
        sys.modules[module.__name__] = module
        points.append(EntryPoint(mode, module.__name__, "lora_rt.modes"))
    return load_modes(points)


@dataclass
class Zoo:
    """Models, adapters and runtimes in one temporary folder, each made when first asked for."""

    folder: Path
    _made: dict[str, Any] = field(default_factory=dict)

    def base(self, architecture: str, *, chat: bool = True, **changes: Any) -> Path:
        """The folder of a model."""
        key = json.dumps([architecture, chat, changes], sort_keys=True, default=str)
        if key not in self._made:
            folder = self.folder / f"{architecture}-{len(self._made)}"
            random_model(config_of(architecture, **changes)).save_pretrained(folder)
            save_tokenizer(folder, chat=chat)
            self._made[key] = folder
        return Path(self._made[key])

    def adapter(
        self, architecture: str, *, mode: str | None = None, changes: Mapping[str, Any] | None = None, **options: Any
    ) -> Path:
        """The folder of an adapter for that architecture, with `changes` of its configuration."""
        options = {"targets": TARGETS[architecture], **options}
        key = json.dumps(["adapter", architecture, mode, changes, options], sort_keys=True, default=str)
        if key not in self._made:
            folder = self.folder / f"adapter-{len(self._made)}"
            save_adapter(folder, config_of(architecture, **(changes or {})), **options)
            if mode is not None:
                base = BaseIdentity(id=self.base(architecture, **(changes or {})).name, revision=None, digest="")
                write_card(folder, AdapterCard(register=mode, mode=mode, base=base))
            self._made[key] = folder
        return Path(self._made[key])

    def runtime(
        self, architecture: str, precision: str = "float32", *, fresh: bool = False, device: str = "cpu", **changes: Any
    ) -> Runtime:
        """A runtime over that model, shared by all who ask for the same, unless it is to be fresh."""
        base = self.base(architecture, **changes)
        key = f"runtime {base} {precision} {device}"
        if fresh or key not in self._made:
            made = Runtime.load(str(base), precision=precision, device=device, project=self.folder)
            if fresh:
                return made
            self._made[key] = made
        found: Runtime = self._made[key]
        return found

    def runtime_with(
        self, hosts: ModeHost, architecture: str, precision: str = "float32", *, device: str = "cpu", **changes: Any
    ) -> Runtime:
        """A fresh runtime whose modes are these."""
        base = load_base(str(self.base(architecture, **changes)), precision, device)
        return Runtime(base, hosts, Registry(project=self.folder))

    def load(self, runtime: Runtime, adapter: Path) -> str:
        """Make an adapter resident under its folder's name."""
        return adapter.name if adapter.name in runtime.adapters else runtime.load_adapter(str(adapter))


def spec(terms: Sequence[tuple[Path, float]]) -> str:
    """The text of a composition of resident adapters."""
    return " ".join(f"{adapter.name}:{weight!r}" for adapter, weight in terms)
