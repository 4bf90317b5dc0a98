"""The base, each register alone and the composition, side by side: one batch, every row under its own composition."""

from __future__ import annotations

from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from lora_rt.core.cli.compose.answer import show_terms
from lora_rt.core.cli.compose.request import TORCH, ComposeRequest
from lora_rt.core.cli.console import err, out, print_json
from lora_rt.core.requests.answered import Comparison
from lora_rt.core.requests.composition import Composition
from lora_rt.plugins.contract.terminal import harmless

_NARROWEST_COLUMN = 22


def compare_answers(request: ComposeRequest, *, as_json: bool, deterministic: bool = False) -> None:
    """Answer once per column, with the same seed in each; in one batch, or each by itself."""
    runtime = request.load()
    assert request.prompt is not None
    if not as_json:
        show_terms(runtime, request)
    alone = list(dict.fromkeys(term.reference.text for term in request.composition.terms))
    whole = str(request.composition)
    specs: list[str | None] = [None, *alone, *([whole] if whole not in alone else [])]
    compositions = [Composition.of(spec) for spec in specs]
    how = "in one batch" if request.engine == TORCH else "one after the other"
    with err.status(f"{'one answer' if len(specs) == 1 else f'{len(specs)} answers'} {how}"):
        texts = runtime.generate(
            [request.asked(request.prompt)] * len(specs),
            compositions,
            scenes=[request.scene] * len(specs),
            seed=request.seed,
            deterministic=deterministic,
            **request.sampling(),
        )
    found = Comparison(request.prompt, [(spec or "base", text) for spec, text in zip(specs, texts, strict=True)])
    if as_json:
        print_json(found.document())
    else:
        _show(found)


def _show(found: Comparison) -> None:
    """Columns where the terminal is wide enough, panels below one another where it is not."""
    columns = found.columns
    out.print(f"[bold]prompt[/] {escape(harmless(found.prompt.strip()))}")
    if out.width // len(columns) < _NARROWEST_COLUMN:
        for spec, text in columns:
            out.print(Panel(escape(harmless(text.strip())), title=escape(spec), title_align="left"))
        return
    table = Table(*(escape(spec) for spec, _ in columns), expand=True)
    for column in table.columns:
        column.ratio = 1
    table.add_row(*(escape(harmless(text.strip())) for _, text in columns))
    out.print(table)
