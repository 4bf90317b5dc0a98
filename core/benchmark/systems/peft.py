"""PEFT in the three ways that its manual has for several adapters over one base."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.numbers import Sample
from lora_rt.core.benchmark.processes.cold import bare_repeat
from lora_rt.core.benchmark.processes.memory import memory_repeat
from lora_rt.core.benchmark.systems.greedy import greedy_repeat, greedy_tokens
from lora_rt.core.benchmark.systems.system import Repeat
from lora_rt.core.benchmark.workloads import Mix, Workload

_MIX = "mix"


class Peft:
    """A PeftModel and the workload's adapters in it. Its three ways take turns on it: what is active is its state."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._model: Any = None
        self._residents: dict[str, Path] = {}

    def reside(self, workload: Workload) -> Any:
        """The model with exactly the workload's adapters, made anew where they act on other layers than before."""
        from peft import PeftModel

        wanted = self._lab.shelf.paths(workload)
        with _quiet():
            if any(wanted.get(name) not in (None, path) for name, path in self._residents.items()):
                self._model, self._residents = None, {}
            for name in [name for name in self._residents if name not in wanted]:
                self._model.delete_adapter(name)
                del self._residents[name]
            for name, path in wanted.items():
                if self._model is None:
                    self._model = PeftModel.from_pretrained(self._lab.model(), path, adapter_name=name).eval()
                elif name not in self._residents:
                    self._model.load_adapter(path, name)
                self._residents[name] = path
        return self._model

    def activate(self, mix: Mix) -> None:
        """`set_adapter` of several, and `set_scale` for their weights."""
        from peft.tuners.lora import LoraLayer

        self._model.base_model.set_adapter([name for name, _ in mix], inference_mode=True)
        for module in self._model.modules():
            if isinstance(module, LoraLayer):
                for name, weight in mix:
                    module.set_scale(name, weight)

    def concatenate(self, mix: Mix) -> None:
        """`add_weighted_adapter(cat)`: one adapter in whose ranks all of them stand, in the place of the one before."""
        with _quiet():
            if _MIX in self._model.peft_config:
                self._model.delete_adapter(_MIX)
            names, weights = [name for name, _ in mix], [weight for _, weight in mix]
            self._model.add_weighted_adapter(names, weights, _MIX, combination_type="cat")
            self._model.base_model.set_adapter([_MIX], inference_mode=True)

    def forget_mix(self) -> None:
        """Without the concatenated adapter, which is no resident."""
        if _MIX in self._model.peft_config:
            with _quiet():
                self._model.delete_adapter(_MIX)


class PeftSetAdapter:
    """`set_adapter([...])`: PEFT loops over the active adapters in every layer."""

    name = "peft-set"

    def __init__(self, lab: Lab, peft: Peft) -> None:
        self._lab = lab
        self._peft = peft

    def reason(self, workload: Workload) -> str | None:
        """One composition is the state of the model."""
        if workload.differs:
            return "cannot mix weights in a batch"
        return "trains by the Trainer" if workload.kind == "training" else None

    def prepare(self, workload: Workload) -> Repeat:
        """The plain loop, with the composition set before each repeat and outside of its time; or a process."""
        if workload.kind == "cold":
            return bare_repeat(self._lab, workload)
        if workload.kind == "memory":
            return memory_repeat(self._lab, self.name, workload)
        model = self._peft.reside(workload)
        if workload.kind == "change":
            return _changes(self._lab, workload, self._peft.activate, self._peft.activate)
        mix = workload.mix(0)
        run = greedy_repeat(self._lab, model, workload)

        def repeat() -> Sample:
            with self._active(model, mix):
                return run()

        return repeat

    def tokens(self, workload: Workload) -> Sequence[Sequence[int]]:
        """What it says under its one composition."""
        model = self._peft.reside(workload)
        with self._active(model, workload.mix(0)):
            return greedy_tokens(self._lab, model, workload)

    @contextmanager
    def _active(self, model: Any, mix: Mix) -> Iterator[None]:
        if not mix:
            with model.disable_adapter():
                yield
            return
        self._peft.activate(mix)
        try:
            yield
        finally:
            self._peft.activate(_unweighted([mix]))  # a scale that stays would count twice in the other ways


class PeftConcatenated:
    """`add_weighted_adapter(..., combination_type="cat")`: one mix for everybody, made anew for each composition."""

    name = "peft-cat"

    def __init__(self, lab: Lab, peft: Peft) -> None:
        self._lab = lab
        self._peft = peft

    def reason(self, workload: Workload) -> str | None:
        """One mix is the state of the model."""
        if workload.differs:
            return "one mix for all rows"
        if not workload.active:
            return "as set_adapter"
        return "as set_adapter" if workload.kind in ("cold", "training") else None

    def prepare(self, workload: Workload) -> Repeat:
        """The plain loop; the mix is made before each repeat and outside of its time. Or a process."""
        if workload.kind == "memory":
            return memory_repeat(self._lab, self.name, workload)
        model = self._peft.reside(workload)
        if workload.kind == "change":
            return _changes(self._lab, workload, self._peft.concatenate, lambda _: self._peft.forget_mix(), times=1)
        run = greedy_repeat(self._lab, model, workload)

        def repeat() -> Sample:
            self._peft.concatenate(workload.mix(0))
            try:
                return run()
            finally:
                self._peft.forget_mix()

        return repeat

    def tokens(self, workload: Workload) -> Sequence[Sequence[int]]:
        """What it says under its one mix."""
        model = self._peft.reside(workload)
        self._peft.concatenate(workload.mix(0))
        try:
            return greedy_tokens(self._lab, model, workload)
        finally:
            self._peft.forget_mix()


class PeftMixedBatch:
    """`adapter_names=[...]`: every row has one adapter, and none has a weight."""

    name = "peft-mixed"

    def __init__(self, lab: Lab, peft: Peft) -> None:
        self._lab = lab
        self._peft = peft

    def reason(self, workload: Workload) -> str | None:
        """One adapter per row, at the weight 1."""
        if workload.kind == "change":
            return "an argument, without weights"
        if workload.kind in ("cold", "training") or not workload.active:
            return "as set_adapter"
        return "one adapter per row, no weights" if workload.active > 1 or workload.weighted else None

    def prepare(self, workload: Workload) -> Repeat:
        """The plain loop; the names go with every pass."""
        model = self._peft.reside(workload)
        run = greedy_repeat(self._lab, model, workload, adapter_names=_names(workload))

        def repeat() -> Sample:
            self._peft.activate(_unweighted(workload.mixes))
            return run()

        return repeat

    def tokens(self, workload: Workload) -> Sequence[Sequence[int]]:
        """What each row says under its adapter."""
        model = self._peft.reside(workload)
        self._peft.activate(_unweighted(workload.mixes))
        return greedy_tokens(self._lab, model, workload, adapter_names=_names(workload))


def _names(workload: Workload) -> list[str]:
    return [name for ((name, _),) in workload.mixes]


def _unweighted(mixes: Sequence[Mix]) -> Mix:
    """All their adapters at the weight 1."""
    return tuple((name, 1.0) for name in dict.fromkeys(name for mix in mixes for name, _ in mix))


def _changes(
    lab: Lab, workload: Workload, change: Callable[[Mix], None], tidy: Callable[[Mix], None], times: int = 10
) -> Repeat:
    """Seconds per change, each to a composition that was not there before; `tidy` is not timed."""
    numbers = count()

    def repeat() -> Sample:
        mixes = [workload.mix(next(numbers)) for _ in range(times)]
        start = lab.now()
        for mix in mixes:
            change(mix)
        sample = Sample((lab.now() - start) / times)
        tidy(_unweighted(mixes))
        return sample

    return repeat


@contextmanager
def _quiet() -> Iterator[None]:
    """PEFT warns of a base without a name and of adapters it finds in the model; both are meant here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
