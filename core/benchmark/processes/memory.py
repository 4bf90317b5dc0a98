"""The peak memory of one system, in a process that holds nothing else."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.numbers import Sample
from lora_rt.core.benchmark.origin import Origin
from lora_rt.core.benchmark.processes.child import answer_of
from lora_rt.core.benchmark.systems.system import Repeat
from lora_rt.core.benchmark.workloads import Workload


def memory_repeat(lab: Lab, system: str, workload: Workload) -> Repeat:
    """Runs the workload once in a new process."""
    question = {"system": system, "origin": asdict(lab.elsewhere()), "workload": asdict(workload)}

    def repeat() -> Sample:
        answer = answer_of(__name__, question, lab.folder)
        return Sample(answer["seconds"], megabytes=answer["megabytes"])

    return repeat


def peak_megabytes(device: torch.device) -> float:
    """The most memory so far, in MB: of a GPU what torch has allocated, else the process' resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")
    if status.exists():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024 / 1e6
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def main() -> None:
    """Answers one question, given as JSON."""
    from lora_rt.core.benchmark.systems.all import make_systems

    question = json.loads(sys.argv[1])
    workload = Workload(**{**question["workload"], "kind": "decode", "targets": tuple(question["workload"]["targets"])})
    with tempfile.TemporaryDirectory(prefix="lora-rt-bench-") as folder:
        lab = Lab(Origin(**question["origin"]), Path(folder))
        (system,) = make_systems([question["system"]], lab)
        sample = system.prepare(workload)()
        print(json.dumps({"seconds": sample.seconds, "megabytes": round(peak_megabytes(lab.device), 1)}))


if __name__ == "__main__":
    main()
