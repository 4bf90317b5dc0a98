"""Measures the shipped bridge on the held-out pairs and writes report.json beside this file.

The same figures come from `lora-rt bridge measure --data heldout=examples/bridge/heldout.jsonl`. Needs the extra
"chrf".
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from rich.console import Console

from lora_rt import Runtime
from lora_rt.plugins.modes.bridge.measure import BridgeSettings, measure_bridge
from lora_rt.plugins.modes.bridge.table import bridge_table

HERE = Path(__file__).parent


def main() -> None:
    """Measure, print the table, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bridge", nargs="?", default="bridge", help="a reference")
    alone = "an adapter of scene -> text alone, made by `train.sh lora-rt OUT --option compress-weight=0`; "
    alone += "without it the cost of the second direction is left out"
    parser.add_argument("one_direction", nargs="?", help=alone)
    given = parser.parse_args()
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
    report["seconds"] = round(time.perf_counter() - started)
    (HERE / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    Console(width=150).print(bridge_table(document, f"{bridge} on {len(examples)} held-out pairs"))


if __name__ == "__main__":
    main()
