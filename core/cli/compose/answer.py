"""One answer: streamed to standard output under a line about its terms, or as one JSON document."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from lora_rt.core.base.progress import step
from lora_rt.core.cli.compose.request import ComposeRequest
from lora_rt.core.cli.console import err, out, print_json
from lora_rt.core.cli.plugin_commands import subcommands_of
from lora_rt.core.cli.scene import recognizes
from lora_rt.core.cli.session import session
from lora_rt.core.cli.wrapping import WordWrap
from lora_rt.core.requests.answered import Answer
from lora_rt.core.requests.named import named_composition
from lora_rt.plugins.contract.terminal import harmless

if TYPE_CHECKING:
    from lora_rt.core.llama_cpp.runtime import LlamaRuntime, LlamaStream
    from lora_rt.core.requests.running import RowStream
    from lora_rt.core.runtime import Runtime

    Speaking = RowStream | LlamaStream


def answer(request: ComposeRequest, *, as_json: bool) -> None:
    """Speak one answer."""
    runtime = request.load()
    assert request.prompt is not None
    if as_json:
        print_json(_answered(runtime, request, request.prompt).document())
        return
    show_terms(runtime, request)
    speak(runtime, request, request.prompt)


def speak(
    runtime: Runtime | LlamaRuntime,
    request: ComposeRequest,
    prompt: Any,
    between: Callable[[Speaking, Callable[[], None]], None] | None = None,
) -> str:
    """Stream an answer to standard output and return it.

    Args:
        between: is called after each piece, with the stream and with what ends the line that is being shown: before
            it says something on lines of its own.
    """
    pieces = []
    width = out.width if out.is_terminal else None
    wrap = WordWrap(width)

    def end_line() -> None:
        nonlocal wrap
        _show(wrap.end() + "\n")
        wrap = WordWrap(width)

    stream = runtime.stream(
        request.asked(prompt), request.composition, scene=request.scene, seed=request.seed, **request.sampling()
    )
    with contextlib.closing(stream):
        with step("reading"):
            piece = next(stream, "")
        while piece:
            pieces.append(piece)
            _show(wrap.feed(harmless(piece)))
            if between is not None:
                between(stream, end_line)
            piece = next(stream, "")
    end_line()
    for text in stream.unheard:
        note = f"{text!r} did not appear, so what waits for it did not act"
        err.print(f"[dim]{escape(note)}[/]", soft_wrap=not err.is_terminal)
    return "".join(pieces)


def _show(text: str) -> None:
    out.print(text, end="", markup=False, soft_wrap=True)
    out.file.flush()


def show_terms(runtime: Runtime | LlamaRuntime, request: ComposeRequest) -> None:
    """Which adapters speak, with which weight, and where each came from; on standard error."""
    lines = _deciding(runtime, request)
    terms = runtime.terms(request.composition)
    for info, weight in terms:
        revision = f"@{info.revision[:12]}" if info.revision else ""
        origin = f"{info.mode}, {info.source}{revision}, sha256 {info.sha256[:8]}"
        lines.append(f"[bold]{escape(info.name)}[/]:{weight:g}  [dim]{escape(origin)}[/]")
    waiting = [term for term in request.composition.terms if term.after is not None]
    lines += [f"[dim]{escape(f'{t.reference.text} waits for {t.after!r}, and acts from there on')}[/]" for t in waiting]
    for mode in dict.fromkeys(info.mode for info, _ in terms):
        if names := subcommands_of(mode):
            lines.append(f"[dim]{escape(mode)} has commands of its own: lora-rt {escape(mode)} {'|'.join(names)}[/]")
    facts = runtime.base
    lines.append(
        f"[dim]over {escape(facts.id)} ({facts.precision}), temperature {request.temperature:g}, seed {request.seed}[/]"
    )
    for line in lines:
        err.print(line, soft_wrap=not err.is_terminal)


def _deciding(runtime: Runtime | LlamaRuntime, request: ComposeRequest) -> list[str]:
    """The named compositions whose mode decides for their adapters, and the scene type that one sees in the prompt."""
    lines = []
    for term in dict.fromkeys(request.composition.terms):
        named = named_composition(term, session().registry.compositions)
        if named is None or not named.mode:
            continue
        text = f"{named.mode}, decides for the adapters below, whose weights are those that it starts from"
        lines.append(f"[bold]{escape(named.name)}[/]:{term.weight:g}  [dim]{escape(text)}[/]")
        if request.scene is None and request.prompt is not None and recognizes(named.name):
            (shares,) = runtime.register_scenes([request.asked(request.prompt)], named.name)  # type: ignore[union-attr]  # llama.cpp has none
            most = sorted(shares.items(), key=lambda item: -item[1])
            told = ", ".join(f"{kind} {share:.0%}" for kind, share in most)
            lines.append(f"[dim]scene type, as {escape(named.name)} sees the prompt: {escape(told)}[/]")
    return lines


def _answered(runtime: Runtime | LlamaRuntime, request: ComposeRequest, prompt: str) -> Answer:
    started = time.perf_counter()
    (text,) = runtime.generate(
        [request.asked(prompt)], request.composition, scenes=request.scene, seed=request.seed, **request.sampling()
    )
    seconds = time.perf_counter() - started
    return Answer(
        prompt=prompt,
        text=text,
        base=runtime.base,
        seed=request.seed,
        terms=runtime.terms(request.composition),
        tokens=len(runtime.tokenizer(text, add_special_tokens=False).input_ids),
        seconds=seconds,
    )
