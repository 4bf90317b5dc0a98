"""llama.cpp's column: its server is told tokens and scales, a row after the other; a stand-in notes what it is told."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from lora_rt.core.benchmark import systems
from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.session import ready
from lora_rt.core.benchmark.workloads import Workload, reason

MIXES = Workload("w", "w", rows=3, active=2, distinct=True, prompt_tokens=5, new_tokens=2, rank=4)


class StandIn:
    """Says token 3, then that it would end; notes the tokens and the scales, by the names of adapters."""

    made: ClassVar[list[StandIn]] = []

    def __init__(self, gguf: Path, adapters: Sequence[Path], context: int, device: str, threads: int) -> None:
        assert all(path.read_bytes().startswith(b"GGUF") for path in adapters)
        self.adapters, self.threads = list(adapters), threads
        self.told: list[tuple[list[int], dict[str, float]]] = []
        self.closed = False
        StandIn.made.append(self)

    def next_token(
        self, ids: Sequence[int], said: int, scales: Mapping[Path, float], sampling: Any, seed: int
    ) -> int | None:
        assert sampling.greedy
        self.told.append((list(ids), {path.parent.name: scale for path, scale in scales.items()}))
        return None if said == 1 else 3

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch, lab: Lab, tmp_path: Path) -> list[StandIn]:
    package = types.ModuleType("xllamacpp")
    package.__spec__ = importlib.machinery.ModuleSpec("xllamacpp", None)
    monkeypatch.setitem(sys.modules, "xllamacpp", package)
    monkeypatch.setattr(systems, "LlamaServer", StandIn)
    monkeypatch.setattr(StandIn, "made", [])
    (tmp_path / "base.gguf").touch()
    lab.origin = replace(lab.origin, base=str(tmp_path / "base.gguf"), random=None)
    return StandIn.made


def test_every_row_runs_alone_under_its_own_scales_and_goes_on_where_it_would_end(
    lab: Lab, servers: list[StandIn]
) -> None:
    with ready(lab, MIXES, ["llama.cpp"]) as systems:
        sample = systems["llama.cpp"]()
        assert not servers[0].closed
    assert sample.tokens == 3 * 2
    (server,) = servers
    assert server.closed
    assert server.threads == torch.get_num_threads()
    assert [path.parent.name for path in server.adapters] == ["reg00", "reg01", "reg02", "reg03"]
    for row, (mix, prompt) in enumerate(zip(MIXES.mixes, lab.prompts(MIXES), strict=True)):
        passes = server.told[3 * row : 3 * row + 3]
        assert [ids for ids, _ in passes] == [prompt, [*prompt, 3], [*prompt, 3, 3]]
        assert all(scales == dict(mix) for _, scales in passes)


def test_what_it_is_not_asked_for_it_says(lab: Lab, servers: list[StandIn]) -> None:
    def why(workload: Workload) -> str | None:
        return reason("llama.cpp", workload, lab.origin)

    assert why(MIXES) is None
    assert why(replace(MIXES, kind="change")) == "scales are a part of each request"
    assert why(replace(MIXES, sampled=True)) == "measured greedily alone"
    lab.origin = replace(lab.origin, base="some/model")
    assert why(MIXES) == "no GGUF file of this base here"
