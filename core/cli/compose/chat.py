"""A conversation in the terminal, whose mix can be changed between two answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from rich.markup import escape

from lora_rt.core.cli.compose.answer import show_terms, speak
from lora_rt.core.cli.compose.request import ComposeRequest
from lora_rt.core.cli.console import err
from lora_rt.core.cli.failures import explain
from lora_rt.core.requests.composition import Composition
from lora_rt.core.runtime import Runtime
from lora_rt.errors import LoraRtError

_HELP = """\
[bold]/weights emotion:0.2 logic:0.8[/]  change the mix (without terms: show it)
[bold]/scene body[/]                     set the scene type (without a word: none)
[bold]/seed 7[/]                         make the next answer repeatable
[bold]/reset[/]                          forget the conversation
[bold]/help[/]  [bold]/quit[/]                   this text; leave (also Ctrl-D)"""


@dataclass
class Chat:
    """The conversation so far, and the request that the next answer is made with."""

    runtime: Runtime
    request: ComposeRequest
    messages: list[dict[str, str]] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Answer a message; an answer that was cut off with Ctrl-C is not remembered."""
        asked = [*self.messages, {"role": "user", "content": text}]
        try:
            answer = speak(self.runtime, self.request, asked)
        except KeyboardInterrupt:
            err.print("\n[dim](stopped)[/]")
            return
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        self.request = replace(self.request, seed=self.request.seed + 1)

    def weights(self, spec: str) -> None:
        """Change the mix; the conversation goes on."""
        if spec:
            composition = Composition.parse(spec)
            self.runtime.terms(composition)
            self.request = replace(self.request, composition=composition)
        show_terms(self.runtime, self.request)

    def scene(self, name: str) -> None:
        """Set or clear the scene type."""
        self.request = replace(self.request, scene=name or None)

    def seed(self, text: str) -> None:
        """Set the seed of the next answer."""
        try:
            self.request = replace(self.request, seed=int(text))
        except ValueError as error:
            raise LoraRtError(f"{text!r} is not a whole number", next_step="Type for instance /seed 7") from error

    def reset(self, _rest: str) -> None:
        """Forget the conversation."""
        self.messages = []


def chat(request: ComposeRequest) -> None:
    """Talk until /quit or Ctrl-D."""
    _line_editing()
    talk = Chat(request.load(), request)
    show_terms(talk.runtime, request)
    err.print("[dim]Type a message, or /help.[/]")
    commands: dict[str, Callable[[str], None]] = {
        "/weights": talk.weights,
        "/scene": talk.scene,
        "/seed": talk.seed,
        "/reset": talk.reset,
        "/help": lambda _rest: err.print(_HELP),
    }
    while (line := _read()) is not None:
        word, _, rest = line.partition(" ")
        if word in ("/quit", "/exit"):
            return
        try:
            if word in commands:
                commands[word](rest.strip())
            elif word.startswith("/"):
                err.print(f"there is no {escape(word)}; /help lists what there is")
            elif line:
                talk.say(line)
        except LoraRtError as error:
            explain(error)


def _read() -> str | None:
    """The next line without its blanks, or None at the end of input; Ctrl-C clears the line."""
    while True:
        try:
            return input("> ").strip()
        except EOFError:
            err.print()
            return None
        except KeyboardInterrupt:
            err.print()


def _line_editing() -> None:
    """Importing readline gives `input` arrow keys and a history; some builds of Python have none."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
