"""The matrix as a table for the terminal: loss, interval, and a colour for better or worse than the base."""

from __future__ import annotations

from rich.text import Text

from lora_rt.core.evaluation.matrix import BASE, Matrix

_SHADES = ((1.0, "bold green"), (0.5, "green"), (0.05, "dim green"), (-0.05, "white"), (-10.0, "red"))


TITLE = "negative log-likelihood, nats per response token (95% interval)"


def matrix_table(matrix: Matrix) -> tuple[list[str], list[list[str | Text]]]:
    """Columns (data sets, the base, the compositions) and rows; the lowest loss of a row is underlined."""
    intervals = matrix.intervals()
    specs = list(next(iter(matrix.losses.values())))
    rows: list[list[str | Text]] = []
    for data, row in matrix.losses.items():
        base = row[BASE].mean
        best = min(row, key=lambda spec: row[spec].mean)
        cells: list[str | Text] = [data]
        for spec in specs:
            mean, (low, high) = row[spec].mean, intervals[data][spec]
            style = _shade(base - mean) + (" underline" if spec == best else "")
            cells.append(Text.assemble((f"{mean:.2f}", style), (f"\n{low:.2f} {high:.2f}", "dim")))
        rows.append(cells)
    return ["data", *specs], rows


def _shade(gain: float) -> str:
    return next((style for least, style in _SHADES if gain >= least), "bold red")
