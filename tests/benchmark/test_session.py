"""Systems take turns, repeat by repeat, and what was measured before an interruption is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.numbers import Sample
from lora_rt.core.benchmark.results import rows
from lora_rt.core.benchmark.session import measure
from lora_rt.core.benchmark.systems.system import Repeat
from lora_rt.core.benchmark.workloads import Workload

Tell = Callable[[int, str], None]
WORKLOAD = Workload("w", "w")


class Noted:
    """A system that notes its turns; it is interrupted in its `stop`-th repeat."""

    def __init__(self, name: str, log: list[str], stop: int = 100, reason: str | None = None) -> None:
        self.name = name
        self._log = log
        self._stop = stop
        self._reason = reason

    def reason(self, workload: Workload) -> str | None:
        return self._reason

    def prepare(self, workload: Workload) -> Repeat:
        turns = iter(range(self._stop))

        def repeat() -> Sample:
            self._log.append(self.name)
            if next(turns, None) is None:
                raise KeyboardInterrupt
            return Sample(1.0, 10)

        return repeat

    def tokens(self, workload: Workload) -> Sequence[Sequence[int]]:
        return []


def test_after_a_warm_up_the_systems_take_turns(lab: Lab, quiet: Tell) -> None:
    log: list[str] = []
    (item,) = measure(lab, [WORKLOAD], [Noted("base", log), Noted("ours", log)], 3, quiet)
    assert log == ["base", "ours", *["base", "ours"] * 3]
    assert [len(samples) for samples in item.samples.values()] == [3, 3]


def test_a_system_that_cannot_has_a_reason_in_its_row(lab: Lab, quiet: Tell) -> None:
    systems = [Noted("base", []), Noted("ours", [], reason="has no legs")]
    (base, ours) = rows(list(measure(lab, [WORKLOAD], systems, 1, quiet)), ["base", "ours"])
    assert (base["reason"], base["tokens_per_s"]) == (None, 10.0)
    assert (ours["reason"], ours["tokens_per_s"], ours["spread"]) == ("has no legs", None, None)


def test_an_interrupted_run_keeps_what_there_is(lab: Lab, quiet: Tell) -> None:
    running = measure(lab, [WORKLOAD], [Noted("base", []), Noted("ours", [], stop=3)], 5, quiet)
    items = [next(running)]
    with pytest.raises(KeyboardInterrupt):
        next(running)
    found = {row["system"]: row for row in rows(items, ["base", "ours"])}
    assert (found["base"]["repeats"], found["ours"]["repeats"]) == (3, 2)
    assert found["ours"]["ratio_to_base"] == 1.0


def test_what_needs_processes_is_repeated_a_few_times_and_a_peak_once(lab: Lab, quiet: Tell) -> None:
    for kind, turns in (("memory", 1), ("training", 3)):
        log: list[str] = []
        disk = Workload("w", "w", kind=kind)  # type: ignore[arg-type]
        lab.origin = type(lab.origin)()
        list(measure(lab, [disk], [Noted("base", log)], 9, quiet))
        assert len(log) == turns


def test_a_random_base_is_not_on_disk_for_other_processes(lab: Lab, quiet: Tell) -> None:
    (item,) = measure(lab, [Workload("w", "w", kind="cold")], [Noted("base", [])], 1, quiet)
    assert item.reasons == {"base": "a random base is not on disk"}
