"""Measurements that need a process of their own: peak memory, cold start, training.

As a program it calls the function that it finds pickled on its standard input, in a process that holds nothing else.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.results import Sample
from lora_rt.core.benchmark.workloads import BenchmarkError, Workload


class ProcessError(BenchmarkError):
    """A process that failed; its last problem is the end of what it wrote of that."""


BARE = Path(__file__).with_name("bare.py")
PROMPT = "There is a spare key under the third stone."
_LAST_LINES = 5


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


def seconds_to_first_byte(command: Sequence[str], folder: Path) -> float:
    """From the start of a process to the first byte on its standard output.

    Raises:
        ProcessError: it failed, or said nothing.
    """
    with (folder / "errors.txt").open("w+") as errors:
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=_environment(folder)) as process:
            assert process.stdout is not None
            first = process.stdout.read(1)
            seconds = time.perf_counter() - start
            process.stdout.read()
        if process.returncode != 0 or not first:
            errors.seek(0)
            raise _failed(" ".join(command[1:4]), errors.read())
    return seconds


def call_apart(folder: Path, function: Callable[..., Sample], *arguments: Any) -> Sample:
    """What a function of a module returns in a new process; its last argument is a folder that is empty.

    Raises:
        ProcessError: it failed.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        call = pickle.dumps((function, (*arguments, Path(scratch))))
        command = [sys.executable, "-m", __name__]
        done = subprocess.run(command, input=call, capture_output=True, env=_environment(folder))
    if done.returncode != 0:
        raise _failed(function.__name__, done.stderr.decode(errors="replace"))
    return Sample(**json.loads(done.stdout.splitlines()[-1]))


def _environment(folder: Path) -> dict[str, str]:
    """A home of its own, so that nothing is left in the user's, and as many threads as here."""
    ours = {
        "LORA_RT_HOME": str(folder / "home"),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return {**os.environ, **ours}


def _failed(what: str, errors: str) -> ProcessError:
    lines = [line for line in errors.strip().splitlines() if line][-_LAST_LINES:]
    text = f"a process of the benchmark failed: {what}"
    return ProcessError(text, problems=lines, next_step="Leave that workload out")


if __name__ == "__main__":
    called, given = pickle.load(sys.stdin.buffer)
    print(json.dumps(asdict(called(*given))))
