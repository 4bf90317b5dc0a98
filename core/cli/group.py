"""The group of all commands: ours from the table, and those of plugins where they are asked for; and how help looks."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from typer.core import TyperCommand, TyperGroup

from lora_rt.core.cli.failures import MISUSE
from lora_rt.core.cli.plugin_commands import command_of, plugin_commands
from lora_rt.core.cli.session import new_session, session
from lora_rt.core.cli.table import COMMANDS, load

_HELP_SECONDS = 2.0  # what `--help` waits for plugins
_TYPES = {str: "TEXT", int: "INTEGER", float: "NUMBER"}


class CommandGroup(TyperGroup):
    """Ours are placeholders with a line of help until one is called; a name that is none of ours asks plugins."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands.update({name: TyperCommand(name, help=entry.help) for name, entry in COMMANDS.items()})
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
            return super().invoke(ctx)

    def list_commands(self, ctx: Any) -> list[str]:
        """Our names, then the plugins'; slow plugins are left out of the help, all of them while a shell completes."""
        ours = super().list_commands(ctx)
        if ctx.resilient_parsing:
            return ours
        from lora_rt.plugins.manager import load_modes

        found = plugin_commands(load_modes(patience=_HELP_SECONDS))
        self._theirs = {name: plain(command) for name, command in found.items()}
        return [*ours, *self._theirs]


def plain(command: Any) -> Any:
    """The command, its help in a newcomer's words: no `<bool>` behind a flag, no `{NAME...}...` in the usage."""
    params, usage = command.get_params, command.collect_usage_pieces
    command.get_params = lambda ctx: [_plain_parameter(parameter) for parameter in params(ctx)]
    command.collect_usage_pieces = lambda ctx: [piece.replace("{", "").replace("}", "") for piece in usage(ctx)]
    for inner in getattr(command, "commands", {}).values():
        plain(inner)
    return command


def _plain_parameter(parameter: Any) -> Any:
    if parameter.param_type_name == "argument":
        parameter.display_type_rich = lambda ctx: ""
    elif parameter.is_flag:
        parameter.metavar = ""
    elif parameter.metavar is None:
        parameter.metavar = _TYPES.get(parameter.type_descriptor.annotation)
    return parameter
