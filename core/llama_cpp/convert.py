"""What is made of a base once so that it speaks without torch: its tokenizer and facts, and of a dense one a GGUF file.

That file is for this engine alone: its words are numbers, since both engines read text by ours. What is written for a
`--precision`: every matrix in its kind of `base.KINDS`, where its rows are whole blocks of 32, embedding and output
head in 8 bits where the rest has 4; norms and biases in float32. Rounded to the nearest, without calibration: a file
that somebody has quantized with care is the better base.
"""

from __future__ import annotations

import json
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gguf
from transformers import AutoConfig

from lora_rt.core.base.bounded import hold_to_limits
from lora_rt.core.base.progress import step
from lora_rt.core.base.reading import readable, whole_model, whole_tokenizer
from lora_rt.core.base.shape import heads_of
from lora_rt.core.base.silence import libraries_silenced
from lora_rt.core.base.source import BaseError
from lora_rt.core.export.architectures import architecture_of
from lora_rt.core.export.outline import outline
from lora_rt.core.llama_cpp.words import FILE, Words, facts_of, same_words

_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose weights lie in a GGUF file as they are, but for the order of rows."""
_BLOCK = 32


def check_convertible(name: str, config: Any) -> None:
    """Raises BaseError where a transformers configuration is of no kind that is written here."""
    rope = getattr(config, "rope_parameters", None) or {}
    problem = ""
    if config.model_type not in _FAMILIES:
        problem = f"it is a {config.model_type}, and {', '.join(_FAMILIES)} are written here"
    elif (scaled := rope.get("rope_type", "default")) != "default" or rope.get("partial_rotary_factor", 1) != 1:
        problem = f"its positions are not the plain rotary ones ({scaled})"
    elif getattr(config, "sliding_window", None):
        problem = "its attention looks back a limited way"
    if problem:
        text = f"{name} can't be converted for llama.cpp: {problem}"
        raise BaseError(text, next_step="Give --base a .gguf file of this model, or use --engine torch")


def write_gguf_base(path: Path, folder: Path, kind: str) -> None:
    """Write the model of a folder.

    Args:
        path: the file to write.
        folder: of a dense model, as transformers saves it.
        kind: of its matrices, by llama.cpp's name.

    Raises:
        BaseError: it can't be read, or `check_convertible`.
    """
    check_convertible(folder.name, AutoConfig.from_pretrained(folder, trust_remote_code=False))
    told = f"converting {folder.name} to {kind} for llama.cpp (once; it is kept)"
    with libraries_silenced(), step(told), ExitStack() as opened:
        with readable(f"{folder} can't be loaded", "Fetch it again"):
            model = whole_model(folder, dtype="auto")
        config, architecture = model.config, architecture_of(model.config)
        writer = opened.enter_context(closing(gguf.GGUFWriter(path, architecture.name)))
        writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
        _describe(writer, config)
        number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
        names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
        for key, tensor in model.state_dict().items():
            module, _, leaf = key.rpartition(".")
            if module == "lm_head" and config.tie_word_embeddings:
                continue
            rows = architecture.rows(config, module, tensor.shape[0])
            values = (tensor if rows is None else tensor[rows]).float().numpy()
            _add(writer, f"{names.get_name(module)}.{leaf}", values, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _describe(writer: Any, config: Any) -> None:
    heads = heads_of(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads.queries)
    writer.add_head_count_kv(heads.keys)
    writer.add_key_length(heads.size)
    writer.add_value_length(heads.size)
    writer.add_rope_dimension_count(heads.size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"<{number}>" for number in range(config.vocab_size)])
    writer.add_token_merges(["<0 >"])
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if ends[0] is not None:
        writer.add_eos_token_id(ends[0])


def _add(writer: Any, name: str, values: Any, kind: str) -> None:
    if values.ndim == 1 or values.shape[-1] % _BLOCK:
        kind = "F32"
    elif kind == "Q4_1" and name in ("token_embd.weight", "output.weight"):
        kind = "Q8_0"
    chosen = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quantize(values, chosen), raw_dtype=chosen)


def write_facts(path: Path, text: str, words: Path, file: Path) -> None:
    """Write what there is to know of a base into a file, and its tokenizer beside it.

    Args:
        path: to write.
        text: of the base.
        words: the file or folder that its tokenizer is read from.
        file: the base in GGUF.
    """
    folder = path.parent
    with libraries_silenced(gguf=True), step(f"reading the words of {words.name} (once; they are kept)"):
        base = outline(text)
        inside = {"gguf_file": words.name} if words.is_file() else {}
        tokenizer = whole_tokenizer(words.parent if inside else words, **inside)
        tokenizer.save_pretrained(folder)
    hold_to_limits(folder)
    config = base.config.get_text_config()
    ends = config.eos_token_id
    document = {
        "facts": asdict(base.facts) | {"precision": _quantization(file)},
        "context": int(config.max_position_embeddings),
        "ends": ends if isinstance(ends, list) else [ends] if ends is not None else [],
        "words": _words(folder, tokenizer),
    }
    path.write_text(json.dumps(document, indent=2), encoding="utf-8")


def _words(folder: Path, tokenizer: Any) -> dict[str, Any] | None:
    """What `Words` needs besides the folder, None where the tokenizer's own class is needed."""
    facts = facts_of(tokenizer)
    return facts if (folder / FILE).is_file() and same_words(tokenizer, Words(folder, facts)) else None


def _quantization(file: Path) -> str:
    """How most of a file's weights are kept, as it says itself."""
    field = gguf.GGUFReader(file).fields.get("general.file_type")
    return "GGUF" if field is None else gguf.LlamaFileType(int(field.contents())).name.removeprefix("MOSTLY_")
