"""A conversation in the terminal, whose composition can be changed between two answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from rich.markup import escape

from lora_rt.core.cli.compose.answer import show_terms, speak
from lora_rt.core.cli.compose.keyboard import Keyboard
from lora_rt.core.cli.compose.request import ComposeRequest
from lora_rt.core.cli.console import err
from lora_rt.core.cli.failures import explain
from lora_rt.core.cli.look_up import check_scene, look_up
from lora_rt.core.cli.options import composition_of
from lora_rt.core.generation.lengths import LengthError
from lora_rt.errors import LoraRtError

if TYPE_CHECKING:
    from lora_rt.core.cli.compose.answer import Speaking
    from lora_rt.core.llama_cpp.runtime import LlamaRuntime
    from lora_rt.core.runtime import Runtime

_HELP = """\
[bold]/weights emotion:0.2 logic:0.8[/]  change the weights, also during an answer (alone: show them)
[bold]/scene body[/]                     set the scene type (without a word: none)
[bold]/seed 7[/]                         make the next answer repeatable
[bold]/reset[/]                          forget the conversation
[bold]/help[/]  [bold]/quit[/]                   this text; leave (also Ctrl-D)
Ctrl-C stops an answer. What you type during one is the next message."""


@dataclass
class Chat:
    """The conversation so far, and the request that the next answer is made with."""

    runtime: Runtime | LlamaRuntime
    request: ComposeRequest
    keyboard: Keyboard = field(default_factory=Keyboard)
    messages: list[dict[str, str]] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Answer a message; an answer that was cut off with Ctrl-C is not remembered."""
        asked = [*self.messages, {"role": "user", "content": text}]
        try:
            with self.keyboard.collecting():
                answer = speak(self.runtime, self.request, asked, self._between)
        except KeyboardInterrupt:
            err.print("\n[dim](stopped)[/]")
            return
        except LengthError as error:
            if not self.messages:
                raise
            step = "Type /reset to forget the conversation, or a shorter message"
            raise LengthError(error.message, next_step=step, problems=error.problems) from error
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        self.request = replace(self.request, seed=self.request.seed + 1)

    def _between(self, stream: Speaking, end_line: Callable[[], None]) -> None:
        """Weights that were typed while an answer is shown hold from its next token on; a note about each."""
        for line in self.keyboard.poll():
            word, _, spec = line.strip().partition(" ")
            if word != "/weights" or not spec.strip():
                continue
            self.keyboard.withdraw(line)
            end_line()
            try:
                request = self._under(spec)
                stream.compose(request.composition)
            except LoraRtError as error:
                explain(error)
                continue
            self.request = request
            note = f"from here on: {request.composition}"
            err.print(f"[dim]{escape(note)}[/]", soft_wrap=not err.is_terminal)

    def weights(self, spec: str) -> None:
        """Change the weights; the conversation goes on."""
        if spec:
            self.request = self._under(spec)
        show_terms(self.runtime, self.request)

    def _under(self, spec: str) -> ComposeRequest:
        """The request with these weights, its adapters resident."""
        request = self.request.under(composition_of([spec.strip()]))
        self.runtime.terms(request.composition)
        return request

    def scene(self, name: str) -> None:
        """Set or clear the scene type.

        Raises:
            LoraRtError: adapters and compositions in use tell scenes apart, and none has it; their types are named.
        """
        composition, base = self.request.composition, self.request.base
        check_scene(name or None, composition, look_up(composition, base))
        self.request = replace(self.request, scene=name or None)
        err.print(f"[dim]scene type: {escape(name) or 'recognized from each message'}[/]")

    def seed(self, text: str) -> None:
        """Set the seed of the next answer."""
        if not text.isdecimal() or int(text) >= 2**63:
            raise LoraRtError(f"{text!r} is not a seed", next_step="Type a whole number, for instance /seed 7")
        self.request = replace(self.request, seed=int(text))
        err.print(f"[dim]seed {self.request.seed}[/]")

    def reset(self, _rest: str) -> None:
        """Forget the conversation."""
        self.messages = []
        err.print("[dim]the conversation is forgotten[/]")


def chat(request: ComposeRequest) -> None:
    """Talk until /quit or Ctrl-D."""
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
    while (line := talk.keyboard.read()) is not None:
        word, _, rest = line.partition(" ")
        if word in ("/quit", "/exit"):
            return
        try:
            if word in commands:
                commands[word](rest.strip())
            elif word.startswith("/") and "\n" not in line:
                err.print(f"there is no {escape(word)}; /help lists what there is")
            elif line:
                talk.say(line)
        except LoraRtError as error:
            explain(error)
