"""llama.cpp's column: scales per request, one row after the other, through what each version of the package offers.

llama-cpp-python compiles a C++ project and is seldom installed; a stand-in with its names notes what it is told.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.llama_cpp import LlamaCpp
from lora_rt.core.benchmark.session import repeat_of
from lora_rt.core.benchmark.workloads import Workload

MIXES = Workload("w", "w", rows=3, active=2, distinct=True, prompt_tokens=5, new_tokens=2, rank=4)
VOCABULARY = 8


class StandIn:
    """What llama.cpp would be told: ("reset",), ("eval", tokens) and ("scales", {file: scale})."""

    def __init__(self, *, all_at_once: bool) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.files: list[str] = []
        low: Any = types.ModuleType("llama_cpp.llama_cpp")
        low.llama_adapter_lora_p_ctypes = ctypes.c_void_p
        low.llama_adapter_lora_init = self._init
        low.llama_get_logits_ith = lambda _ctx, _index: (ctypes.c_float * VOCABULARY)(0, 0, 0, 1)
        if all_at_once:
            low.llama_set_adapters_lora = self._set_all
        else:
            low.llama_clear_adapter_lora = lambda _ctx: self.told.append(("scales", {}))
            low.llama_set_adapter_lora = lambda _ctx, handle, scale: self.told[-1][1].update(
                {self.files[handle - 1]: scale}
            )
        top: Any = types.ModuleType("llama_cpp")
        top.__spec__ = importlib.machinery.ModuleSpec("llama_cpp", None)
        top.Llama, top.llama_cpp = self._llama, low
        self.modules = {"llama_cpp": top, "llama_cpp.llama_cpp": low}

    def _init(self, _model: Any, path: bytes) -> int:
        assert Path(path.decode()).read_bytes().startswith(b"GGUF")
        self.files.append(Path(path.decode()).parent.name)
        return len(self.files)

    def _set_all(self, _ctx: Any, handles: Any, count: int, scales: Any) -> None:
        self.told.append(("scales", {self.files[handles[i] - 1]: scales[i] for i in range(count)}))

    def _llama(self, path: str, **_options: Any) -> Any:
        assert path.endswith(".gguf")
        return types.SimpleNamespace(
            model=1,
            ctx=2,
            n_vocab=lambda: VOCABULARY,
            reset=lambda: self.told.append(("reset",)),
            eval=lambda ids: self.told.append(("eval", ids)),
        )


@pytest.fixture(params=[True, False], ids=["all at once", "one by one"])
def llama(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, lab: Lab, tmp_path: Path) -> StandIn:
    made = StandIn(all_at_once=request.param)
    for name, module in made.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "base.gguf").touch()
    lab.origin = replace(lab.origin, base=str(tmp_path / "base.gguf"), random=None)
    return made


def test_every_row_runs_alone_under_its_own_scales(lab: Lab, llama: StandIn) -> None:
    sample = repeat_of(lab, LlamaCpp(lab), MIXES)()
    assert sample.tokens == 3 * 2
    assert sorted(llama.files) == ["reg00", "reg01", "reg02", "reg03"]
    for row, (mix, prompt) in enumerate(zip(MIXES.mixes, lab.prompts(MIXES), strict=True)):
        scales, reset, first, *steps = llama.told[5 * row : 5 * row + 5]
        assert scales == ("scales", pytest.approx(dict(mix)))
        assert (reset, first) == (("reset",), ("eval", prompt))
        assert steps == [("eval", [3]), ("eval", [3])]


def said(system: LlamaCpp, workload: Workload) -> list[list[int]]:
    system.prepare(workload)
    return system.run(workload).tokens


def test_it_says_a_token_for_the_prompt_and_one_for_each_step(lab: Lab, llama: StandIn) -> None:
    assert said(LlamaCpp(lab), MIXES) == [[3, 3, 3]] * 3


def test_a_change_of_composition_is_a_change_of_scales(lab: Lab, llama: StandIn) -> None:
    assert repeat_of(lab, LlamaCpp(lab), replace(MIXES, kind="change"))().tokens == 0
    assert {told[0] for told in llama.told} == {"scales"}


def test_without_a_gguf_file_of_the_base_it_says_so(lab: Lab, llama: StandIn) -> None:
    assert LlamaCpp(lab).reason(MIXES) is None
    lab.origin = replace(lab.origin, base="some/model")
    assert LlamaCpp(lab).reason(MIXES) == "no GGUF file of this base here"
