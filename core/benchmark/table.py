"""The results as one table for a terminal of 100 columns: workloads down, systems across."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from lora_rt.core.benchmark.session import Measured

_HEADS = {
    "base": "base\nalone",
    "generate": "base\ngenerate",
    "ours": "lora-rt",
    "peft-set": "PEFT\nset_adapter",
    "peft-cat": "PEFT\ncat",
    "peft-mixed": "PEFT\nmixed batch",
    "llama.cpp": "llama.cpp",
}


def results_table(measured: Sequence[Measured], rows: Sequence[Mapping[str, Any]], systems: Sequence[str]) -> Table:
    """Each cell: tokens/s (or ms, s), the ratio to the base of the same repeat, and the spread; a number in brackets
    is the reason why there is none, written below the table.
    """
    cells = {(row["workload"], row["system"]): row for row in rows}
    reasons: list[str] = []
    table = Table(title_justify="left", caption_justify="left", padding=(0, 1), pad_edge=False)
    table.add_column("tokens/s\n[dim]ratio to base, spread[/]")
    for system in systems:
        table.add_column(_HEADS.get(system, system), justify="right")
    for item in measured:
        found = [cells.get((item.workload.name, system)) for system in systems]
        if any(found):
            table.add_row(_title(item), *(_cell(row, reasons) for row in found))
    table.caption = "\n".join(f"({number}) {escape(reason)}" for number, reason in enumerate(reasons, 1))
    return table


def _title(item: Measured) -> str:
    unit = {"change": " [dim](ms)[/]", "cold": " [dim](s)[/]"}.get(item.workload.kind, "")
    return escape(item.workload.title) + unit


def _cell(row: Mapping[str, Any] | None, reasons: list[str]) -> str:
    if row is None:
        return ""
    if row["seconds"] is None:
        if row["reason"] not in reasons:
            reasons.append(row["reason"])
        return f"[dim]({reasons.index(row['reason']) + 1})[/]"
    ratio = "" if row["ratio_to_base"] is None else f"{row['ratio_to_base']:.2f} "
    return f"{_value(row)}\n[dim]{ratio}±{row['spread'] * 100:.0f}%[/]"


def _value(row: Mapping[str, Any]) -> str:
    if row["kind"] == "change":
        return f"{row['seconds'] * 1000:.2f}"
    if row["kind"] == "cold":
        return f"{row['seconds']:.2f}"
    return f"{row['tokens_per_s']:.0f}" if row["tokens_per_s"] >= 100 else f"{row['tokens_per_s']:.1f}"
