"""Commands that plugins add. They are asked for where a name is none of ours."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer

from lora_rt.core.cli.session import session
from lora_rt.core.cli.table import COMMANDS
from lora_rt.errors import LoraRtError
from lora_rt.plugins.manager import PluginError, each

if TYPE_CHECKING:
    from types import TracebackType

    from lora_rt.plugins.manager import ModeHost, Plugin

_HOOK = "lora_rt_commands"
_PANEL = "Commands of plugins"


def examined_modes() -> ModeHost:
    """All plugins after a look at their commands and sources: the records name what is wrong there, too."""
    modes = session().modes
    plugin_commands(modes)
    list(modes.sources())
    return modes


def subcommands_of(mode: str) -> list[str]:
    """The commands of the group that has a mode's name: they are how its adapters are used. None where there is none.

    Asks the mode's own plugin alone.
    """
    own = [_commands_of(plugin).get(mode) for plugin in session().modes.named(mode) if plugin.implements(_HOOK)]
    return list(getattr(own[0] if own else None, "commands", {}))


def command_of(modes: ModeHost, name: str) -> Any:
    """The command of that name, or None. The plugin of the same name is asked first, and alone where it has it."""
    for plugin in modes.named(name):
        if plugin.implements(_HOOK) and (command := _commands_of(plugin).get(name)) is not None:
            return _named(command, plugin)
    return plugin_commands(modes).get(name)


def plugin_commands(modes: ModeHost) -> dict[str, Any]:
    """Name -> command of everything that plugins add; what is refused is noted in the plugin's record.

    The name of a command of ours is refused. Of several commands of one name the plugin of that name has it, or the
    first.
    """
    plugins = modes.offering(_HOOK)
    offered = [
        (name, command, plugin)
        for plugin, commands in zip(plugins, each(plugins, _commands_of), strict=True)
        for name, command in commands.items()
    ]
    found: dict[str, Any] = {}
    owners: dict[str, str] = {}
    refused: dict[Plugin, list[str]] = {}
    for name, command, plugin in sorted(offered, key=lambda item: item[0] != item[2].name):
        if name in COMMANDS:
            refused.setdefault(plugin, []).append(f"the command {name!r} is one of lora-rt's own")
        elif name in found:
            refused.setdefault(plugin, []).append(f"the command {name!r} is taken by the plugin {owners[name]!r}")
        else:
            found[name], owners[name] = _named(command, plugin), plugin.name
    for plugin, problems in refused.items():
        plugin.note(f"{_HOOK}: {'; '.join(problems)}")
    return {name: found[name] for name, _, _ in offered if name in found}


def _commands_of(plugin: Plugin) -> dict[str, Any]:
    """What one plugin adds, built: typer reads the signatures of its functions only now."""
    from lora_rt.core.cli.services import CommandServices

    app = typer.Typer()
    try:
        plugin.ask(_HOOK, app=app, services=CommandServices())
    except PluginError:
        return {}  # its record says why
    try:
        return dict(typer.main.get_group(app).commands)
    except Exception as error:  # typer raises several kinds for what it can't turn into a command line
        plugin.broke(_HOOK, error)
        return {}


def _named(command: Any, plugin: Plugin) -> Any:
    """The command, shown in a panel of its own, which names its plugin when it fails."""
    command.rich_help_panel = command.rich_help_panel or _PANEL
    _guard(command, lambda name, error: plugin.broke(f"the command {name!r}", error))
    return command


def _inside(trace: TracebackType | None) -> TracebackType | None:
    """Where the command's own function begins: behind ours, which calls typer's, which calls it."""
    while trace is not None and trace.tb_frame.f_globals.get("__name__", "").split(".")[0] in ("lora_rt", "typer"):
        trace = trace.tb_next
    return trace


def _guard(command: Any, blame: Callable[[str, Exception], Exception]) -> None:
    for inner in getattr(command, "commands", {}).values():
        _guard(inner, blame)
    own = command.callback
    if own is None:
        return

    @functools.wraps(own)
    def guarded(*arguments: Any, **options: Any) -> Any:
        try:
            return own(*arguments, **options)
        except (LoraRtError, typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise
        except Exception as error:
            raise blame(command.name, error.with_traceback(_inside(error.__traceback__))) from error

    command.callback = guarded
