"""From the text of a composition to the folder of its export, or the reason why there is none.

Every reason is a LoraRtError whose whole text is for the client, who has no shell on the server.
"""

from __future__ import annotations

import difflib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_rt import Composition, Exporter, LoraRtError
from lora_rt_vllm import spelling
from lora_rt_vllm.cache import ExportCache
from lora_rt_vllm.settings import RANKS, Settings

STATIC = "vLLM answers compositions that are weights alone; `lora-rt serve` without --engine answers this one"
_SHOWN = 20  # names in a message


class RefusedCompositionError(LoraRtError):
    """A composition that this server does not answer."""


class Answers:
    """The compositions of one server. What is asked from several threads is made side by side, each export once."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.cache = ExportCache(settings.cache, settings.cache_bytes)
        self._exporters: dict[str, Exporter] = {}
        self._mutex = threading.Lock()

    def name(self, given: str, model: str = "") -> str:
        """The one name of a composition, told without a look at the weights.

        Args:
            given: as a client spelled it.
            model: the base as vLLM names it, where the settings do not.

        Raises:
            LoraRtError: it is none, or a term of it can't be found.
        """
        text, mark = spelling.parted(given)
        composition = self._read(text, model)
        return spelling.marked(composition, mark or self.exporter(model).key(composition))

    def folder(self, given: str, model: str = "") -> Path:
        """The folder of a composition's export, made first where there is none.

        Raises:
            LoraRtError: why it is not answered.
        """
        text, mark = spelling.parted(given)
        composition = self._read(text, model)
        exporter = self.exporter(model)
        gathered = exporter.gather(composition)
        self._check(gathered, str(composition))
        key = gathered.key
        if mark and not key.startswith(mark):
            raise RefusedCompositionError(
                f"the adapters of '{composition}' have changed: #{mark} is #{key[: spelling.MARK]} now",
                next_step=f"Ask for '{composition}'",
            )

        def write(out: Path) -> int:
            import torch

            return gathered.write("peft", out, dtype=getattr(torch, self.settings.dtype)).size

        return self.cache.get(f"{exporter.base.identity.digest[:12] or 'base'}/{key[:40]}", write)

    def exporter(self, model: str) -> Exporter:
        """The exports over a base; what there is to know of it is read once."""
        text = self.settings.base or model
        with self._mutex:
            if text not in self._exporters:
                self._exporters[text] = Exporter(text, quick=True)
            return self._exporters[text]

    def _read(self, text: str, model: str) -> Composition:
        """The composition in its one spelling, if clients may use every name in it."""
        composition = spelling.canonical(Composition.parse(text))
        problems = [problem for term in composition.terms if (problem := self._name_problem(term.reference, model))]
        if problems:
            served = self._served(model)
            known = ", ".join([*served[:_SHOWN], *(["..."] if len(served) > _SHOWN else [])])
            raise _refused(str(composition), problems, f"This server has {known or 'none'}")
        return composition

    def _name_problem(self, reference: Any, model: str) -> str:
        """Why clients may not use a name, "" where they may."""
        if reference.kind != "name":
            return f"{reference.text!r} is a path or a repository, and clients name registers of this server"
        name, exporter = reference.target, self.exporter(model)
        if self.settings.registers:
            if name in self.settings.registers:
                return ""
        elif exporter.registry.compositions.get(name):
            return ""
        else:
            try:
                exporter.registry.find(reference, exporter.base.identity)
                return ""
            except LoraRtError as error:
                if name in exporter.registry.names():  # for another base, or in another revision
                    return error.message
        near = difflib.get_close_matches(name, self._served(model), n=1, cutoff=0.5)
        return f"there is no register {name!r} here" + (f"; did you mean {near[0]!r}?" if near else "")

    def _served(self, model: str) -> list[str]:
        """The names that clients may use: those that were given, or all adapters and named compositions."""
        registry = self.exporter(model).registry
        mixes = (name for name in registry.compositions.names() if _is_static(registry.compositions, name))
        return sorted(self.settings.registers or {*registry.names(), *mixes})

    def _check(self, gathered: Any, text: str) -> None:
        """Whatever vLLM, or a file of constant weights, can't do."""
        found: Sequence[LoraRtError] = [*gathered.failures, *gathered.dynamic]
        if found:
            lines = [line for error in found for line in (error.message, *error.problems) if line]
            raise _refused(text, lines, STATIC if gathered.dynamic else "")
        if gathered.has_biases:
            raise _refused(text, ["it adds biases, which vLLM does not"], STATIC)
        rank, most = gathered.rank, self.settings.max_rank
        if rank == 0:
            raise _refused(text, ["every weight is 0"], f"That is the base: ask for '{self.settings.names[0]}'")
        if rank > most:
            larger = next((one for one in RANKS if one >= rank), None)
            how = f"--max-lora-rank {larger}" if larger else f"vLLM takes ranks up to {RANKS[-1]}"
            step = f"Leave terms out, or have the server started with {how}" if larger else f"Leave terms out: {how}"
            raise _refused(text, [f"its adapters have rank {rank} together, and this server takes {most}"], step)


def _is_static(compositions: Any, name: str) -> bool:
    """Whether no mode decides anew for every text; one whose file is damaged is served to nobody."""
    try:
        found = compositions.look_up(name)
    except LoraRtError:
        return False
    return found is not None and not found.mode


def _refused(text: str, problems: Sequence[str], step: str) -> RefusedCompositionError:
    """One problem in the message itself, several below it."""
    if len(problems) == 1:
        return RefusedCompositionError(f"{text!r} is not answered: {problems[0]}", next_step=step)
    return RefusedCompositionError(f"{text!r} is not answered", problems=problems, next_step=step)
