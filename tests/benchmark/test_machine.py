"""What others use of the processor is what neither this process nor its children used."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from lora_rt.core.benchmark import machine


def test_the_share_of_others_is_of_all_cores_and_without_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = os.cpu_count() or 1
    times: Iterator[tuple[float, ...]] = iter([(100.0, 50.0, 3.0), (110.0, 50.0 + 6 * cores, 3.0 + 2 * cores)])
    monkeypatch.setattr(machine, "_times", lambda: next(times))
    assert machine.Watch().others() == pytest.approx(0.4)


def test_a_machine_tells_its_times() -> None:
    before = machine._times()
    sum(range(10**6))
    after = machine._times()
    assert all(now >= then for now, then in zip(after, before, strict=True))
    assert 0 <= machine.Watch().others() <= 1
