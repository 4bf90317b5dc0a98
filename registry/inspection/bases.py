"""Whether an adapter was made for the base in use, by what its card and its configuration say."""

from __future__ import annotations

import re

from lora_rt.registry.card import AdapterCard, BaseIdentity
from lora_rt.registry.inspection.settings import LoraSettings
from lora_rt.registry.reference import is_hub_id
from lora_rt.registry.strict_json import shown

# Republished forms of one model: other quantizations and file formats of the same weights.
_FORM = re.compile(r"(-unsloth)?(-bnb)?-(4bit|8bit|gptq|awq|gguf|hf|fp16|bf16|int4|int8|nf4)$")


def base_problems(card: AdapterCard | None, settings: LoraSettings | None, base: BaseIdentity | None) -> list[str]:
    """A line if the adapter states another base; the card decides, without one the configuration's hub id."""
    if base is None:
        return []
    if card is not None:
        if card.base.matches(base):
            return []
        return [f"it was made for the base {shown(card.base.id)}, in use is {shown(base.id)}"]
    if settings is None or not (is_hub_id(settings.base_name) and is_hub_id(base.id)):
        return []  # a folder's name says nothing about what is in it; the shapes still have to fit
    if _model(settings.base_name) == _model(base.id):
        return []
    return [f"its configuration states the base {shown(settings.base_name)}, in use is {shown(base.id)}"]


def _model(hub_id: str) -> str:
    """The model's name without its owner and form, so that `unsloth/X-bnb-4bit` is `someone/X`."""
    name = hub_id.lower().rpartition("/")[2]
    while (shorter := _FORM.sub("", name)) != name:
        name = shorter
    return name
