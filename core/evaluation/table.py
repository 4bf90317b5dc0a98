"""The matrix as a table for the terminal: loss, interval, and a colour for better or worse than the base."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from lora_rt.core.evaluation.matrix import BASE, Matrix

_SHADES = ((1.0, "bold green"), (0.5, "green"), (0.05, "dim green"), (-0.05, "white"), (-10.0, "red"))


def matrix_table(matrix: Matrix) -> Table:
    """Rows are data sets, columns the base and the compositions; the lowest loss of a row is underlined."""
    intervals = matrix.intervals()
    specs = list(next(iter(matrix.losses.values())))
    table = Table(
        title="negative log-likelihood, nats per response token (95% interval)", title_justify="left", title_style=""
    )
    table.add_column("data")
    for spec in specs:
        table.add_column(escape(spec), justify="right")
    for data, row in matrix.losses.items():
        base = row[BASE].mean
        best = min(row, key=lambda spec: row[spec].mean)
        cells = []
        for spec in specs:
            mean, (low, high) = row[spec].mean, intervals[data][spec]
            style = _shade(base - mean) + (" underline" if spec == best else "")
            cells.append(f"[{style}]{mean:.2f}[/]\n[dim]{low:.2f} {high:.2f}[/]")
        table.add_row(escape(data), *cells)
    return table


def _shade(gain: float) -> str:
    return next((style for least, style in _SHADES if gain >= least), "bold red")
