"""PEFT in the three ways that its manual has for several adapters over one base, and its training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

from lora_rt.core.benchmark.bare import weigh
from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.systems import System, Turn, run_plainly
from lora_rt.core.benchmark.workloads import Mix, Workload

_MIX = "mix"


class PeftAdapters:
    """A PeftModel and the workload's adapters in it. The three ways take turns on it: what is active is its state."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._residents: dict[str, Path] = {}
        self.model: Any = None

    def reside(self, workload: Workload) -> None:
        """Exactly the workload's adapters, at the weight 1; a new model where they act on other layers than before."""
        from peft import PeftModel

        wanted = self._lab.adapters(workload)
        with _quiet():
            if any(wanted.get(name) not in (None, path) for name, path in self._residents.items()):
                self.model, self._residents = None, {}
            if self._residents and _MIX in self.model.peft_config:
                self.model.delete_adapter(_MIX)
            for name in [name for name in self._residents if name not in wanted]:
                self.model.delete_adapter(name)
                del self._residents[name]
            for name, path in wanted.items():
                if self.model is None:
                    self.model = PeftModel.from_pretrained(self._lab.model(), path, adapter_name=name).eval()
                elif name not in self._residents:
                    self.model.load_adapter(path, name)
                self._residents[name] = path
        weigh(self.model, dict.fromkeys(wanted, 1.0))  # a scale that stayed would count twice in the other ways

    def activate(self, mix: Mix) -> None:
        """`set_adapter` of several, and `set_scale` for their weights."""
        self.model.base_model.set_adapter([name for name, _ in mix], inference_mode=True)
        weigh(self.model, dict(mix))

    def concatenate(self, mix: Mix) -> None:
        """`add_weighted_adapter(cat)`: one adapter in whose ranks all of them stand."""
        names, weights = [name for name, _ in mix], [weight for _, weight in mix]
        with _quiet():
            self.model.add_weighted_adapter(names, weights, _MIX, combination_type="cat")
            self.model.base_model.set_adapter([_MIX], inference_mode=True)


class Peft(System):
    """The plain loop over a PeftModel, in one way.

    "set": `set_adapter([...])`, which loops over the active adapters in every layer. "cat": `add_weighted_adapter`, one
    mix for everybody, made anew for each composition. "mixed": `adapter_names=[...]`, every row has one adapter, and
    none has a weight. The composition is set before each turn, and outside of its time.
    """

    def __init__(self, lab: Lab, way: Literal["set", "cat", "mixed"], adapters: PeftAdapters) -> None:
        super().__init__(lab)
        self.name = f"peft-{way}"
        self.changes = 1 if way == "cat" else 10  # each of them takes a part of a second, and leaves an adapter
        self._way = way
        self._adapters = adapters

    def reason(self, workload: Workload) -> str | None:
        """What is the state of the model holds for all rows."""
        if self._way == "set":
            if workload.differs:
                return "cannot mix weights in a batch"
            return "trains by the Trainer" if workload.kind == "training" else None
        if self._way == "mixed" and workload.kind == "change":
            return "an argument, without weights"
        if self._way == "cat" and workload.differs:
            return "one mix for all rows"
        if workload.kind in ("cold", "training") or not workload.active:
            return "as set_adapter"
        if self._way == "mixed" and (workload.active > 1 or workload.weighted):
            return "one adapter per row, no weights"
        return None

    def prepare(self, workload: Workload) -> None:
        """The adapters, and the composition where it is the state of the model."""
        self._adapters.reside(workload)
        if workload.kind == "change" or not workload.active:
            return
        if self._way == "mixed":
            self._adapters.activate(tuple((name, 1.0) for name in dict.fromkeys(self._names(workload))))
        else:
            self.change(workload.mix(0))

    def run(self, workload: Workload) -> Turn:
        """What each row says."""
        arguments = {"adapter_names": self._names(workload)} if self._way == "mixed" else {}
        with nullcontext() if workload.active else self._adapters.model.disable_adapter():
            return run_plainly(self.lab, self._adapters.model, workload, **arguments)

    def change(self, mix: Mix) -> None:
        """The composition of the whole model."""
        (self._adapters.concatenate if self._way == "cat" else self._adapters.activate)(mix)

    def _names(self, workload: Workload) -> list[str]:
        """The one adapter of each row."""
        return [name for ((name, _),) in workload.mixes]


class PeftTrainer(System):
    """PEFT and transformers' Trainer, as their manuals have it: what our training is compared with."""

    name = "peft-trainer"

    def reason(self, workload: Workload) -> str | None:
        """It does not decode."""
        return None if workload.kind == "training" else "trains alone"


@contextmanager
def _quiet() -> Iterator[None]:
    """PEFT warns of a base without a name and of adapters it finds in the model; both are meant here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
