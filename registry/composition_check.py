"""Are the adapters of a named composition still those that its weights were found for?"""

from __future__ import annotations

from lora_rt.errors import LoraRtError
from lora_rt.registry.card import BaseIdentity
from lora_rt.registry.compositions import NamedComposition, NamedTerm
from lora_rt.registry.registry import Registry


def mix_problems(registry: Registry, mix: NamedComposition) -> list[str]:
    """Every term that leads nowhere, or to other files, or whose files changed; no requests are made."""
    base = BaseIdentity(mix.base, None, "")
    return [problem for term in mix.terms if (problem := _problem(registry, term, base))]


def clashing(registry: Registry, name: str) -> list[str]:
    """Where adapters of a composition's name come from: in a composition they are hidden by it."""
    return [item.source for item in registry.installed() if item.name == name]


def _problem(registry: Registry, term: NamedTerm, base: BaseIdentity) -> str:
    try:
        found = registry.resolve(term.reference, base, offline=True)
    except LoraRtError as error:
        return f"{term.reference}: {error.message}"
    if term.sha256 and found.sha256 != term.sha256:
        return f"{term.reference}: is {found.sha256[:12]} now ({found.source}), and was tuned as {term.sha256[:12]}"
    return ""
