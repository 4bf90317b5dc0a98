"""What bare names mean during one request: a named composition, or an adapter."""

from __future__ import annotations

from collections.abc import Container

from lora_rt.registry.compositions import NamedComposition, NamedCompositions


class RequestNames:
    """Finds named compositions, each read once for all rows; an adapter that the caller loaded comes before one."""

    def __init__(self, compositions: NamedCompositions, loaded: Container[str]) -> None:
        """`loaded` are the resident names that the caller was given."""
        self._compositions = compositions
        self._loaded = loaded
        self._found: dict[str, NamedComposition | None] = {}

    def get(self, name: str) -> NamedComposition | None:
        """The composition that a name means, or None where it means an adapter.

        Raises:
            StoreError: its file is damaged.
        """
        if name in self._loaded:
            return None
        if name not in self._found:
            self._found[name] = self._compositions.get(name)
        return self._found[name]
