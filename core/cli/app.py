"""The typer application: our commands from the table, those of plugins where they are asked for, and how each ends."""

from __future__ import annotations

import os
import sys
from difflib import get_close_matches
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from lora_rt.core.base.progress import plain_wanted
from lora_rt.core.base.silence import silence_this_process
from lora_rt.core.cli.console import hear_notes, settle_streams
from lora_rt.core.cli.failures import explain
from lora_rt.core.cli.plugin_commands import command_of, plugin_commands
from lora_rt.core.cli.session import new_session, session
from lora_rt.core.cli.table import COMMANDS, load
from lora_rt.core.cli.upstream import MISUSE, believe_the_named_shell, plain, plain_help
from lora_rt.errors import LoraRtError
from lora_rt.plugins.manager import load_modes
from lora_rt.version import __version__

_HELP_SECONDS = 2.0  # what `--help` waits for plugins


class CommandGroup(TyperGroup):
    """Ours are placeholders with a line of help until one is called; a name that is none of ours asks plugins."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands.update({name: TyperCommand(name, help=line) for name, line in COMMANDS.items()})
        self._theirs: dict[str, Any] | None = None
        plain(self)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command by name; of ours, the placeholder."""
        ours = super().get_command(ctx, cmd_name)
        if ours is not None or (self._theirs and cmd_name in self._theirs):
            return ours or (self._theirs or {})[cmd_name]
        found = command_of(session().modes, cmd_name)
        return plain(found) if found is not None else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is called, its module imported."""
        # What is suggested where there is no such command is looked for among all of them.
        self.suggest_commands = False
        try:
            name, command, rest = super().resolve_command(ctx, args)
        except MISUSE as error:
            near = get_close_matches(args[0], [*COMMANDS, *plugin_commands(session().modes)], 1)
            error.message = error.message.rstrip(".") + (f". Did you mean {near[0]!r}?" if near else ".")
            raise
        return name, plain(load(name)) if name in COMMANDS else command, rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command in a session of its own."""
        with new_session():
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt as error:  # typer would end without a word
                raise typer.Exit(explain(error) or 0) from error
            except EOFError as error:  # typer would take it for a Ctrl-D; a full disk cuts Python's compiled files off
                step = "If a disk was full here, remove the __pycache__ folders of lora-rt and of what it stands on"
                raise LoraRtError(f"a file ends too early: {error}", next_step=step) from error

    def list_commands(self, ctx: Any) -> list[str]:
        """Our names, then the plugins'; slow plugins are left out of the help, all of them while a shell completes."""
        ours = super().list_commands(ctx)
        if ctx.resilient_parsing:
            return ours

        found = plugin_commands(load_modes(patience=_HELP_SECONDS))
        self._theirs = {name: plain(command) for name, command in found.items()}
        return [*ours, *self._theirs]


app = typer.Typer(
    name="lora-rt",
    cls=CommandGroup,
    help="One quantized base model, several registers composed over it. "
    "A register is a LoRA adapter named for what it expresses.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


@app.callback(invoke_without_command=True)
def _options(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        typer.echo(f"lora-rt {__version__}")
        raise typer.Exit


def run() -> None:
    """Run the command line and exit: 0 success, 1 an explained failure, 2 usage."""
    # Xet's transfers do not go through Python, where the Hub's other requests get their limits.
    for name, value in (("CONNECT_TIMEOUT", "10s"), ("READ_TIMEOUT", "30s"), ("RETRY_MAX_DURATION", "60s")):
        os.environ.setdefault(f"HF_XET_CLIENT_{name}", value)
    # bitsandbytes hands functions to torch.compile while it is imported, which costs a second and is never used here.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # pydantic and torch look through all installed packages for plugins of theirs, and fail with a damaged one; here
    # none of those is used.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    settle_streams()
    if sys.argv[1:2] and sys.argv[1] in ("--show-completion", "--install-completion") and sys.argv[2:]:
        believe_the_named_shell()
    if plain_wanted():
        plain_help()
    silence_this_process()
    hear_notes()
    try:
        code = app(prog_name="lora-rt", standalone_mode=False)  # what goes wrong comes here, to be said in one way
        sys.exit(code if isinstance(code, int) else 0)
    except SystemExit:
        raise
    except BaseException as error:
        code = explain(error)
        if code is None:
            raise
        sys.exit(code)
