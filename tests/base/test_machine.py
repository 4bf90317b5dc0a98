"""What others use of the processor is what neither this process nor its children used."""

from __future__ import annotations

import os

import psutil
import pytest

from lora_rt.core.base import machine


def test_the_share_of_others_is_of_all_cores_and_without_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = os.cpu_count() or 1
    clock, own, used = iter([100.0, 110.0]), iter([3.0, 3.0 + 2 * cores]), iter([0.0, 60.0])
    monkeypatch.setattr(machine.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(machine, "_own_seconds", lambda: next(own))
    monkeypatch.setattr(psutil, "cpu_percent", lambda: next(used))
    assert machine.Watch().others() == pytest.approx(0.4)


def test_a_machine_tells_its_times() -> None:
    watch, before = machine.Watch(), machine._own_seconds()
    sum(range(10**7))
    assert machine._own_seconds() > before
    assert 0 <= watch.others() <= 1
