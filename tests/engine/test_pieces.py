"""What steps read of an adapter where it lies: addresses, a copy in half the memory, and what is more than a piece."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_rt.core.engine.pieces import IN, OUT, RANKS, A, B, OwnFactors
from support.engine import Engine
from support.tiny import MLP, TARGETS, Zoo

EVERYWHERE = [*TARGETS["llama"], *MLP["llama"]]


def rounded(path: Path, to: Path) -> Path:
    """The same adapter with numbers that bfloat16 holds."""
    to.mkdir()
    for file in path.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    weights = load_file(path / "adapter_model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, to / "adapter_model.safetensors")
    return to


def at(address: int, rows: int, width: int, narrow: bool) -> torch.Tensor:
    count = rows * width
    if narrow:
        read = np.frombuffer((ctypes.c_uint16 * count).from_address(address), np.uint16)
        return torch.from_numpy(read.copy()).view(torch.bfloat16).view(rows, width).float()
    read = np.frombuffer((ctypes.c_float * count).from_address(address), np.float32)
    return torch.from_numpy(read.copy()).view(rows, width)


@pytest.mark.parametrize("narrow", [False, True])
def test_a_piece_is_an_adapters_own_numbers_where_they_lie(zoo: Zoo, tmp_path: Path, narrow: bool) -> None:
    engine = Engine(zoo.base("llama"))
    path = zoo.adapter("llama", r=4, targets=EVERYWHERE, lora_alpha=8)
    path = rounded(path, tmp_path / "rounded") if narrow else path
    engine.add(path)
    bank = engine.bank
    resident, sites = bank.residents[path.name], bank.topology.sites
    own = OwnFactors(bank.topology)
    gates = np.zeros((1, len(sites)), np.int64)
    assert own.nbytes_of(resident) == 0
    found = own.pieces([resident], [(0, 0)], range(len(sites)), (gates, None))
    assert found is not None
    assert found.narrow.tolist() == [narrow]
    assert own.nbytes_of(resident) == (resident.nbytes // 2 if narrow else 0)  # of numbers that lie there nothing
    for site, facts in zip(sites, found.facts[0], strict=True):
        factors = resident.factors.get(site.name)
        if factors is None:
            assert not facts.any()
            continue
        ranks, width, out = (int(facts[what]) for what in (RANKS, IN, OUT))
        assert (width, out) == (site.in_features, site.out_features)
        assert torch.equal(at(int(facts[A]), ranks, width, narrow), factors.a)
        assert torch.equal(at(int(facts[B]), ranks, out, narrow), factors.b.T)


def test_one_number_that_bfloat16_does_not_hold_keeps_an_adapter_in_float32(zoo: Zoo, tmp_path: Path) -> None:
    engine = Engine(zoo.base("llama"))
    path = rounded(zoo.adapter("llama", r=4, targets=EVERYWHERE), tmp_path / "rounded")
    weights = {name: tensor.float() for name, tensor in load_file(path / "adapter_model.safetensors").items()}
    next(iter(weights.values()))[0, 0] = 1 + 2**-12
    save_file(weights, path / "adapter_model.safetensors")
    engine.add(path)
    own = OwnFactors(engine.bank.topology)
    found = own.pieces([engine.bank.residents[path.name]], [(0, 0)], [0], (np.zeros((1, 1), np.int64), None))
    assert found is not None
    assert not found.narrow.any()


@pytest.mark.parametrize("options", [{"lora_bias": True}, {"use_dora": True}])
def test_what_is_more_than_two_factors_is_in_no_pieces(zoo: Zoo, options: dict[str, bool]) -> None:
    engine = Engine(zoo.base("llama"))
    plain, more = zoo.adapter("llama", r=4, targets=EVERYWHERE), zoo.adapter("llama", targets=["v_proj"], **options)
    engine.add(plain, more)
    topology = engine.bank.topology
    own, active = OwnFactors(topology), [engine.bank.residents[path.name] for path in (plain, more)]
    places = {site.name.rsplit(".", 1)[-1]: number for number, site in enumerate(topology.sites)}
    for name, wanted in (("q_proj", True), ("v_proj", False)):
        gates = np.zeros((2, 1), np.int64), None
        assert (own.pieces(active, [(0, 0), (1, 1)], [places[name]], gates) is not None) == wanted


def test_what_was_looked_at_goes_with_the_adapter(zoo: Zoo) -> None:
    engine = Engine(zoo.base("llama"))
    path = zoo.adapter("llama", r=4, targets=EVERYWHERE)
    engine.add(path)
    own = OwnFactors(engine.bank.topology)
    own.pieces([engine.bank.residents[path.name]], [(0, 0)], [0], (np.zeros((1, 1), np.int64), None))
    assert len(own._known) == 1
    engine.bank.remove(path.name)
    assert len(own._known) == 0
