"""Systems take turns, repeat by repeat, and what was measured before an interruption is kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lora_rt.core.benchmark import session
from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.results import Sample, rows
from lora_rt.core.benchmark.session import measure
from lora_rt.core.benchmark.systems import System, Turn
from lora_rt.core.benchmark.workloads import BenchmarkError, Kind, Workload

pytestmark = pytest.mark.slow

Tell = Callable[[int, str], None]
WORKLOAD = Workload("w", "w")


class Noted(System):
    """A system that notes its turns, each of a second; it is interrupted in its `stop`-th."""

    def __init__(self, name: str, log: list[str], stop: int = 100, reason: str | None = None, short: int = 0) -> None:
        self.name = name
        self._log = log
        self._left = stop
        self._reason = reason
        self._short = short

    def reason(self, workload: Workload) -> str | None:
        return self._reason

    def run(self, workload: Workload) -> Turn:
        self._log.append(self.name)
        self._left -= 1
        if self._left < 0:
            raise KeyboardInterrupt
        return Turn(1.0, 1.0, [[0] * (workload.steps - self._short)] * workload.rows)


def test_after_a_warm_up_the_systems_take_turns(lab: Lab, quiet: Tell) -> None:
    log: list[str] = []
    (item,) = measure(lab, [WORKLOAD], [Noted("base", log), Noted("ours", log)], 3, quiet)
    assert log == ["base", "ours", *["base", "ours"] * 3]
    assert [len(samples) for samples in item.samples.values()] == [3, 3]


def test_a_system_that_cannot_has_a_reason_in_its_row(lab: Lab, quiet: Tell) -> None:
    systems = [Noted("base", []), Noted("ours", [], reason="has no legs")]
    (base, ours) = rows(list(measure(lab, [WORKLOAD], systems, 1, quiet)), ["base", "ours"])
    assert (base["reason"], base["tokens_per_s"]) == (None, 32.0)
    assert (ours["reason"], ours["tokens_per_s"], ours["spread"]) == ("has no legs", None, None)


def test_an_interrupted_run_keeps_what_there_is(lab: Lab, quiet: Tell) -> None:
    running = measure(lab, [WORKLOAD], [Noted("base", []), Noted("ours", [], stop=3)], 5, quiet)
    items = [next(running)]
    with pytest.raises(KeyboardInterrupt):
        next(running)
    found = {row["system"]: row for row in rows(items, ["base", "ours"])}
    assert (found["base"]["repeats"], found["ours"]["repeats"]) == (3, 2)
    assert found["ours"]["ratio_to_base"] == 1.0


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_a_system_that_does_less_than_the_workload_stops_the_run(lab: Lab, quiet: Tell, kind: Kind) -> None:
    with pytest.raises(BenchmarkError, match="ours did not say 1 x"):
        list(measure(lab, [Workload("w", "w", kind=kind)], [Noted("ours", [], short=1)], 1, quiet))


@pytest.mark.parametrize(("kind", "turns"), [("memory", 1), ("training", 3), ("cold", 3)])
def test_what_needs_processes_is_repeated_a_few_times_and_a_peak_once(
    lab: Lab, quiet: Tell, kind: Kind, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "in_process", lambda *_: lambda: Sample(1.0, megabytes=1.0))
    lab.origin = type(lab.origin)()
    (item,) = measure(lab, [Workload("w", "w", kind=kind)], [Noted("base", [])], 9, quiet)
    assert len(item.samples["base"]) == turns


def test_a_random_base_is_not_on_disk_for_other_processes(lab: Lab, quiet: Tell) -> None:
    (item,) = measure(lab, [Workload("w", "w", kind="cold")], [Noted("base", [])], 1, quiet)
    assert item.reasons == {"base": "a random base is not on disk"}
