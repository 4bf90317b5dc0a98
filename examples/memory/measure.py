"""Holds `lora-rt plan` against real runs: the high-water mark of the memory of `lora-rt train`, in fresh processes.

    python examples/memory/measure.py         prints planned beside measured, and writes report.json beside this file
    python examples/memory/measure.py 0 2     the same for some of the cases

Each run is six steps of the default base at int4, on sequences of one length. The mark is the kernel's own
(`ru_maxrss`, of a process that ended). This file imports nothing large, since a child starts with its parent's mark.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

STEPS = 6
REPORT = Path(__file__).with_name("report.json")
CASES: tuple[tuple[int, int, tuple[str, ...]], ...] = (
    (4, 128, ()),
    (8, 384, ()),
    (8, 384, ("--accumulation", "4")),
    (8, 384, ("--gradient-checkpointing",)),
)
_TOKENS = """
import json, sys
from lora_rt.core.base.precision import check_precision
from lora_rt.core.base.prepare import prepare_base
from lora_rt.core.base.reading import whole_tokenizer
from lora_rt.core.base.source import parse_base
from lora_rt.core.generation.prompts import answer_ids, prompt_ids
tokenizer = whole_tokenizer(prepare_base(parse_base("default"), check_precision("int4")).folder)
print(json.dumps([len(prompt_ids(tokenizer, "rain")), len(answer_ids(tokenizer, "rain" + " rain" * 49))]))
"""


def tokens() -> tuple[int, int]:
    """Of the prompt, and of an answer of fifty words."""
    done = subprocess.run([sys.executable, "-c", _TOKENS], capture_output=True, text=True, check=True)
    prompt, answer = json.loads(done.stdout)
    return prompt, answer


def write_data(folder: Path, seq: int, rows: int, prompt: int, extra: int) -> Path:
    """Lines whose sequences all have `seq` tokens: a word is a token, and `extra` tokens of an answer are none."""
    text = "rain" + " rain" * (seq - prompt - extra - 1)
    file = folder / f"{seq}-{rows}.jsonl"
    file.write_text("".join(json.dumps({"scene": "rain", "text": text}) + "\n" for _ in range(rows)))
    return file


def high_water_mark(command: list[str]) -> int:
    """Bytes: the most that the process had in memory at once."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {process.returncode}")
    return usage.ru_maxrss * 1024


def measure(folder: Path, batch: int, seq: int, options: tuple[str, ...], sizes: tuple[int, int]) -> dict[str, Any]:
    prompt, answer = sizes
    data = write_data(folder, seq, batch * STEPS, prompt, answer - 50)
    held_out = write_data(folder, seq, batch, prompt, answer - 50)
    out = folder / f"out-{batch}-{seq}{''.join(options)}"
    train = [sys.executable, "-m", "lora_rt", "train", "rain", "--mode", "output-only", "--device", "cpu"]
    train += ["--data", str(data), "--held-out", str(held_out), "--batch-size", str(batch), "--epochs", "1"]
    train += ["--accumulation", "1", "--no-gradient-checkpointing", *options, "--out", str(out)]
    parts = int(options[1]) if options[:1] == ("--accumulation",) else 1
    plan = [sys.executable, "-m", "lora_rt", "plan", "default", "--precision", "int4", "--device", "cpu", "--json"]
    plan += ["--batch", str(batch // parts), "--seq", str(seq), "--labels", str(seq - prompt)]
    document = json.loads(subprocess.run(plan, capture_output=True, text=True, check=True).stdout)
    kind = "training_checkpointed" if "--gradient-checkpointing" in options else "training"
    planned = document["precisions"]["int4"][kind]["peak"]
    measured = high_water_mark(train)
    return {
        "labels": seq - prompt,
        "planned": planned,
        "measured": measured,
        "error": round(planned / measured - 1, 3),
    }


def main() -> None:
    chosen = [int(word) for word in sys.argv[1:]] or range(len(CASES))
    report = json.loads(REPORT.read_text()) if REPORT.exists() else {}
    rows = report.get("rows", {})
    with tempfile.TemporaryDirectory() as scratch:
        sizes = tokens()
        for case in chosen:
            batch, seq, options = CASES[case]
            name = f"{batch} x {seq} {' '.join(options)}".strip()
            row = rows[name] = measure(Path(scratch), batch, seq, options, sizes)
            told = f"{row['planned'] / 2**20:7.0f} MiB planned {row['measured'] / 2**20:7.0f} MiB measured"
            print(f"{name:34} {told}  {row['error']:+.1%}", flush=True)
    report = {"base": "default", "precision": "int4", "device": "cpu", "steps": STEPS, "rows": rows}
    REPORT.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
