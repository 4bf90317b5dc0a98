"""Measures the shipped bridge on the held-out pairs and writes report.json beside this file.

The figures are those of `lora-rt bridge measure --data heldout=examples/bridge/heldout.jsonl --json`. With --seeds N
bridges are trained under other seeds, and what they find and predict stands beside. Needs the extra "chrf".
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
HELD_OUT = HERE / "heldout.jsonl"
SEED = 0  # of the candidates and of the words that are guessed


def trained(folder: Path, seed: int) -> str:
    """A bridge of another seed."""
    if not (folder / "register.json").exists():
        lora_rt = shutil.which("lora-rt", path=str(Path(sys.executable).parent)) or "lora-rt"
        command = ["sh", str(HERE / "train.sh"), lora_rt, str(folder)]
        subprocess.run(command, check=True, env={**os.environ, "SEED": str(seed)})
    return str(folder.absolute())


def measured(bridges: Sequence[str], *options: str) -> list[dict[str, Any]]:
    """What `lora-rt bridge measure` finds of each; where it refuses, it has said why, and this ends as it does."""
    command = ["bridge", "measure", *bridges, "--data", f"heldout={HELD_OUT}", "--seed", str(SEED), *options, "--json"]
    done = subprocess.run([sys.executable, "-m", "lora_rt", *command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    found = json.loads(done.stdout)["bridge"]["heldout"]
    return [found[bridge] for bridge in bridges]


def over_seeds(documents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean, least and most over bridges of what they find in texts, and how well they predict texts (nats a token)."""
    compress = [document["compress"] for document in documents]
    found = {
        "f1": [each["f1"]["mean"] for each in compress],
        "literal": [each["recall"]["literal"]["mean"] for each in compress],
        "hidden": [each["recall"]["hidden"]["mean"] for each in compress],
        "forward": [document["forward"]["bridge"] for document in documents],
    }
    spread = {name: {"mean": statistics.fmean(x), "range": [min(x), max(x)]} for name, x in found.items()}
    return {"count": len(documents), **spread}


def main() -> None:
    """Measure, print and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bridge", nargs="?", default="bridge", help="a reference")
    alone = "an adapter of scene -> text alone, made by `train.sh lora-rt OUT --option compress-weight=0`; "
    alone += "without it the cost of the second direction is left out"
    parser.add_argument("one_direction", nargs="?", help=alone)
    parser.add_argument("--seeds", type=int, default=1, help="above 1, bridges are trained under others")
    parser.add_argument("--work", type=Path, default=HERE.parents[1] / "out" / "bridge", help="where these are kept")
    given = parser.parse_args()
    others = [trained(given.work / f"seed-{seed}", seed) for seed in range(1, given.seeds)]
    pairs = {"train": HERE / "train.jsonl", "heldout": HELD_OUT}
    counts = {name: len(file.read_text().splitlines()) for name, file in pairs.items()}
    started = time.perf_counter()
    beside = ["--one-direction", given.one_direction] if given.one_direction else []
    (document,) = measured([given.bridge], *beside)
    report = {"pairs": counts, "seed": SEED, **document}
    if others:
        report["seeds"] = over_seeds([document, *measured(others)])
    report["seconds"] = round(time.perf_counter() - started)
    written = json.dumps(report, indent=1, ensure_ascii=False)
    (HERE / "report.json").write_text(written + "\n")
    print(written)


if __name__ == "__main__":
    main()
