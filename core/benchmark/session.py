"""One run: every workload, its systems interleaved, repeat by repeat."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

from lora_rt.core.base.machine import peak_megabytes
from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.processes import ProcessError, call_apart, cold_command, seconds_to_first_byte
from lora_rt.core.benchmark.results import Measured, Sample
from lora_rt.core.benchmark.systems import LOADERS, Load, System, loaded
from lora_rt.core.benchmark.training import train_ours, train_plainly
from lora_rt.core.benchmark.workloads import BenchmarkError, Origin, Workload, reason

_MOST = {"memory": 1, "cold": 3, "training": 3}
"""Repeats of what needs processes: each costs seconds of loading, they differ by little, and a peak is the same."""

Repeat = Callable[[], Sample]
"""Runs a workload once and says how long the timed part took."""


def measure(
    lab: Lab,
    workloads: Sequence[Workload],
    systems: Sequence[str],
    repeats: int,
    report: Callable[[int, str], None],
    loaders: Mapping[str, Load] = LOADERS,
) -> Iterator[Measured]:
    """Yields each workload's results while they still grow: whoever is interrupted keeps what there is.

    Args:
        report: told of every repeat that is about to be made, with the number of workloads that are done.
        loaders: of other systems than ours.

    Raises:
        BenchmarkError: a system did less, or more, than the workload.
    """
    for done, workload in enumerate(workloads):
        reasons = {system: why for system in systems if (why := reason(system, workload, lab.origin)) is not None}
        measured = Measured(workload, reasons=reasons)
        yield measured
        able = [system for system in systems if system not in reasons]
        with ready(lab, workload, able, loaders) as found:
            _take_turns(measured, found, repeats, partial(report, done))
        del found
        gc.collect()  # what the systems held refers to itself


def _take_turns(measured: Measured, found: Mapping[str, Repeat], repeats: int, report: Callable[[str], None]) -> None:
    kind, title = measured.workload.kind, measured.workload.title
    measured.samples = {name: [] for name in found}
    most = min(repeats, _MOST.get(kind, repeats))
    warm_up = -1 if kind != "training" else 0
    for number in range(warm_up, most):
        for name, repeat in found.items():
            if name in measured.reasons:
                continue
            report(f"{title}: {name} warms up" if number < 0 else f"{title}: {name}, {number + 1} of {most}")
            try:
                sample = repeat()
            except ProcessError as error:  # half an hour of other figures is not lost with it
                measured.reasons[name] = f"failed: {error.problems[-1] if error.problems else error}"
                continue
            if number >= 0:  # before that kernels are compiled, measured and chosen, caches filled, files read
                measured.samples[name].append(sample)


@contextmanager
def ready(
    lab: Lab, workload: Workload, names: Sequence[str], loaders: Mapping[str, Load] = LOADERS
) -> Iterator[dict[str, Repeat]]:
    """The systems that can do the workload, each as what may be called any number of times."""
    if workload.kind in _MOST:
        yield {name: _apart(lab, name, workload) for name in names}
        return
    with loaded(lab, workload, names, loaders) as systems:
        if workload.kind == "change":
            yield {name: partial(_changes, lab, system, workload, count()) for name, system in systems.items()}
        else:
            yield {name: partial(_turn, name, system, workload) for name, system in systems.items()}


def _apart(lab: Lab, system: str, workload: Workload) -> Repeat:
    """What is measured in new processes."""
    if workload.kind == "cold":
        command = cold_command(lab, system, workload)
        return lambda: Sample(seconds_to_first_byte(command, lab.folder))
    if workload.kind == "memory":
        return partial(call_apart, lab.folder, peak_of, system, lab.elsewhere(), workload)
    train = train_ours if system == "ours" else train_plainly
    return partial(call_apart, lab.folder, train, lab.elsewhere(), workload)


def peak_of(system: str, origin: Origin, workload: Workload, folder: Path) -> Sample:
    """The most memory that this process took until it had decoded the workload."""
    lab = Lab(origin, folder)
    with ready(lab, replace(workload, kind="decode"), [system]) as found:
        return replace(found[system](), tokens=0, megabytes=round(peak_megabytes(lab.device), 1))


def _changes(lab: Lab, system: System, workload: Workload, numbers: Iterator[int]) -> Sample:
    """Seconds per change, each to a composition that was not there before."""
    system.prepare()
    mixes = [workload.mix(next(numbers)) for _ in range(system.changes)]
    start = lab.now()
    for mix in mixes:
        system.change(mix)
    return Sample((lab.now() - start) / len(mixes))


def _turn(name: str, system: System, workload: Workload) -> Sample:
    system.prepare()
    turn = system.run()
    if [len(row) for row in turn.tokens] != [workload.steps] * workload.rows:
        said = f"{name} did not say {workload.rows} x {workload.steps} tokens in {workload.name}"
        raise BenchmarkError(said, next_step="Leave that system out, and report this")
    if workload.kind == "prefill":
        return Sample(turn.prefill, workload.rows * workload.prompt_tokens)
    return Sample(turn.decode, workload.rows * workload.new_tokens)
