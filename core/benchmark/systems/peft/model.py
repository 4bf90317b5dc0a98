"""The PeftModel that the three ways take turns on, and what is common to them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.numbers import Sample
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


def unweighted(mixes: Sequence[Mix]) -> Mix:
    """All their adapters at the weight 1."""
    return tuple((name, 1.0) for name in dict.fromkeys(name for mix in mixes for name, _ in mix))


def changes(
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
        tidy(unweighted(mixes))
        return sample

    return repeat


@contextmanager
def _quiet() -> Iterator[None]:
    """PEFT warns of a base without a name and of adapters it finds in the model; both are meant here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
