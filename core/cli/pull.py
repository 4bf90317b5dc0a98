"""`lora-rt pull REF`: an adapter from the Hub into the store."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from lora_rt.core.cli import options
from lora_rt.core.cli.console import err, out, print_json, transfer
from lora_rt.core.cli.session import session
from lora_rt.registry.errors import InvalidReferenceError
from lora_rt.registry.hub.pull import pull as run
from lora_rt.registry.reference import Reference
from lora_rt.registry.shipped import shipped
from lora_rt.registry.store import Store


def pull(
    reference: Annotated[str, typer.Argument(metavar="REF", help="org/repo or org/repo@revision.")],
    name: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="Its name here; the repository's if left out.")
    ] = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Pull an adapter from the Hub, pinned to a full commit and checked before it is installed."""
    parsed = Reference.parse(reference)
    if parsed.kind != "hub":
        raise InvalidReferenceError(
            f"{reference!r} is a {parsed.kind}; only repositories are pulled",
            next_step="Write org/repo, or see: lora-rt show",
        )
    with transfer() as report:
        found = run(Store(), parsed, name=name, offline=offline, report=report)
    for item in shipped():
        if item.name == found.name:
            text = f"{found.name!r} means this one now; the one shipped with {item.package} is hidden by it"
            err.print(f"[yellow]note:[/] {escape(text)} (--as gives another name)", soft_wrap=True)
    if source := session().registry.compositions.source(found.name):
        text = f"{found.name!r} is a composition ({source}), too, which is used in place of this one"
        err.print(f"[yellow]note:[/] {escape(text)} (--as gives another name)", soft_wrap=True)
    if as_json:
        print_json(found.document())
        return
    where = f"{parsed.target}@{found.revision or ''}"
    out.print(f"pulled [bold]{escape(found.name)}[/] from {escape(where)}, sha256 {found.sha256}", soft_wrap=True)
