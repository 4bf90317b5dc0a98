"""Tensor names of adapter files, in the spellings that trainers and years have given them.

    base_model.model.<module>.lora_A.weight            PEFT
    <module>.lora_A.weight                             without its prefix
    base_model.model.<module>.lora_A.default.weight    saved with state_dict(): the adapter's name is inside
    _orig_mod. / _fsdp_wrapped_module. / module.       left by torch.compile, FSDP, DDP; model. before all by Lightning
    base_model.model.<module>.lora_embedding_A         of an embedding: (r, tokens), B (n, r)
    base_model.model.<module>.lora_magnitude_vector    DoRA's, (out,)
    base_model.model.<module>.token_adapter.trainable_tokens_delta     what trained token rows became, (tokens, n)
    base_model.model.<module>.weight                   of a module that was trained as a whole

`<module>` is a path in the model that was trained. The same layer has other paths in other classes and versions:

    model.language_model.layers.0...    a multimodal model since transformers 4.52
    language_model.model.layers.0...    the same before
    model.layers.0...                   its text part alone
    layers.0...                         saved from the inner model
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

PREFIX = "base_model.model."

_KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB])(?:\.(?P<name>[^.]+))?\.(?P<leaf>weight|bias)")
_BARE = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_embedding_[AB]|lora_magnitude_vector)(?:\.(?P<name>[^.]+?))?(?:\.weight)?"
)
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?")
_WHOLE = re.compile(r"(?P<module>.+?)(?:\.modules_to_save(?:\.[^.]+)??)?\.(?P<leaf>weight|bias)")
MAGNITUDE = "lora_magnitude_vector"
_SHELLS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_WRAPPERS = frozenset({"model", "language_model", "text_model", "transformer", "gpt_neox", "backbone", "llm"})


def plain(key: str) -> str:
    """The key without what wrapped the model: PEFT's prefix, however often, torch.compile, FSDP, DDP, a trainer."""
    if not key.startswith("module.") and PREFIX not in key and not _SHELLS.intersection(key.split(".")):
        return key
    short = ".".join(part for part in key.split(".") if part not in _SHELLS)
    return short.rpartition(PREFIX)[2].removeprefix("module.")


def lora_key(key: str) -> tuple[str, str, str] | None:
    """(module, part, adapter's name or "") of a key; None for others.

    The part is `lora_A.weight`, `lora_B.weight` (an embedding's, too), `lora_B.bias` or `lora_magnitude_vector`.
    """
    if (bare := _BARE.fullmatch(plain(key))) is not None:
        name = "" if bare["name"] in (None, "weight") else bare["name"]
        part = bare["part"].replace("_embedding", "")
        return bare["module"], part if part == MAGNITUDE else f"{part}.weight", name
    found = _KEY.fullmatch(plain(key))
    if found is None or (found["part"], found["leaf"]) == ("lora_A", "bias"):
        return None
    return found["module"], f"{found['part']}.{found['leaf']}", found["name"] or ""


def plain_key(key: str) -> str:
    """The key as PEFT writes it today; another one's without what wrapped its model."""
    found = lora_key(key)
    if found is None or found[1] == MAGNITUDE:
        return PREFIX + plain(key)
    module, part, _ = found
    part = part.replace("lora_", "lora_embedding_").removesuffix(".weight") if is_embedding(key) else part
    return f"{PREFIX}{module}.{part}"


def is_embedding(key: str) -> bool:
    """Whether a factor is one of an embedding."""
    return ".lora_embedding_" in key


def tokens_key(key: str) -> str | None:
    """The embedding whose trained token rows a tensor holds; None for others."""
    found = _TOKENS.fullmatch(plain(key))
    return found["module"] if found else None


def whole_key(key: str) -> tuple[str, str] | None:
    """(module, weight | bias) of a tensor of a module that was trained as a whole; None for names of other forms."""
    found = _WHOLE.fullmatch(plain(key))
    return (found["module"], found["leaf"]) if found else None


def base_key(key: str) -> str:
    """The name in the base of a tensor that is no LoRA: PEFT hides a wrapped layer's own behind `base_layer`."""
    return plain(key).replace(".token_adapter.", ".").replace(".base_layer.", ".")


def is_unused(key: str) -> bool:
    """Whether it is what PEFT has replaced by a module that was trained as a whole."""
    return ".original_module." in key


def inner_path(path: str) -> str:
    """The path without the models that are wrapped around it, by which two versions of one path are the same."""
    parts = [part for part in path.split(".") if part != "module"]  # DDP around a part
    start = next((i for i, part in enumerate(parts) if part not in _WRAPPERS), 0)
    return ".".join(parts[start:])


def renamed(modules: Iterable[str], known: Iterable[str]) -> Mapping[str, str]:
    """For modules that are not among the known paths: the one known path that is the same layer, where there is one."""
    paths = list(known)
    there = set(paths)
    strangers = [module for module in modules if module not in there] if paths else []
    if not strangers:
        return {}
    by_inner: dict[str, list[str]] = {}
    for path in paths:
        by_inner.setdefault(inner_path(path), []).append(path)
    found = {module: by_inner.get(inner_path(module), []) for module in strangers}
    return {module: same[0] for module, same in found.items() if len(same) == 1}
