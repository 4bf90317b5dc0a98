"""Cold start: a process from its start until its first token stands on standard output."""

from __future__ import annotations

import sys
from pathlib import Path

from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.numbers import Sample
from lora_rt.core.benchmark.processes.child import seconds_to_first_byte
from lora_rt.core.benchmark.systems.system import Repeat
from lora_rt.core.benchmark.workloads import Workload

_BARE = Path(__file__).with_name("bare.py")
PROMPT = "There is a spare key under the third stone."


def bare_repeat(lab: Lab, workload: Workload | None = None) -> Repeat:
    """The script that a user of transformers writes, on the folder that lora-rt loads; with adapters by PEFT."""
    adapters: list[str] = []
    if workload is not None:
        paths = lab.shelf.paths(workload)
        adapters = [f"{name}={weight}={paths[name]}" for name, weight in workload.mix(0)]
    dtype = str(lab.base.dtype).removeprefix("torch.")
    command = [sys.executable, str(_BARE), str(lab.base.folder), dtype, str(lab.device), PROMPT, *adapters]
    return lambda: _sample(command, lab.folder)


def compose_repeat(lab: Lab, workload: Workload) -> Repeat:
    """`lora-rt compose`, as a user types it."""
    paths = lab.shelf.paths(workload)
    terms = [f"{paths[name]}:{weight}" for name, weight in workload.mix(0)]
    command = [sys.executable, "-m", "lora_rt", "compose", *terms, "-p", PROMPT, "--max-new-tokens", "1"]
    command += ["--base", str(lab.base.folder), "--precision", lab.base.precision, "--device", str(lab.device)]
    return lambda: _sample([*command, "--temperature", "0"], lab.folder)


def _sample(command: list[str], folder: Path) -> Sample:
    return Sample(seconds_to_first_byte(command, folder))
