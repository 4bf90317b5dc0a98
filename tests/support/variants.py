"""Adapters of every kind that PEFT writes, and what becomes of each: exact, refused, or wrong.

The oracle is PEFT's model in memory, never one that was read back from a file. Run as a program it prints the table:

    python -m support.variants          (in tests/)
    python -m support.variants --write  keeps what was found, of which the table in tests/runtime/variants.md is made
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_rt.errors import LoraRtError
from lora_rt.registry.files import CONFIG, WEIGHTS
from support.tiny import Zoo, some_ids

IDS = some_ids(rows=2)
_NEAR = 2e-4


@dataclass(frozen=True)
class Variant:
    """One adapter: options of PEFT's LoraConfig, the base, what a trainer has done to the folder, what converts it."""

    options: Mapping[str, Any] = field(default_factory=dict)
    architecture: str = "llama"
    changes: Mapping[str, Any] = field(default_factory=dict)
    edit: Callable[[Path], None] | None = None
    convert: bool = False


def _config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        found = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(found | changes))

    return edit


def _without(*names: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        found = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({key: value for key, value in found.items() if key not in names}))

    return edit


def _keys(rename: Callable[[str], str]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        found = {rename(key): value for key, value in load_file(folder / WEIGHTS).items()}
        save_file(found, folder / WEIGHTS, {"format": "pt"})

    return edit


def _as_bin(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def _in_parts(folder: Path) -> None:
    found = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    for number in (0, 1):
        part = {key: found[key] for key in sorted(found)[number::2]}
        save_file(part, folder / f"adapter_model-0000{number + 1}-of-00002.safetensors", {"format": "pt"})


def _with_an_index(folder: Path) -> None:
    _in_parts(folder)
    places = {key: part.name for part in folder.glob("adapter_model-*.safetensors") for key in load_file(part)}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def _checkpoint(folder: Path) -> None:
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json", "latest"):
        (folder / name).write_bytes(b"{}")
    (folder / "global_step10").mkdir()


def _made() -> dict[str, Variant]:
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    tied = {"tie_word_embeddings": True}
    found = {
        "attention": Variant({"target_modules": attention}),
        "q, v": Variant({"target_modules": ["q_proj", "v_proj"]}),
        "mlp": Variant({"target_modules": ["gate_proj", "up_proj", "down_proj"]}),
        "all-linear": Variant({"target_modules": "all-linear"}),
        "a pattern": Variant({"target_modules": r".*\.layers\.\d+\.self_attn\.(q|v)_proj"}),
        "a lookahead": Variant({"target_modules": r"^(?!.*visual).*(q_proj|v_proj)$"}),
        "whole paths": Variant({"target_modules": ["model.layers.0.self_attn.q_proj"]}),
        "with the head": Variant({"target_modules": ["q_proj", "lm_head"]}),
        "with a tied head": Variant({"target_modules": ["q_proj", "lm_head"]}, changes=tied),
        "with the embedding": Variant({"target_modules": ["q_proj", "embed_tokens"]}),
        "with a tied embedding": Variant({"target_modules": ["q_proj", "embed_tokens"]}, changes=tied),
        "the embedding alone": Variant({"target_modules": ["embed_tokens"]}),
        "embedding and head": Variant({"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
        "a scaled embedding": Variant({"target_modules": ["q_proj", "embed_tokens"]}, "gemma"),
        "an embedding of GPT-2": Variant({"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}, "gpt2"),
        "an embedding, tied by force": Variant(
            {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, changes=tied
        ),
        "an embedding of positions": Variant({"target_modules": ["c_attn", "wpe"], "fan_in_fan_out": True}, "gpt2"),
        "negative alpha": Variant({"lora_alpha": -8, "alpha_pattern": {"v_proj": -3}}),
        "negative alpha, rank-stabilised": Variant({"lora_alpha": -8, "use_rslora": True}),
        "DoRA, negative alpha": Variant({"use_dora": True, "lora_alpha": -4}),
        "Conv1D": Variant({"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, "gpt2"),
        "Conv1D, said otherwise": Variant({"target_modules": ["c_attn", "c_fc"]}, "gpt2"),
        "rank-stabilised": Variant({"use_rslora": True}),
        "ranks": Variant({"rank_pattern": {"v_proj": 3}}),
        "alphas": Variant({"alpha_pattern": {"v_proj": 5}}),
        "ranks, alphas, rank-stabilised": Variant(
            {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}, "use_rslora": True}
        ),
        "ranks and alphas by patterns": Variant(
            {
                "target_modules": attention,
                "rank_pattern": {r"self_attn\.(q|k)(_proj)?": 2},
                "alpha_pattern": {
                    r"(?!.*v_proj)(model\.)?layers\.0\.": 3,
                    r"layers\.(?:1[0-9]|[0-9])\.[^.]+\.\w_proj": 5,
                },
            }
        ),
        "layers": Variant({"layers_to_transform": [1], "target_modules": attention}),
        "layers by a pattern": Variant({"layers_to_transform": [0], "layers_pattern": "(model.layers|h)"}),
        "one layer": Variant({"layers_to_transform": 0, "layers_pattern": "layers"}),
        "excluded": Variant({"target_modules": attention, "exclude_modules": ["k_proj"]}),
        "excluded by a pattern": Variant({"target_modules": attention, "exclude_modules": r".*\.0\..*k_proj"}),
        "bias of lora": Variant({"lora_bias": True}),
        "bias of lora, rank-stabilised": Variant({"lora_bias": True, "use_rslora": True}),
        "gaussian": Variant({"init_lora_weights": "gaussian"}),
        "orthogonal": Variant({"init_lora_weights": "orthogonal"}),
        "random": Variant({"init_lora_weights": False}),
        "eva": Variant(edit=_config(init_lora_weights="eva", eva_config={"rho": 2.0})),
        "alpha of a fraction": Variant({"lora_alpha": 3}),
        "rank 1": Variant({"r": 1}),
        "a large rank": Variant({"r": 48}),
        "unequal sizes": Variant({"target_modules": ["up_proj", "k_proj"], "r": 5}),
        "DoRA": Variant({"use_dora": True}),
        "DoRA of all layers": Variant({"use_dora": True, "target_modules": "all-linear"}),
        "DoRA, rank-stabilised": Variant({"use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 2}}),
        "DoRA over biases": Variant({"use_dora": True}, "qwen2"),
        "DoRA of Conv1D": Variant({"use_dora": True, "target_modules": ["c_attn"], "fan_in_fan_out": True}, "gpt2"),
        "DoRA with the head": Variant({"use_dora": True, "target_modules": ["q_proj", "lm_head"]}),
        "DoRA of the embedding": Variant({"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]}),
        "DoRA of the MLP": Variant({"use_dora": True, "target_modules": ["down_proj"]}),
        "all biases of a base without": Variant({"bias": "all"}),
        "its biases of a base without": Variant({"bias": "lora_only"}),
        "all biases": Variant({"bias": "all"}, "qwen2"),
        "biases of adapted layers": Variant({"bias": "lora_only"}, "qwen2"),
        "all biases of GPT-2": Variant({"bias": "all", "target_modules": ["c_attn"], "fan_in_fan_out": True}, "gpt2"),
        "biases of GPT-2's layers": Variant(
            {"bias": "lora_only", "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}, "gpt2"
        ),
        "all biases of OPT": Variant({"bias": "all"}, "opt"),
        "all biases of GPT-NeoX": Variant({"bias": "all", "target_modules": ["query_key_value"]}, "gpt_neox"),
        "token rows": Variant({"trainable_token_indices": [9, 11, 40]}),
        "token rows, tied": Variant({"trainable_token_indices": [9, 11, 40]}, changes=tied),
        "token rows by name": Variant({"trainable_token_indices": {"embed_tokens": [9, 17]}}),
        "token rows of the head": Variant({"trainable_token_indices": {"embed_tokens": [9], "lm_head": [9]}}),
        "token rows of a scaled embedding": Variant({"trainable_token_indices": [9, 11]}, "gemma"),
        "token rows of GPT-2": Variant(
            {"trainable_token_indices": {"wte": [9, 11]}, "target_modules": ["c_attn"], "fan_in_fan_out": True}, "gpt2"
        ),
        "token rows and all layers": Variant({"trainable_token_indices": [20], "target_modules": "all-linear"}),
        "token rows and DoRA": Variant({"trainable_token_indices": [20], "use_dora": True}),
        "a whole head": Variant({"modules_to_save": ["lm_head"]}),
        "a whole head, tied": Variant({"modules_to_save": ["lm_head"]}, changes=tied),
        "a whole embedding": Variant({"modules_to_save": ["embed_tokens"]}),
        "a whole embedding, tied": Variant({"modules_to_save": ["embed_tokens"]}, changes=tied),
        "embedding and head whole": Variant({"modules_to_save": ["embed_tokens", "lm_head"]}),
        "embedding and head whole, tied": Variant({"modules_to_save": ["embed_tokens", "lm_head"]}, changes=tied),
        "whole norms": Variant({"modules_to_save": ["input_layernorm", "norm"]}),
        "whole norms of Gemma": Variant({"modules_to_save": ["norm"]}, "gemma"),
        "whole MLPs": Variant({"target_modules": "all-linear", "modules_to_save": ["mlp"]}),
        "whole norms and all biases": Variant({"modules_to_save": ["norm"], "bias": "all"}, "opt"),
        "whole, tied by force": Variant({"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, changes=tied),
        "a head, tied by force": Variant(
            {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}, changes=tied
        ),
        "whole norms of GPT-2": Variant(
            {"modules_to_save": ["ln_f"], "target_modules": ["c_attn"], "fan_in_fan_out": True}, "gpt2"
        ),
        "a whole layer": Variant({"modules_to_save": ["down_proj"]}),
        "a whole head, DoRA": Variant({"modules_to_save": ["lm_head"], "use_dora": True}),
        "a whole head, all layers": Variant({"modules_to_save": ["lm_head"], "target_modules": "all-linear"}),
        "PiSSA": Variant({"init_lora_weights": "pissa"}),
        "PiSSA, converted": Variant({"init_lora_weights": "pissa"}, convert=True),
        "PiSSA, rank-stabilised, converted": Variant({"init_lora_weights": "pissa", "use_rslora": True}, convert=True),
        "PiSSA of a compiled model, converted": Variant(
            {"init_lora_weights": "pissa", "target_modules": ["q_proj", "embed_tokens"]},
            edit=_keys(lambda key: f"_orig_mod.{key}"),
            convert=True,
        ),
        "PiSSA of some steps": Variant({"init_lora_weights": "pissa_niter_4"}),
        "OLoRA": Variant({"init_lora_weights": "olora"}),
        "OLoRA, converted": Variant({"init_lora_weights": "olora"}, convert=True),
        "CorDA": Variant(edit=_config(init_lora_weights="corda", corda_config={})),
        "LoRA-GA": Variant(edit=_config(init_lora_weights="lora_ga", lora_ga_config={})),
        "LoftQ": Variant(edit=_config(init_lora_weights="loftq", loftq_config={"loftq_bits": 4})),
        "aLoRA": Variant({"alora_invocation_tokens": IDS[0, -3:-1].tolist()}),
        "aLoRA of a text that is not there": Variant({"alora_invocation_tokens": [40, 41, 42]}),
        "aLoRA of all layers": Variant(
            {"alora_invocation_tokens": IDS[1, 2:4].tolist(), "target_modules": "all-linear", "use_rslora": True}
        ),
        "more layers": Variant({"layer_replication": [[0, 2], [1, 2]]}),
        "bare parameters": Variant(edit=_config(target_parameters=["mlp.experts.gate_up_proj"])),
        "weights of linear layers": Variant({"target_modules": ["k_proj"], "target_parameters": ["q_proj.weight"]}),
        "the weight of a head": Variant({"target_modules": [], "target_parameters": ["lm_head.weight"]}),
        "weights of Conv1D": Variant({"target_modules": [], "target_parameters": ["attn.c_proj.weight"]}, "gpt2"),
        "Arrow": Variant(edit=_config(arrow_config={"top_k": 2})),
        "X-LoRA": Variant(edit=_config(peft_type="XLORA")),
        "IA3": Variant(edit=_config(peft_type="IA3")),
        "QA-LoRA": Variant(edit=_config(use_qalora=True)),
        "a field of the future": Variant(edit=_config(new_thing=True)),
        "without r and alpha": Variant({"r": 8, "lora_alpha": 8}, edit=_without("r", "lora_alpha")),
        "pickled": Variant(edit=_as_bin),
        "pickled, converted": Variant(edit=_as_bin, convert=True),
        "DoRA, pickled, converted": Variant({"use_dora": True}, edit=_as_bin, convert=True),
        "in parts": Variant(edit=_in_parts),
        "in parts with an index": Variant(edit=_with_an_index),
        "of a checkpoint of Trainer": Variant(edit=_checkpoint),
        "of FSDP over checkpointed blocks": Variant(
            edit=_keys(
                lambda key: key.replace("self_attn.", "_checkpoint_wrapped_module.self_attn.").replace(
                    "base_model.model.", "base_model.model._fsdp_wrapped_module."
                )
            )
        ),
        "of a part with a name of its own": Variant(
            edit=_keys(lambda key: key.replace("model.model.layers", "model.text_model.layers"))
        ),
        "MiSS": Variant(edit=_config(peft_type="MISS")),
        "a whole block": Variant({"modules_to_save": ["layers.1"], "target_modules": ["layers.0.self_attn.q_proj"]}),
        "whole positions of GPT-2": Variant(
            {"modules_to_save": ["wpe"], "target_modules": ["c_attn"], "fan_in_fan_out": True}, "gpt2"
        ),
        "token rows of positions": Variant(
            {"trainable_token_indices": {"wpe": [0, 3]}, "target_modules": ["c_attn"], "fan_in_fan_out": True}, "gpt2"
        ),
        "everything of GPT-2, rank-stabilised": Variant(
            {
                "target_modules": ["c_attn", "c_fc", "c_proj", "wte", "wpe"],
                "fan_in_fan_out": True,
                "use_rslora": True,
            },
            "gpt2",
        ),
        "everything of GPT-NeoX": Variant({"target_modules": ["query_key_value", "embed_in", "embed_out"]}, "gpt_neox"),
        "DoRA of all layers of OPT, all biases": Variant(
            {"target_modules": "all-linear", "use_dora": True, "bias": "all"}, "opt"
        ),
        "DoRA of all layers of GPT-NeoX": Variant({"target_modules": "all-linear", "use_dora": True}, "gpt_neox"),
        "DoRA with a tied head": Variant({"use_dora": True, "target_modules": ["q_proj", "lm_head"]}, changes=tied),
        "all-linear, some excluded by a pattern": Variant(
            {"target_modules": "all-linear", "exclude_modules": r".*layers\.0\..*"}
        ),
        "ends of paths": Variant({"target_modules": ["self_attn.q_proj", "layers.1.mlp.down_proj"]}),
        "alphas, one of them 0": Variant({"alpha_pattern": {"v_proj": 0}, "lora_alpha": 12.5}),
        "without a prefix": Variant(edit=_keys(lambda key: key.removeprefix("base_model.model."))),
        "with the adapter's name": Variant(edit=_keys(lambda key: key.replace(".weight", ".default.weight"))),
        "of FSDP": Variant(edit=_keys(lambda key: key.replace("self_attn.", "_fsdp_wrapped_module.self_attn."))),
        "of checkpointed blocks": Variant(
            edit=_keys(lambda key: key.replace("self_attn.", "_checkpoint_wrapped_module.self_attn."))
        ),
        "with a name of a trainer": Variant(edit=_keys(lambda key: key.replace(".weight", ".policy.weight"))),
        "whole norms of queries": Variant({"modules_to_save": ["q_norm"]}, "qwen3"),
        "ranks and alphas by whole paths": Variant(
            {
                "rank_pattern": {"model.layers.0.self_attn.q_proj": 2},
                "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 3},
            }
        ),
        "an embedding of OPT": Variant({"target_modules": ["embed_tokens", "q_proj"]}, "opt"),
        "of DDP": Variant(edit=_keys(lambda key: f"module.{key}")),
        "compiled": Variant(edit=_keys(lambda key: key.replace("model.model.model", "model.model._orig_mod.model"))),
        "of a multimodal model": Variant(
            edit=_keys(lambda key: key.replace("model.model.layers", "model.model.language_model.layers"))
        ),
        "DoRA of another PEFT": Variant(
            {"use_dora": True}, edit=_keys(lambda key: key.replace("_vector", "_vector.weight"))
        ),
        "empty fields of the future": Variant(edit=_config(new_switch=False, new_list=[], new_table={})),
    }
    return {
        name: Variant({"target_modules": ["q_proj", "v_proj"], **one.options}, *_rest(one))
        for name, one in found.items()
    }


def _rest(one: Variant) -> tuple[Any, ...]:
    return one.architecture, one.changes, one.edit, one.convert


VARIANTS = _made()


def trained(base: Path, folder: Path, options: Mapping[str, Any], seed: int = 5) -> Tensor:
    """The logits of PEFT's model in memory after everything that it trains was changed; saved into the folder."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.variants import calculate_alora_offsets
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        settings = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options})
        adapted = get_peft_model(model, settings).eval()
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name or parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * (0.02 if "magnitude" in name else 0.1))
        adapted.save_pretrained(folder)
        with torch.inference_mode():
            alora = bool(options.get("alora_invocation_tokens"))
            given = {"alora_offsets": calculate_alora_offsets(adapted.peft_config, "default", IDS)} if alora else {}
            found: Tensor = adapted(input_ids=IDS, **given).logits
    return found


def check(variant: Variant, zoo: Zoo, folder: Path) -> str:
    """What becomes of a variant: exact, "refused: why | what to do", "refused without a way out", wrong, or crash."""
    base = zoo.base(variant.architecture, **variant.changes)
    wanted = trained(base, folder / "a", variant.options)
    if variant.edit is not None:
        variant.edit(folder / "a")
    runtime = zoo.runtime(variant.architecture, **variant.changes)
    adapter = folder / "a"
    try:
        if variant.convert:
            from lora_rt.core.export.convert import convert

            adapter = folder / "converted"
            convert(folder / "a", adapter, base=str(base))
        name = runtime.load_adapter(str(adapter), name=f"v{abs(hash(str(folder)))}")
        try:
            got = runtime.logits(IDS, compositions=name)
        finally:
            runtime.unload_adapter(name)
    except LoraRtError as error:
        text = "; ".join(error.problems or [error.message])
        return f"refused: {text} | {error.next_step}" if error.next_step else f"refused without a way out: {text}"
    except Exception as error:
        return f"crash: {type(error).__name__}: {error}"[:300]
    off = float((got - wanted).abs().max())
    return "exact" if off <= _NEAR else f"wrong by {off:.3g}"


RESULTS = Path(__file__).parents[1] / "runtime" / "variants.json"
KINDS = {
    "through `lora-rt convert`": r".*converted",
    "DoRA": r"DoRA.*|.*, DoRA",
    "rows of single tokens": r"token rows.*",
    "modules trained as a whole, alone at weight 1": r"(a )?whole.*|embedding and head whole.*",
    "biases": r".*bias.*",
    "embeddings, of positions too": r".*embedding.*|.*by force",
    "aLoRA, from its tokens on": r"aLoRA.*",
    "parameters (`target_parameters`)": r"weights? of.*|the weight of.*|bare parameters",
    "begun by changing the base, or pickled": r"PiSSA.*|OLoRA|CorDA|LoRA-GA|LoftQ|pickled",
    "other methods, deeper bases, unknown fields": r"more layers|Arrow|X-LoRA|IA3|MiSS|QA-LoRA|a field of the future",
    "as trainers write them (FSDP, DDP, compiled, in parts)": r"(of|with|without) (?!the head|a tied head).*"
    r"|compiled|in parts.*|empty fields.*",
    "plain LoRA: any layers, heads, ranks, alphas, patterns, rsLoRA": r".*",
}
"""What the page calls adapters whose name, in VARIANTS, is like this and like none above."""


def report(kept: Mapping[str, str]) -> str:
    """The page's tables: counts by kind of adapter, and a line for whatever is refused, with why and what to do.

    Raises:
        ValueError: other variants were tried than there are.
    """
    if kept.keys() != VARIANTS.keys():
        raise ValueError(f"run python -m support.variants --write: {sorted(kept.keys() ^ VARIANTS.keys())}")
    found: dict[str, dict[str, str]] = {kind: {} for kind in [*KINDS][::-1]}
    for name, result in kept.items():
        found[next(kind for kind, like in KINDS.items() if re.fullmatch(like, name))][name] = result
    counts = ["| adapters | exact | refused |", "|---|---|---|"]
    refusals = ["| refused | why | what to do |", "|---|---|---|"]
    for kind, results in found.items():
        refused = {name: result for name, result in results.items() if result != "exact"}
        by_way: dict[str, list[str]] = {}
        for name, result in refused.items():
            by_way.setdefault(result.rpartition(" | ")[2], []).append(name)
        counts.append(f"| {kind} | {len(results) - len(refused)} | {len(refused)} |")
        refusals += [f"| {', '.join(names)} | {_why(refused[names[0]])} | {way} |" for way, names in by_way.items()]
    return "\n".join([*counts, "", *refusals]) + "\n"


def _why(result: str) -> str:
    text = result.removeprefix("refused: ").partition(" | ")[0].removeprefix(f"{CONFIG}: ")
    return text.rpartition("; ")[0] or text


def main() -> None:
    """Print what is not exact, and the counts."""
    torch.set_num_threads(1)
    zoo = Zoo(Path(tempfile.mkdtemp()))
    names = [name for name in sys.argv[1:] if name != "--write"] or [*VARIANTS]
    found: dict[str, str] = {}
    for name in names:
        result = check(VARIANTS[name], zoo, Path(tempfile.mkdtemp()))
        found[name] = re.sub(r"(?<= )/\S+/a\b", "ADAPTER", re.sub(r"\bv\d{9,}", "it", result))
        if result != "exact":
            print(f"{name:40} {result}")
    print(dict(Counter(result.partition(":")[0].partition(" by")[0] for result in found.values())))
    if "--write" in sys.argv:
        before = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        kept = {name: found.get(name, before.get(name)) for name in VARIANTS if name in found or name in before}
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
