"""Adapters as GGUF files, each written once per base; and which compositions llama.cpp can't speak."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lora_rt.core.base.progress import step
from lora_rt.core.export import ExportError
from lora_rt.core.llama_cpp.base import GgufBase
from lora_rt.core.requests.answered import AdapterOrigin
from lora_rt.core.requests.composition import Composition, Term
from lora_rt.core.requests.named import check_pin, expanded, raise_all
from lora_rt.errors import LoraRtError
from lora_rt.plugins.manager import ModeHost
from lora_rt.registry.registry import Registry
from lora_rt.version import __version__

TORCH = "Use --engine torch"
_NAME = "adapter.gguf"


@dataclass(frozen=True, slots=True)
class ScaledAdapter:
    """An adapter as llama.cpp loads it, where it came from, and its scale.

    `weight` is what people are told: the scale times the mean of the factors of its layers, which lie in the file.
    """

    file: Path
    origin: AdapterOrigin
    scale: float
    weight: float

    def and_again(self, other: ScaledAdapter) -> ScaledAdapter:
        """The same adapter with the weights of both."""
        return replace(self, scale=self.scale + other.scale, weight=self.weight + other.weight)


class Adapters:
    """The adapters of one base, written where they are not there yet."""

    def __init__(self, base: GgufBase, source: str, registry: Registry, modes: ModeHost) -> None:
        """`source` is the text of the base."""
        self._base, self._source, self._registry, self._modes = base, source, registry, modes

    def of(self, composition: Composition) -> list[ScaledAdapter]:
        """The adapters of a composition; one that stands there twice is there once, with both weights.

        Raises:
            LoraRtError: terms that can't be used, or not by llama.cpp; all of them are named.
        """
        found: dict[Path, ScaledAdapter] = {}
        failures: list[LoraRtError] = []
        for term in composition.terms:
            try:
                for part in expanded(term, self._registry.compositions, self._base.facts):
                    one = self._of_term(part)
                    before = found.get(one.file)
                    found[one.file] = one if before is None else before.and_again(one)
            except LoraRtError as error:
                failures.append(error)
        raise_all(failures, f"{len(failures)} terms of {composition} can't be used")
        return list(found.values())

    def _of_term(self, term: Term) -> ScaledAdapter:
        if term.after:
            raise LoraRtError(f"{term.reference.text!r} waits for {term.after!r}, and llama.cpp can't", next_step=TORCH)
        if term.mode:
            text = f"the mode {term.mode!r} of {term.composition!r} decides its weights, and llama.cpp can't ask it"
            raise LoraRtError(text, next_step=TORCH)
        resolved = self._registry.find(term.reference, self._base.identity)
        check_pin(term, resolved.name, resolved.sha256)
        mode = resolved.card.mode if resolved.card else "output-only"
        origin = AdapterOrigin(resolved.name, mode, resolved.source, resolved.revision, resolved.sha256)
        file = self._place(resolved.sha256, mode, term.layers) / _NAME
        if not file.is_file():
            with step(f"writing {resolved.name} for llama.cpp (once)"):
                self._write(replace(term, weight=1.0), file.parent, resolved.sha256)
        return ScaledAdapter(file, origin, term.weight, term.mean_weight)

    def _place(self, sha256: str, mode: str, layers: Sequence[float]) -> Path:
        """Of one adapter under one verdict of its mode, with the factors of its layers folded in."""
        told = [record.origin for record in self._modes.listed(mode)]
        said = json.dumps([sha256, mode, told, [factor.hex() for factor in layers], __version__])
        return self._base.folder.with_name("llama.cpp-adapters") / hashlib.sha256(said.encode()).hexdigest()[:32]

    def _write(self, term: Term, folder: Path, sha256: str) -> None:
        """What is written is kept under this digest, and so has to be of it."""
        from lora_rt.core.export.run import Exporter

        folder.parent.mkdir(parents=True, exist_ok=True)
        exporter = Exporter(self._source, registry=self._registry, modes=self._modes, quick=True)
        try:
            gathered = exporter.gather(Composition((term,)))
            if any(one.resolved.sha256 != sha256 for one in gathered.terms):
                text = f"{term.reference.text!r} was changed while it was read"
                raise LoraRtError(text, next_step="Try again")
            gathered.write("gguf", folder)
        except ExportError as error:
            text = f"llama.cpp can't speak this: {error.message}"
            raise LoraRtError(text, problems=error.problems, next_step=TORCH) from error
