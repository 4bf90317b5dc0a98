"""One run: every workload, its systems interleaved, repeat by repeat; some in processes of their own.

As a program it calls the function that its argument holds, pickled, in a process that holds nothing else.
"""

from __future__ import annotations

import gc
import json
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Any

import torch

from lora_rt.core.base.machine import Watch, machine, peak_megabytes, versions
from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.results import IDLE, Measured, Sample, rows
from lora_rt.core.benchmark.systems import LOADERS, Load, System, loaded
from lora_rt.core.benchmark.training import train_ours, train_plainly
from lora_rt.core.benchmark.workloads import BenchmarkError, Origin, Workload, reason

BARE = Path(__file__).with_name("bare.py")
PROMPT = "There is a spare key under the third stone."
_LAST_LINES = 5
_MOST = {"memory": 1, "cold": 3, "training": 3}
"""Repeats of what needs processes: each costs seconds of loading, they differ by little, and a peak is the same."""

Repeat = Callable[[], Sample]
"""Runs a workload once and says how long the timed part took."""


def run(
    origin: Origin,
    workloads: Sequence[Workload],
    systems: Sequence[str],
    repeats: int,
    threads: int | None,
    folder: Path,
    progress: AbstractContextManager[Callable[[int, str], None]],
    warn: Callable[[str], None],
) -> tuple[dict[str, Any], bool]:
    """What `lora-rt bench --json` prints, and whether it is whole: of an interrupted run it has what there was.

    Args:
        threads: to compute with; torch's default for None.
        folder: an empty one, for what is made on the way.
        progress: begun when the base is loaded; gives the `report` of `measure`.
        warn: told that something else keeps this machine busy.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    watch = Watch()
    if watch.load > IDLE * (cores := os.cpu_count() or 1):
        warn(f"this machine is not idle (load {watch.load:.1f} on {cores} cores): figures will differ between repeats")
    lab, measured, whole = Lab(origin, folder), [], True
    with progress as report:
        try:
            for item in measure(lab, workloads, systems, repeats, report):
                measured.append(item)
        except KeyboardInterrupt:
            whole = False
    document = {
        "machine": {**machine(lab.device), "load": watch.load, "others": watch.others()},
        "versions": versions(),
        "base": lab.base.identity.id,
        "precision": lab.base.precision,
        "systems": list(systems),
        "workloads": [asdict(item.workload) for item in measured],
        "rows": rows(measured, systems),
    }
    return document, whole


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
        with ready(lab, workload, [system for system in systems if system not in reasons], loaders) as found:
            _take_turns(measured, found, repeats, partial(report, done))
        del found
        gc.collect()  # what the systems held refers to itself


def _take_turns(measured: Measured, found: Mapping[str, Repeat], repeats: int, report: Callable[[str], None]) -> None:
    kind, title = measured.workload.kind, measured.workload.title
    most = min(repeats, _MOST.get(kind, repeats))
    for number in range(0 if kind == "training" else -1, most):
        for name in [name for name in found if name not in measured.reasons]:
            report(f"{title}: {name} warms up" if number < 0 else f"{title}: {name}, {number + 1} of {most}")
            try:
                sample = found[name]()
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
        yield {name: partial(_once, lab, name, system, workload, count()) for name, system in systems.items()}


def _apart(lab: Lab, system: str, workload: Workload) -> Repeat:
    """What is measured in new processes."""
    if workload.kind == "cold":
        return partial(first_byte, lab.folder, cold_command(lab, system, workload))
    if workload.kind == "memory":
        return partial(call_apart, lab.folder, peak_of, system, lab.elsewhere(), workload)
    train = train_ours if system == "ours" else train_plainly
    return partial(call_apart, lab.folder, train, lab.elsewhere(), workload)


def peak_of(system: str, origin: Origin, workload: Workload, folder: Path) -> Sample:
    """The most memory that this process took until it had decoded the workload."""
    lab = Lab(origin, folder)
    with ready(lab, replace(workload, kind="decode"), [system]) as found:
        return replace(found[system](), tokens=0, megabytes=round(peak_megabytes(lab.device), 1))


def _once(lab: Lab, name: str, system: System, workload: Workload, numbers: Iterator[int]) -> Sample:
    """One turn, or the seconds per change, each to the composition of a number that was not there before."""
    system.prepare()
    if workload.kind == "change":
        mixes = [workload.mix(next(numbers)) for _ in range(system.changes)]
        start = lab.now()
        for mix in mixes:
            system.change(mix)
        return Sample((lab.now() - start) / len(mixes))
    turn = system.run()
    if [len(row) for row in turn.tokens] != [workload.steps] * workload.rows:
        said = f"{name} did not say {workload.rows} x {workload.steps} tokens in {workload.name}"
        raise BenchmarkError(said, next_step="Leave that system out, and report this")
    if workload.kind == "prefill":
        return Sample(turn.prefill, workload.rows * workload.prompt_tokens)
    return Sample(turn.decode, workload.rows * workload.new_tokens)


def cold_command(lab: Lab, system: str, workload: Workload) -> list[str]:
    """From the start to the first token: `lora-rt compose` as a user types it, or what a user of transformers writes.

    The bare script loads the folder that lora-rt loads; with adapters by PEFT.
    """
    paths, base, device = lab.adapters(workload), str(lab.base.folder), str(lab.device)
    if system == "ours":
        terms = [f"{paths[name]}:{weight}" for name, weight in workload.mix(0)]
        command = [sys.executable, "-m", "lora_rt", "compose", *terms, "-p", PROMPT, "--max-new-tokens", "1"]
        return [*command, "--base", base, "--precision", lab.base.precision, "--device", device, "--temperature", "0"]
    adapters = [f"{name}={weight}={paths[name]}" for name, weight in workload.mix(0)] if system == "peft-set" else []
    dtype = str(lab.base.dtype).removeprefix("torch.")
    return [sys.executable, "-P", str(BARE), base, dtype, device, PROMPT, *adapters]


class ProcessError(BenchmarkError):
    """A process that failed; its last problem is the end of what it wrote of that."""


def first_byte(folder: Path, command: Sequence[str]) -> Sample:
    """From the start of a process to the first byte on its standard output.

    Raises:
        ProcessError: it failed, or said nothing.
    """
    return Sample(_run(folder, command, " ".join(command[1:4]))[0])


def call_apart(folder: Path, function: Callable[..., Sample], *arguments: Any) -> Sample:
    """What a function of a module returns in a new process; its last argument is a folder that is empty.

    Raises:
        ProcessError: it failed.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        call = pickle.dumps((function, (*arguments, Path(scratch)))).hex()
        _, said = _run(folder, [sys.executable, "-m", __name__, call], function.__name__)
    return Sample(**json.loads(said.splitlines()[-1]))


def _run(folder: Path, command: Sequence[str], what: str) -> tuple[float, bytes]:
    """The seconds to the first byte that a process says, and all of it; in a home that is not the user's."""
    ours = {"LORA_RT_HOME": str(folder / "home"), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment = {**os.environ, **ours, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+", dir=folder, errors="replace") as errors:
        start = time.perf_counter()
        with Popen(command, stdin=DEVNULL, stdout=PIPE, stderr=errors, env=environment) as process:
            assert process.stdout is not None
            first = process.stdout.read(1)
            seconds = time.perf_counter() - start
            said = first + process.stdout.read()
        if process.returncode != 0 or not said:
            errors.seek(0)
            lines = [line for line in errors.read().splitlines() if line][-_LAST_LINES:]
            text = f"a process of the benchmark failed: {what}"
            raise ProcessError(text, problems=lines, next_step="Leave that workload out")
    return seconds, said


if __name__ == "__main__":
    called, given = pickle.loads(bytes.fromhex(sys.argv[1]))
    print(json.dumps(asdict(called(*given))))
