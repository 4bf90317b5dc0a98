"""A bridge's figures as a table for the terminal: each one beside what it has to be compared with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.markup import escape
from rich.table import Table

Row = tuple[str, str, str]


def bridge_table(document: dict[str, Any], title: str) -> Table:
    """The table of one bridge on one data set."""
    table = Table(title=escape(title), title_justify="left", title_style="")
    for column in ("measured on held-out pairs", "bridge [95% interval]", "beside"):
        table.add_column(column.replace("[", "\\["))
    for row in _rows(document):
        table.add_row(*(escape(cell) for cell in row))
    return table


def _rows(document: dict[str, Any]) -> Iterator[Row]:
    made, back, through = document["compress"], document["scene_text_scene"], document["text_scene_text"]
    ranks, forward, bits = document["ranking"], document["forward"], document["bits_per_character"]
    controls = ", ".join(f"{name} {value['mean']:.2f}" for name, value in made["controls"].items())
    yield "text -> scene: keyword F1", _shown(made["f1"]), controls
    yield "  minus the best control", _shown(made["minus_best_control"]), made["best_control"]
    yield "  same words", _shown(made["exact"]), ""
    for name, recall in made["recall"].items():
        if recall["words"]:
            yield f"  recall of {name} words", _shown(recall), f"{recall['words']} words"
    for name, value in back.items():
        if name not in ("base", "samples"):
            label = f"scene -> text -> scene: F1, {name.replace('_', ' ')}"
            yield (
                label,
                _shown(value["f1"]),
                f"same words {value['exact']['mean']:.0%}; base {back['base']['f1']['mean']:.2f}",
            )
    yield (
        "text -> scene -> text: chrF",
        _shown(through["chrf"], 1),
        f"another text's {through['another_text']['mean']:.1f}",
    )
    for kind, label in (("logp", "log p(scene | text)"), ("pmi", "PMI")):
        beside = f"base {ranks['base'][kind]['mean']:.0%}"
        yield f"right scene first of {ranks['among']}, {label}", _shown(ranks["bridge"][kind]), beside
    yield "scene -> text: nats per token", f"{forward['bridge']:.3f}", f"base {forward['base']:.3f}"
    if "cost_of_both_directions" in forward:
        cost = _shown(forward["cost_of_both_directions"], 3)
        yield "  cost of the second direction", cost, f"one direction {forward['one_direction']:.3f}"
    yield (
        "bits per character, scene and text",
        _shown(bits["scene_and_text"], 3),
        f"base, text alone {bits['base_text_alone']['mean']:.3f}",
    )


def _shown(value: dict[str, Any], digits: int = 2) -> str:
    low, high = value["ci"]
    return f"{value['mean']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
