"""Names that a fitted composition can have; imports nothing heavy."""

from __future__ import annotations

from lora_rt.registry.errors import StoreError
from lora_rt.registry.reference import check_name as check_form
from lora_rt.registry.registry import Registry


def check_name(name: str, registry: Registry) -> None:
    """Raises LoraRtError where a composition can't have this name: an adapter has it, or it is none."""
    check_form(name, "a composition")
    if name in registry.names():
        text = f"{name!r} is the name of an adapter"
        raise StoreError(text, next_step="Give the composition another one with --name")
