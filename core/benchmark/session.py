"""One run: every workload, its systems interleaved, repeat by repeat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count

from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.processes import in_process
from lora_rt.core.benchmark.results import Measured, Sample
from lora_rt.core.benchmark.systems import BaseAlone, Generate, LlamaCpp, Ours, System
from lora_rt.core.benchmark.with_peft import Peft, PeftAdapters, PeftTrainer
from lora_rt.core.benchmark.workloads import PROCESSES, BenchmarkError, Workload

_MOST_PROCESSES = 3  # each costs seconds of loading, and they differ by little

Report = Callable[[int, str], None]
"""Told of every repeat that is about to be made, with the number of workloads that are done."""


def make_systems(names: Sequence[str], lab: Lab) -> list[System]:
    """The systems of these names, in the order of the table."""
    peft = PeftAdapters(lab)
    ways = [Peft(lab, "set", peft), Peft(lab, "cat", peft), Peft(lab, "mixed", peft)]
    systems = [BaseAlone(lab), Generate(lab), Ours(lab), *ways, PeftTrainer(lab), LlamaCpp(lab)]
    return [system for system in systems if system.name in names]


def measure(
    lab: Lab, workloads: Sequence[Workload], systems: Sequence[System], repeats: int, report: Report
) -> Iterator[Measured]:
    """Yields each workload's results while they still grow: whoever is interrupted keeps what there is.

    Raises:
        BenchmarkError: a system did less, or more, than the workload.
    """
    for done, workload in enumerate(workloads):
        measured = Measured(workload)
        yield measured
        _measure(measured, lab, systems, min(repeats, _most_repeats(workload)), partial(report, done))


def repeat_of(lab: Lab, system: System, workload: Workload) -> Callable[[], Sample]:
    """Runs the workload once and says how long the timed part took; may be called any number of times."""
    if workload.kind in PROCESSES:
        return in_process(lab, system.name, workload)
    if workload.kind == "change":
        numbers = count()
        return lambda: _changes(lab, system, workload, numbers)
    return lambda: _turn(system, workload)


def _changes(lab: Lab, system: System, workload: Workload, numbers: Iterator[int]) -> Sample:
    """Seconds per change, each to a composition that was not there before."""
    system.prepare(workload)
    mixes = [workload.mix(next(numbers)) for _ in range(system.changes)]
    start = lab.now()
    for mix in mixes:
        system.change(mix)
    return Sample((lab.now() - start) / len(mixes))


def _turn(system: System, workload: Workload) -> Sample:
    system.prepare(workload)
    turn = system.run(workload)
    if [len(row) for row in turn.tokens] != [workload.steps] * workload.rows:
        said = f"{system.name} did not say {workload.rows} x {workload.steps} tokens in {workload.name}"
        raise BenchmarkError(said, next_step="Leave that system out, and report this")
    if workload.kind == "prefill":
        return Sample(turn.prefill, workload.rows * workload.prompt_tokens)
    return Sample(turn.decode, workload.rows * workload.new_tokens)


def _most_repeats(workload: Workload) -> int:
    """A bound on the repeats: processes are slow to start, and a peak is always the same."""
    if workload.kind == "memory":
        return 1
    return _MOST_PROCESSES if workload.kind in PROCESSES else 1 << 30


def _measure(
    measured: Measured, lab: Lab, systems: Sequence[System], repeats: int, tell: Callable[[str], None]
) -> None:
    workload = measured.workload
    ready: dict[str, Callable[[], Sample]] = {}
    for system in systems:
        if (reason := lab.reason(workload) or system.reason(workload)) is not None:
            measured.reasons[system.name] = reason
            continue
        ready[system.name] = repeat_of(lab, system, workload)
        if workload.kind not in ("memory", "training"):
            tell(f"{workload.title}: {system.name} warms up")
            ready[system.name]()  # not counted: kernels are chosen, caches filled, files read
    measured.samples = {name: [] for name in ready}
    for number in range(repeats):
        for name, repeat in ready.items():
            tell(f"{workload.title}: {name}, {number + 1} of {repeats}")
            measured.samples[name].append(repeat())
