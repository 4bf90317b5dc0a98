"""Every claim here is made of both devices: on the CPU everywhere, on the GPU (marked `gpu`) where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_rt.core.base.precision import PRECISIONS, Precision
from lora_rt.core.runtime import Runtime
from support.features import lacks
from support.tiny import EVEN, MLP, TARGETS, Zoo

Terms = list[tuple[Path, float]]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip(lacks("CUDA"))
    return str(request.param)


@pytest.fixture(params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> Precision:
    found: Precision = request.param
    return found


@pytest.fixture
def terms(zoo: Zoo) -> Terms:
    """Six adapters of different ranks on all linear layers, one with a bias, and weights that differ."""
    targets = [*TARGETS["llama"], *MLP["llama"]]
    weights = (0.7, -0.4, 1.0, 0.5, -0.8, 0.3)
    kinds = [{}, {"r": 3, "use_rslora": True}, {"r": 4}, {"lora_bias": True}, {}, {"r": 4}]
    made = [
        zoo.adapter("llama", changes=EVEN, seed=number, targets=targets, **kind) for number, kind in enumerate(kinds)
    ]
    return list(zip(made, weights, strict=True))


@pytest.fixture
def runtime(zoo: Zoo, device: str, precision: Precision, terms: Terms) -> Runtime:
    """A runtime on that device, in that precision, with the six adapters; shared by all tests of one process."""
    made = zoo.runtime("llama", precision, device=device, **EVEN)
    for adapter, _ in terms:
        zoo.load(made, adapter)
    return made
