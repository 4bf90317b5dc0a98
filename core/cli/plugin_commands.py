"""Commands that plugins add. They are asked for where a name is none of ours."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import typer

from lora_rt.core.cli.table import COMMANDS, load

if TYPE_CHECKING:
    from lora_rt.plugins.manager import ModeHost

_HOOK = "lora_rt_commands"
_PANEL = "Commands of plugins"


def examined_modes() -> ModeHost:
    """The loaded modes after a look at their commands and sources: the records name what is wrong there, too."""
    from lora_rt.plugins.manager import load_modes

    modes = load_modes()
    plugin_commands(modes, COMMANDS)
    modes.sources()
    return modes


def subcommands_of(mode: str) -> list[str]:
    """The commands of the group that has a mode's name: they are how its adapters are used. None where there is none.

    Asks the mode's own plugin alone.
    """
    from lora_rt.plugins.manager import load_modes

    command = load(mode) if mode in COMMANDS else None
    if command is None and mode in (modes := load_modes()).providers(_HOOK):
        command = _commands_of(modes, mode).get(mode)
    return list(getattr(command, "commands", {}))


def plugin_commands(modes: ModeHost, ours: Collection[str]) -> dict[str, Any]:
    """Name -> command of everything that plugins add; what is refused is noted in the plugin's record.

    Args:
        modes: the loaded plugins.
        ours: names that a plugin can't have.
    """
    found: dict[str, Any] = {}
    owners: dict[str, str] = {}
    for mode in modes.providers(_HOOK):
        refused = []
        for name, command in _commands_of(modes, mode).items():
            if name in ours:
                refused.append(f"the command {name!r} is one of lora-rt's own")
            elif name in found:
                refused.append(f"the command {name!r} is taken by the plugin {owners[name]!r}")
            else:
                found[name], owners[name] = _named(command, modes, mode), mode
        if refused:
            modes.note(mode, f"{_HOOK}: {'; '.join(refused)}")
    return found


def _commands_of(modes: ModeHost, mode: str) -> dict[str, Any]:
    """What one plugin adds, built: typer reads the signatures of its functions only now."""
    from lora_rt.core.cli.services import CommandServices
    from lora_rt.plugins.manager import PluginError

    app = typer.Typer()
    try:
        modes.call(mode, _HOOK, app=app, services=CommandServices())
    except PluginError:
        return {}  # its record says why
    try:
        return dict(typer.main.get_group(app).commands)
    except Exception as error:  # typer raises several kinds for what it can't turn into a command line
        modes.broke(mode, _HOOK, error)
        return {}


def _named(command: Any, modes: ModeHost, mode: str) -> Any:
    """The command, shown in a panel of its own, which names its plugin when it fails."""
    command.rich_help_panel = command.rich_help_panel or _PANEL
    _guard(command, lambda name, error: modes.broke(mode, f"the command {name!r}", error))
    return command


def _guard(command: Any, blame: Callable[[str, Exception], Exception]) -> None:
    from lora_rt.errors import LoraRtError

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
            raise blame(command.name, error) from error

    command.callback = guarded
