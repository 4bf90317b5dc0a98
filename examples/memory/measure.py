"""Holds `lora-rt plan` against real runs: the high-water mark of the memory of `lora-rt train`, in fresh processes.

Plans, runs, prints both side by side, and writes report.json beside this file.
Each run is two steps of the default base at int4, on sequences of one length. The mark is the kernel's own
(`ru_maxrss`, of a process that ended). This file imports nothing large, since a child starts with its parent's mark.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS = 2  # the first one has the activations, the second one the optimizer's state beside them
REPORT = Path(__file__).with_name("report.json")
_TOKENS = """
import json
from lora_rt import Runtime
text = Runtime.load("default").text
print(json.dumps([len(text.prompt_ids("rain")), len(text.answer_ids("rain" + " rain" * 49)) - 50]))
"""


@dataclass(frozen=True)
class Case:
    batch: int
    seq: int
    accumulation: int = 1
    checkpointing: bool = False

    @property
    def name(self) -> str:
        parts = f", in {self.accumulation} parts" if self.accumulation > 1 else ""
        return f"{self.batch} x {self.seq}{parts}{', checkpointed' if self.checkpointing else ''}"


CASES = (Case(4, 128), Case(8, 192), Case(4, 256, accumulation=2), Case(8, 256, checkpointing=True))


def plan(case: Case, prompt: int) -> int:
    """Bytes, by `lora-rt plan`."""
    command = [sys.executable, "-m", "lora_rt", "plan", "default", "--precision", "int4", "--device", "cpu", "--json"]
    command += ["--batch", str(case.batch // case.accumulation), "--seq", str(case.seq)]
    command += ["--labels", str(case.seq - prompt)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kind = "training_checkpointed" if case.checkpointing else "training"
    planned: int = json.loads(done.stdout)["precisions"]["int4"][kind]["peak"]
    return planned


def write_data(file: Path, rows: int, words: int) -> Path:
    """Lines of so many words, each of which is a token."""
    text = "rain" + " rain" * (words - 1)
    file.write_text("".join(json.dumps({"scene": "rain", "text": text}) + "\n" for _ in range(rows)))
    return file


def run(case: Case, prompt: int, end: int) -> int:
    """Bytes: the most that `lora-rt train` had in memory at once."""
    with tempfile.TemporaryDirectory() as name:
        folder, words = Path(name), case.seq - prompt - end
        command = [sys.executable, "-m", "lora_rt", "train", "rain", "--mode", "output-only", "--device", "cpu"]
        command += ["--data", str(write_data(folder / "data.jsonl", case.batch * STEPS, words))]
        command += ["--held-out", str(write_data(folder / "held-out.jsonl", 1, words)), "--epochs", "1"]
        command += ["--batch-size", str(case.batch), "--accumulation", str(case.accumulation)]
        command += ["--gradient-checkpointing" if case.checkpointing else "--no-gradient-checkpointing"]
        process = subprocess.Popen([*command, "--out", str(folder / "out")], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the run {case.name} failed with {process.returncode}")
    return usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    which = "'plan' plans alone, and what was measured before stays; numbers run some of the cases alone"
    parser.add_argument("words", nargs="*", metavar="plan|NUMBER", help=which)
    words = parser.parse_args().words
    report: dict[str, Any] = json.loads(REPORT.read_text()) if REPORT.exists() else {"rows": {}}
    if words in ([], ["plan"]):
        done = subprocess.run([sys.executable, "-c", _TOKENS], capture_output=True, text=True, check=True)
        prompt, end = json.loads(done.stdout)
        report |= {"base": "default", "precision": "int4", "device": "cpu", "prompt": prompt, "end": end}
        for case in CASES:
            report["rows"].setdefault(case.name, {})["planned"] = plan(case, prompt)
    for number in range(len(CASES)) if not words else [] if words == ["plan"] else [int(word) for word in words]:
        row = report["rows"][CASES[number].name]
        row["measured"] = run(CASES[number], report["prompt"], report["end"])
    for name, row in report["rows"].items():
        if "measured" in row:
            row["error"] = round(row["planned"] / row["measured"] - 1, 3)
            sizes = f"{row['planned'] / 2**20:7.0f} MiB planned {row['measured'] / 2**20:7.0f} MiB measured"
            print(f"{name:24} {sizes}  {row['error']:+.1%}")
    REPORT.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
