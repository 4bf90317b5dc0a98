"""`lora-rt serve`: a server with OpenAI's API, in which every request has its own composition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from rich.markup import escape

from lora_rt.core.cli import options
from lora_rt.core.cli.console import err, warn
from lora_rt.core.cli.pip import ENGINES
from lora_rt.core.cli.session import session
from lora_rt.core.serving.settings import Limits, ServeSettings, listen
from lora_rt.errors import LoraRtError, UsageError
from lora_rt.registry.packages import points_of

_NEEDED = ("fastapi", "uvicorn", "sse_starlette", "prometheus_client")
_GIB = 2**30
_OWN = "lora-rt"


@options.spread
def serve(
    over: options.OverBase,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="BASE REGISTER",
            help="With another --engine: base and registers; flags after -- are that engine's own.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; any but 127.0.0.1 lets other machines connect.")
    ] = ("127.0.0.1"),
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000,
    api_key: Annotated[
        str,
        typer.Option("--api-key", envvar="LORA_RT_API_KEY", help="Key that clients have to send as a bearer token."),
    ] = "",
    admin_key: Annotated[
        str, typer.Option("--admin-key", envvar="LORA_RT_ADMIN_KEY", help="Opens /admin to whoever sends this key.")
    ] = "",
    pin: Annotated[
        list[str] | None, typer.Option("--pin", metavar="NAME", help="Load this adapter now and keep it. Repeatable.")
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            "--allow", metavar="REF", help="Let clients use this path or repository, beside names. Repeatable."
        ),
    ] = None,
    max_rows: Annotated[
        int, typer.Option("--max-rows", min=1, help="Answers that are generated at the same time.")
    ] = 16,
    max_queue: Annotated[
        int,
        typer.Option(
            "--max-queue", min=0, help="Requests that may wait; further ones are refused until there is room."
        ),
    ] = 64,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=2, help="Longest prompt with its answer; the base's context if left out."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="The longest answer where a client names no limit.")
    ] = 512,
    kv_gib: Annotated[
        float | None,
        typer.Option("--kv-gib", min=0.001, help="GiB for keys and values; half of what is free if left out."),
    ] = None,
    prefix_gib: Annotated[
        float, typer.Option("--prefix-gib", min=0, help="GiB of keys and values kept for prompts that begin alike.")
    ] = 0.25,
    adapter_gib: Annotated[
        float, typer.Option("--adapter-gib", min=0, help="GiB of adapters kept in memory while nobody uses them.")
    ] = 1.0,
    deadline: Annotated[
        float, typer.Option("--deadline", min=0.1, help="Longest time for one request, in seconds.")
    ] = 600,
    drain: Annotated[
        float, typer.Option("--drain", min=0, help="Seconds that running answers get after SIGTERM.")
    ] = 30,
    deterministic: Annotated[
        bool,
        typer.Option("--deterministic", help="Compute every answer by itself: the same text every time, but slower."),
    ] = False,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write prompts and answers into the log.")] = False,
    ui: Annotated[
        bool, typer.Option("--ui", help="Also serve a page at /: sliders, a chat, and which register acted where.")
    ] = False,
    engine: Annotated[
        str, typer.Option("--engine", help="What runs the model: lora-rt, or vllm (needs lora-rt-vllm).")
    ] = _OWN,
) -> None:
    """Serve OpenAI's API with compositions as models: every request its own, all in one batch."""
    if engine != _OWN:
        named = [over.base] if over.base != "default" or not words else []
        _other(engine)([*named, *(words or [])], host, port, api_key)
        return
    if words:
        raise UsageError(f"{' '.join(words)} is for another --engine", next_step="Name the base with --base")
    if any(find_spec(name) is None for name in _NEEDED):
        raise LoraRtError("the server needs more packages", next_step='Run: pip install "lora-rt[serve]"')

    settings = ServeSettings(
        host=host,
        port=port,
        api_key=api_key,
        admin_key=admin_key,
        pin=tuple(pin or ()),
        allow=frozenset(allow or ()),
        log_prompts=log_prompts,
        drain=drain,
        deterministic=deterministic,
        limits=Limits(
            rows=max_rows,
            queue=max_queue,
            tokens=max_tokens,
            answer_tokens=max_new_tokens,
            deadline=deadline,
            kv_bytes=None if kv_gib is None else int(kv_gib * _GIB),
            prefix_bytes=int(prefix_gib * _GIB),
            adapter_bytes=int(adapter_gib * _GIB),
        ),
    )
    if not settings.loopback:
        open_to_all = "" if api_key else ", and without --api-key everybody who can connect may use it"
        warn(f"others can connect to {host}{open_to_all}")
    _serve(settings, over, over.text(), ui)


def _other(name: str) -> Callable[[Sequence[str], str, int, str], None]:
    """The engine that an installed package brings, which is called with (words, host, port, key)."""
    found = next((point for point in points_of(ENGINES)[0] if point.name == name), None)
    if found is None:
        brings = f"; pip install lora-rt-{name} brings it" if name == "vllm" else ""
        raise UsageError(f"there is no engine {name!r} here{brings}", next_step=f"Use --engine {_OWN}, or leave it out")
    try:
        engine: Callable[[Sequence[str], str, int, str], None] = found.load()
    except ImportError as error:
        text = f"the engine {name!r} can't be loaded: {error}"
        raise LoraRtError(text, next_step="Install its package anew") from error
    return engine


def _serve(settings: ServeSettings, over: options.OverBase, text: dict[str, Any], ui: bool) -> None:
    # The socket first, then the base: what can't be had is said before seconds go into imports.
    with listen(settings) as bound:
        session().check(over.base, over.precision, over.device)
        from lora_rt.core.serving import page, server

        extend = partial(page.install, base_option="" if over.base == "default" else over.base) if ui else None
        with session().runtime(over.base, over.precision, over.device, **text) as runtime:
            server.log_to_stderr()
            runtime.parts.weigher.told.clear()  # others warn of a mix before they load a base; here clients name it
            announce = partial(_banner, settings=settings, base=runtime.base.id, ui=ui)
            server.serve(runtime, settings, bound, announce=announce, extend=extend)


def _banner(url: str, settings: ServeSettings, base: str, ui: bool) -> None:
    """What is served, and a command that works."""
    key = ' -H "Authorization: Bearer $LORA_RT_API_KEY"' if settings.api_key else ""
    body = '{"model": "emotion:0.7 logic:0.3", "messages": [{"role": "user", "content": "rain, tin roof"}]}'
    err.print(f"[bold]lora-rt[/] serves {escape(base)} at [bold]{url}/v1[/]; Ctrl-C ends it. Try:")
    if ui:
        err.print(f"  the page at [bold]{url}/[/], or")
    err.print(
        f"  curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' \\\n    -d '{body}'",
        markup=False,
        soft_wrap=True,
    )
