"""Systems take turns, repeat by repeat, and what was measured before an interruption is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from lora_rt.core.benchmark import session
from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.results import Sample, rows
from lora_rt.core.benchmark.session import ProcessError, measure
from lora_rt.core.benchmark.systems import Load, System, Turn
from lora_rt.core.benchmark.workloads import BenchmarkError, Kind, Workload

pytestmark = pytest.mark.slow

Tell = Callable[[int, str], None]
WORKLOAD = Workload("w", "w")


def noted(name: str, log: list[str], stop: int = 100, short: int = 0) -> Load:
    """Loads a system that notes its turns, each of a second; it is interrupted in its `stop`-th."""

    @contextmanager
    def load(_lab: Lab, workload: Workload) -> Iterator[dict[str, System]]:
        def run() -> Turn:
            log.append(name)
            if log.count(name) > stop:
                raise KeyboardInterrupt
            return Turn(1.0, 1.0, [[0] * (workload.steps - short)] * workload.rows)

        yield {name: System(run)}
        log.append(f"{name} is gone")

    return load


def test_after_a_warm_up_the_systems_take_turns(lab: Lab, quiet: Tell) -> None:
    log: list[str] = []
    loaders = {name: noted(name, log) for name in ("base", "ours")}
    (item,) = measure(lab, [WORKLOAD], ["base", "ours"], 3, quiet, loaders)
    assert log == ["base", "ours", *["base", "ours"] * 3, "ours is gone", "base is gone"]
    assert [len(samples) for samples in item.samples.values()] == [3, 3]


def test_a_system_that_cannot_has_a_reason_in_its_row(lab: Lab, quiet: Tell) -> None:
    mixes, names = Workload("w", "w", rows=2, distinct=True), ["base", "peft-set"]
    loaders = {"base": noted("base", [])}
    (base, peft) = rows(list(measure(lab, [mixes], names, 1, quiet, loaders)), names)
    assert (base["reason"], base["tokens_per_s"]) == (None, 64.0)
    assert (peft["reason"], peft["tokens_per_s"], peft["spread"]) == ("cannot mix weights in a batch", None, None)


def test_an_interrupted_run_keeps_what_there_is(lab: Lab, quiet: Tell) -> None:
    loaders = {"base": noted("base", []), "ours": noted("ours", [], stop=3)}
    running = measure(lab, [WORKLOAD], ["base", "ours"], 5, quiet, loaders)
    items = [next(running)]
    with pytest.raises(KeyboardInterrupt):
        next(running)
    found = {row["system"]: row for row in rows(items, ["base", "ours"])}
    assert (found["base"]["repeats"], found["ours"]["repeats"]) == (3, 2)
    assert found["ours"]["ratio_to_base"] == 1.0


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_a_system_that_does_less_than_the_workload_stops_the_run(lab: Lab, quiet: Tell, kind: Kind) -> None:
    short = measure(lab, [Workload("w", "w", kind=kind)], ["ours"], 1, quiet, {"ours": noted("ours", [], short=1)})
    with pytest.raises(BenchmarkError, match="ours did not say 1 x"):
        list(short)


@pytest.mark.parametrize(("kind", "turns"), [("memory", 1), ("training", 3), ("cold", 3)])
def test_what_needs_processes_is_repeated_a_few_times_and_a_peak_once(
    lab: Lab, quiet: Tell, kind: Kind, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_apart", lambda *_: lambda: Sample(1.0, megabytes=1.0))
    lab.origin = type(lab.origin)()
    (item,) = measure(lab, [Workload("w", "w", kind=kind)], ["ours"], 9, quiet)
    assert len(item.samples["ours"]) == turns


@pytest.mark.parametrize("kind", ["memory", "cold"])  # the latter warms up
def test_a_process_that_fails_is_a_reason_and_the_others_are_measured(
    lab: Lab, quiet: Tell, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    lab.origin = type(lab.origin)()

    def apart(_lab: Lab, name: str, _workload: Workload) -> Callable[[], Sample]:
        def run() -> Sample:
            if name == "base":
                raise ProcessError("a process failed", problems=["Traceback", "MemoryError: 3 GB"])
            return Sample(1.0, megabytes=1.0)

        return run

    monkeypatch.setattr(session, "_apart", apart)
    (item,) = measure(lab, [Workload("w", "w", kind=kind)], ["base", "ours"], 1, quiet)
    assert item.reasons == {"base": "failed: MemoryError: 3 GB"}
    assert len(item.samples["ours"]) == 1


def test_a_random_base_is_not_on_disk_for_other_processes(lab: Lab, quiet: Tell) -> None:
    (item,) = measure(lab, [Workload("w", "w", kind="cold")], ["base"], 1, quiet)
    assert item.reasons == {"base": "a random base is not on disk"}
