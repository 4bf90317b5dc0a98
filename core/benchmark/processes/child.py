"""Starts processes, and times them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lora_rt.errors import LoraRtError

_LAST_LINES = 5


class ChildError(LoraRtError):
    """A process of the benchmark failed."""


def answer_of(module: str, question: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Runs a module of ours with a question, and returns the JSON object on the last line of its output.

    Raises:
        ChildError: it failed; the end of its error output is told.
    """
    command = [sys.executable, "-m", module, json.dumps(question)]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(folder))
    if done.returncode != 0:
        raise _failed(module, done.stderr)
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def seconds_to_first_byte(command: Sequence[str], folder: Path) -> float:
    """From the start of a process to the first byte on its standard output.

    Raises:
        ChildError: it failed, or said nothing.
    """
    with (folder / "errors.txt").open("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=_environment(folder))
        with process:
            assert process.stdout is not None
            first = process.stdout.read(1)
            seconds = time.perf_counter() - start
            process.stdout.read()
        if process.returncode != 0 or not first:
            errors.seek(0)
            raise _failed(command[-1] if len(command) < 4 else " ".join(command[1:4]), errors.read())
    return seconds


def _environment(folder: Path) -> dict[str, str]:
    """A home of its own, so that nothing is left in the user's, and as many threads as here."""
    ours = {
        "LORA_RT_HOME": str(folder / "home"),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return {**os.environ, **ours}


def _failed(what: str, errors: str) -> ChildError:
    lines = [line for line in errors.strip().splitlines() if line][-_LAST_LINES:]
    return ChildError(f"a process of the benchmark failed: {what}", problems=lines, next_step="Leave that workload out")
