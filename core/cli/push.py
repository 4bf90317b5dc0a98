"""`lora-rt push NAME org/repo`: an adapter to the Hub, with a card that the Hub renders."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from lora_rt.core.cli.console import err, out, print_json
from lora_rt.core.cli.options import Json
from lora_rt.core.cli.session import session
from lora_rt.registry.hub.upload import push as run


def push(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An installed adapter, or a path.")],
    repo: Annotated[str, typer.Argument(metavar="ORG/REPO", help="Where it goes; made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    as_json: Json = False,
) -> None:
    """Push an adapter to the Hub together with a model card."""
    adapter = session().registry.resolve(name, offline=True)
    with err.status(f"pushing {escape(adapter.name)}"):
        commit = run(adapter, repo, private=private)
    if as_json:
        print_json({"name": adapter.name, "repo": repo, "revision": commit})
        return
    out.print(f"pushed [bold]{escape(adapter.name)}[/] to {repo}@{commit}", soft_wrap=True)
