"""Measurements that need a process of their own: peak memory, cold start, training."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.results import Sample
from lora_rt.core.benchmark.workloads import BenchmarkError, Workload

BARE = Path(__file__).with_name("bare.py")
CHILD = "lora_rt.core.benchmark.child"  # by name: it imports the systems
PROMPT = "There is a spare key under the third stone."
_EXAMPLES = 64
_LAST_LINES = 5
_WORDS = "the old house by river keeps its light on while a slow train goes past and nobody there says what they saw"


def in_process(lab: Lab, system: str, workload: Workload) -> Callable[[], Sample]:
    """The repeat of a system whose workload is measured in new processes."""
    if workload.kind == "cold":
        command = cold_command(lab, system, workload)
        return lambda: Sample(seconds_to_first_byte(command, lab.folder))
    question = {"system": system, "origin": asdict(lab.elsewhere()), "workload": asdict(workload)}
    if workload.kind == "training":
        question |= write_pairs(lab.folder)
    return lambda: Sample(**answer_of(CHILD, question, lab.folder))


def cold_command(lab: Lab, system: str, workload: Workload) -> list[str]:
    """From the start to the first token: `lora-rt compose` as a user types it, or what a user of transformers writes.

    The bare script loads the folder that lora-rt loads; with adapters by PEFT.
    """
    paths, base = lab.adapters(workload), str(lab.base.folder)
    if system == "ours":
        terms = [f"{paths[name]}:{weight}" for name, weight in workload.mix(0)]
        command = [sys.executable, "-m", "lora_rt", "compose", *terms, "-p", PROMPT, "--max-new-tokens", "1"]
        command += ["--base", base, "--precision", lab.base.precision, "--device", str(lab.device)]
        return [*command, "--temperature", "0"]
    adapters = [f"{name}={weight}={paths[name]}" for name, weight in workload.mix(0)] if system == "peft-set" else []
    dtype = str(lab.base.dtype).removeprefix("torch.")
    return [sys.executable, "-P", str(BARE), base, dtype, str(lab.device), PROMPT, *adapters]


def write_pairs(folder: Path) -> dict[str, str]:
    """64 pairs whose texts have 20 to 80 words, and one held-out pair: {"data": path, "held_out": path}."""
    files = {"data": folder / "train.jsonl", "held_out": folder / "held-out.jsonl"}
    dice = random.Random(0)
    for file, many in zip(files.values(), (_EXAMPLES, 1), strict=True):
        pairs = [{"scene": _text(dice, 4), "text": _text(dice, dice.randint(20, 80))} for _ in range(many)]
        file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return {name: str(file) for name, file in files.items()}


def _text(dice: random.Random, words: int) -> str:
    return " ".join(dice.choices(_WORDS.split(), k=words))


def answer_of(module: str, question: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Runs a module of ours with a question, and returns the JSON object on the last line of its output.

    Raises:
        BenchmarkError: it failed; the end of its error output is told.
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
        BenchmarkError: it failed, or said nothing.
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


def _environment(folder: Path) -> dict[str, str]:
    """A home of its own, so that nothing is left in the user's, and as many threads as here."""
    ours = {
        "LORA_RT_HOME": str(folder / "home"),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return {**os.environ, **ours}


def _failed(what: str, errors: str) -> BenchmarkError:
    lines = [line for line in errors.strip().splitlines() if line][-_LAST_LINES:]
    text = f"a process of the benchmark failed: {what}"
    return BenchmarkError(text, problems=lines, next_step="Leave that workload out")
