"""Measures what the base's precision costs each register, and writes precisions.json beside this file.

The registers were trained over int4. On held-out texts: the loss of base and register in every precision, what the
register gains over the base of the same precision, and how much worse both are than over float32, paired by text. What
was measured is kept, so that a run that was cut off goes on: precisions.py [--texts N] [--work DIR]
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from report import HERE, REGISTERS, gain, kept, read

from lora_rt import Runtime, TextLosses, text_losses

PRECISIONS = ("float32", "bfloat16", "int8", "int4")


def measured(precision: str, texts: int) -> dict[str, Any]:
    """Register -> what of -> the loss of each text and its tokens."""
    held = read("heldout")
    with Runtime.load("default", precision=precision) as runtime:
        found = {}
        for register in REGISTERS:
            losses = {of: text_losses(runtime, held[register][:texts], of or None) for of in ("", register)}
            found[register] = {of or "base": [x.sums.tolist(), x.tokens.tolist()] for of, x in losses.items()}
    return found


def losses_of(pair: list[list[float]]) -> TextLosses:
    """As it was kept."""
    return TextLosses(np.array(pair[0]), np.array(pair[1], dtype=np.int64))


def main() -> None:
    """Measure, print, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=64, help="held-out ones per register")
    parser.add_argument("--work", type=Path, default=HERE.parents[1] / "out" / "precisions", help="what was done")
    parser.add_argument("--precisions", nargs="*", default=list(PRECISIONS), choices=PRECISIONS)
    options = parser.parse_args()
    tables = {
        precision: kept(options.work, f"{precision}-{options.texts}", partial(measured, precision, options.texts))
        for precision in options.precisions
    }
    report: dict[str, Any] = {"texts": options.texts, "precisions": {}}
    for precision, table in tables.items():
        rows = report["precisions"][precision] = {}
        for register in REGISTERS:
            own, base = losses_of(table[register][register]), losses_of(table[register]["base"])
            exact = tables.get("float32", table)[register]
            rows[register] = {
                "base_nll": base.mean,
                "own_nll": own.mean,
                "gain_over_base": gain(own, base),
                "base_worse_than_float32": gain(losses_of(exact["base"]), base),
                "own_worse_than_float32": gain(losses_of(exact[register]), own),
            }
    (HERE / "precisions.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
