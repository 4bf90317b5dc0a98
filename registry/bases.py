"""Which base an adapter belongs to: digests decide, names are hints, and where neither tells the shapes have to."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from lora_rt.registry.models import Text
from lora_rt.registry.reference import is_hub_id
from lora_rt.registry.strict_json import shown

DEFAULT_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The Hub's name of the default base, which `--base default` means."""

ANYWAY = "--allow-base-mismatch (allow_base_mismatch=True in Python) uses it all the same, if its shapes fit"

# Republished forms of one model: other quantizations and file formats of the same weights, at the end of its name.
_FORM = re.compile(
    r"[-.](unsloth|bnb|hf|gguf|onnx|mlx|exl[23]|hqq|eetq|torchao|quark|quantized|dynamic|kv|i1|gptq|awq|marlin|"
    r"aqlm|autoround|compressed|neuron|ov|(fp|bf|int|nf|nvfp|mxfp|w)\d+(a\d+)?(-dynamic|-kv|-asym|-ov)?|w\d+a\d+|"
    r"\d+(\.\d+)?-?(bit|bpw)|[48]bits?|\d+g|g\d+|i?q\d(-\w{1,2}){0,3})$"
)
_OWNER = re.compile(r"^((meta-llama|meta|google|mistralai|microsoft|qwen|nvidia|deepseek-ai|ibm)_|meta-(?=llama))")


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """Which base: its id (hub id or folder), its revision where there is one, and a digest of its weights or source.

    The digest decides where both sides have one; it is "" where it is not known. An id is a label: two folders may have
    one name, and one model is published under several.
    """

    id: Text
    revision: Text | None
    digest: Text

    def matches(self, other: BaseIdentity) -> bool:
        """Whether both are known to be one base: by their digests, or by their names where a digest is missing."""
        if self.digest and other.digest:
            return self.digest == other.digest
        return model_name(self.id) == model_name(other.id)

    def contradicts(self, other: BaseIdentity) -> bool:
        """Whether both are known to be different bases: by their digests, or by the names that a hub gave them.

        A folder's name says nothing about what is in it; there the shapes have to decide.
        """
        if self.digest and other.digest:
            return self.digest != other.digest
        return is_hub_id(self.id) and is_hub_id(other.id) and not self.matches(other)


def base_problems(stated: BaseIdentity | None, configured: str | None, base: BaseIdentity | None) -> list[str]:
    """A line if an adapter states another base than the one in use.

    Args:
        stated: the base of its card, which decides; without a card, what its configuration calls the base.
        configured: that name; a path in it says nothing.
        base: the base in use; None where none is known.
    """
    if base is None or (stated is None and configured is None):
        return []
    said = BaseIdentity(configured or "", None, "") if stated is None else stated
    if not said.contradicts(base):
        return []
    where = "its configuration states the base" if stated is None else "it was made for the base"
    mine, used = digests_apart(said, base)
    return [f"{where} {shown(said.id)}{mine}, in use is {shown(base.id)}{used}; {ANYWAY}"]


def digests_apart(one: BaseIdentity, other: BaseIdentity) -> tuple[str, str]:
    """What to say behind the names of two bases that have the same name, so that they differ; else nothing."""
    if one.id != other.id or not (one.digest and other.digest):
        return "", ""
    return f" of {one.digest[:12]}", f" of {other.digest[:12]}"


def model_name(base_id: str) -> str:
    """The model's name without its owner and form, so that `unsloth/Meta-X-bnb-4bit` is `someone/X`."""
    name = _OWNER.sub("", base_id.lower().rpartition("/")[2]).replace("_", "-")
    while (shorter := _FORM.sub("", name)) != name and shorter:
        name = shorter
    return name


def use_base(base_id: str) -> str:
    """The sentence that says how to come to a base.

    Args:
        base_id: as cards have it: a Hub id, or the name that a local folder or file had.
    """
    if base_id == DEFAULT_ID:
        return "Use --base default"
    for local in (Path(base_id), Path(f"{base_id}.gguf")):
        if (local / "config.json").is_file() or (local.suffix == ".gguf" and local.is_file()):
            return f"Use --base {shlex.quote(str(local) if local.is_absolute() else f'./{local}')}"
    if is_hub_id(base_id):
        return f"Use --base {base_id}"
    return f"Give --base the folder or file of {base_id}"
