"""`lora-rt scene`: which scene type a text belongs to, as a context adapter or a composition recognizes it."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

import typer
from rich.cells import cell_len
from rich.markup import escape

from lora_rt.core.cli import options
from lora_rt.core.cli.console import err, out, print_json
from lora_rt.core.cli.look_up import look_up
from lora_rt.core.cli.session import session
from lora_rt.core.cli.wrapping import padded
from lora_rt.core.requests.composition import Composition, Term
from lora_rt.errors import LoraRtError, UsageError
from lora_rt.plugins.manager import UnknownModeError
from lora_rt.registry.errors import StoreError
from lora_rt.registry.reference import Reference


@options.spread
def scene(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The prompt whose scene type is to be recognized.")],
    over: options.OverBase,
    adapter: Annotated[
        str | None,
        typer.Option("--adapter", metavar="REF", help="Whose classifier: an adapter's, or a composition's."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show which scene types a text is recognized as, with the share of each."""
    if not text.strip():
        raise UsageError("the text is empty", next_step="Give the prompt whose scene type is to be recognized")
    form = over.text(text)
    reference = adapter or _first_able()
    parsed = Reference.parse(reference)
    look_up(Composition((Term(parsed),)), over.base)
    runtime = session().runtime(over.base, over.precision, over.device, **form)
    name = reference if parsed.kind == "name" and recognizes(reference) else runtime.ensure(reference)
    (shares,) = runtime.register_scenes([text], name)
    if as_json:
        print_json({"text": text, "adapter": name, "scene_types": shares})
        return
    if adapter is None:  # somebody's own comes before what ships, so it is said whose this is
        err.print(f"[dim]as {escape(name)} recognizes it[/]", soft_wrap=not err.is_terminal)
    width = max(cell_len(kind) for kind in shares)
    for kind, share in sorted(shares.items(), key=lambda item: -item[1]):
        out.print(f"{escape(padded(kind, width))}  {share:6.1%}  {'█' * round(40 * share)}", soft_wrap=True)


def _first_able() -> str:
    """One's own come first: a composition ships with the package, and knows the four registers alone."""
    modes, registry = session().modes, session().registry
    for item in registry.installed():
        with suppress(UnknownModeError):
            if item.card is not None and modes.implements(item.card.mode, "lora_rt_scene"):
                return item.name
    own = registry.compositions.own_names()
    for name in sorted(registry.compositions.names(), key=lambda name: (name not in own, name)):
        if recognizes(name):
            return name
    raise LoraRtError(
        "nothing that is installed recognizes scenes",
        next_step="Name an adapter with --adapter, or train one with --mode context",
    )


def recognizes(name: str) -> bool:
    """Whether a name is a composition's whose mode recognizes scenes."""
    with suppress(UnknownModeError, StoreError):
        named = session().registry.compositions.look_up(name)
        return named is not None and bool(named.mode) and session().modes.implements(named.mode, "lora_rt_scene")
    return False
