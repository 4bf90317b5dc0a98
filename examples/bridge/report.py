"""Measures the shipped bridge on the held-out pairs and writes report.json beside this file.

The same figures come from `lora-rt bridge measure --data heldout=examples/bridge/heldout.jsonl`. With --seeds N bridges
are trained under other seeds, and what they find and predict stands beside. Needs the extra "chrf".
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lora_rt import HyperBridge, Runtime
from lora_rt.plugins.modes.bridge.measure import SECTIONS, BridgeSettings, InstructedBase, measure_bridge
from lora_rt.plugins.modes.bridge.table import bridge_table

HERE = Path(__file__).parent


def trained(folder: Path, seed: int) -> str:
    """A bridge of another seed."""
    if not (folder / "register.json").exists():
        lora_rt = shutil.which("lora-rt", path=str(Path(sys.executable).parent)) or "lora-rt"
        command = ["sh", str(HERE / "train.sh"), lora_rt, str(folder)]
        subprocess.run(command, check=True, env={**os.environ, "SEED": str(seed)})
    return str(folder.absolute())


def over_seeds(runtime: Runtime, bridges: Sequence[str], examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, least and most over bridges of what they find in texts, and how well they predict texts (nats a token)."""
    base, settings = InstructedBase(runtime), BridgeSettings()
    found: dict[str, list[float]] = {}
    for bridge in bridges:
        ways = (HyperBridge(runtime, bridge), base, examples, settings)
        compress, forward = SECTIONS["compress"](*ways), SECTIONS["forward"](*ways)
        for name, value in (
            ("f1", compress["f1"]["mean"]),
            ("literal", compress["recall"]["literal"]["mean"]),
            ("hidden", compress["recall"]["hidden"]["mean"]),
            ("forward", forward["bridge"]),
        ):
            found.setdefault(name, []).append(value)
    spread = {name: {"mean": float(np.mean(x)), "range": [min(x), max(x)]} for name, x in found.items()}
    return {"count": len(bridges), **spread}


def main() -> None:
    """Measure, print the table, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bridge", nargs="?", default="bridge", help="a reference")
    alone = "an adapter of scene -> text alone, made by `train.sh lora-rt OUT --option compress-weight=0`; "
    alone += "without it the cost of the second direction is left out"
    parser.add_argument("one_direction", nargs="?", help=alone)
    parser.add_argument("--seeds", type=int, default=1, help="above 1, bridges are trained under others")
    parser.add_argument("--work", type=Path, default=HERE.parents[1] / "out" / "bridge", help="where these are kept")
    given = parser.parse_args()
    others = [trained(given.work / f"seed-{seed}", seed) for seed in range(1, given.seeds)]
    bridge, one_direction = given.bridge, given.one_direction
    examples = [json.loads(line) for line in (HERE / "heldout.jsonl").read_text().splitlines()]
    runtime = Runtime.load("default")
    started = time.perf_counter()

    def finished(section: str) -> None:
        print(f"{section} after {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)

    settings = BridgeSettings(one_direction=one_direction)
    document = measure_bridge(runtime, bridge, examples, settings, finished)
    training = sum(1 for _ in (HERE / "train.jsonl").open())
    report = {"pairs": {"train": training, "heldout": len(examples)}, "seed": settings.seed, **document}
    if others:
        report["seeds"] = over_seeds(runtime, [bridge, *others], examples)
    report["seconds"] = round(time.perf_counter() - started)
    (HERE / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    Console(width=150).print(bridge_table(document, f"{bridge} on {len(examples)} held-out pairs"))


if __name__ == "__main__":
    main()
