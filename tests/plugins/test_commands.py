"""Commands of plugins: they are there when they are asked for, never instead of ours, and fail in their own name."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from lora_rt.core.cli.app import app
from lora_rt.core.cli.plugin_commands import subcommands_of
from lora_rt.core.cli.services import CommandServices
from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import Services
from lora_rt.plugins.manager import SECONDS_VARIABLE, PluginError, loading
from lora_rt.registry.inspection import inspect_adapter
from support.adapters import adapter_files, in_parts, write_adapter
from support.plugins import plugin, point

run = CliRunner().invoke


def commands(*functions: Any, **named: Any) -> Any:
    """A plugin that adds these functions as commands."""

    def lora_rt_commands(app: typer.Typer) -> None:
        for function in functions:
            app.command()(function)
        for name, function in named.items():
            app.command(name)(function)

    return plugin(lora_rt_commands)


def hello(name: str, loud: bool = False) -> None:
    """Greet somebody."""
    print(f"hello {name}" + "!" * loud)


def listed() -> dict[str, Any]:
    """What `lora-rt plugins --json` says of the stranger."""
    return next(r for r in json.loads(run(app, ["plugins", "--json"]).stdout) if r["name"] == "stranger")


def test_a_plugin_adds_a_command(installed: Any) -> None:
    installed(point(commands(hello)))
    result = run(app, ["hello", "world", "--loud"])
    assert (result.exit_code, result.stdout) == (0, "hello world!\n")
    assert listed()["status"] == "ok"


def test_a_command_gets_what_it_needs_of_lora_rt_and_may_leave_it(installed: Any, tmp_path: Path) -> None:
    """Its own signature may stay that of an earlier version: `lora_rt_commands(app)`."""
    data = tmp_path / "lines.jsonl"
    data.write_text('{"scene": "rain"}\n')

    def lora_rt_commands(app: typer.Typer, services: Services) -> None:
        @app.command()
        def scenes(file: Path) -> None:
            services.print_json([line["scene"] for line in services.read_lines(file, ("scene",))])

        @app.command()
        def whose(adapter: str) -> None:
            found = services.adapter(adapter)
            services.print_json([found.name, found.mode, found.card["register"], found.folder.is_dir()])

    installed(point(plugin(lora_rt_commands)), point(commands(hello), name="older"))
    assert json.loads(run(app, ["scenes", str(data)]).stdout) == ["rain"]
    assert json.loads(run(app, ["whose", "emotion"]).stdout) == ["emotion", "output-only", "emotion", True]
    assert "there is no adapter 'nobody'" in str(run(app, ["whose", "nobody"]).exception)
    assert run(app, ["hello", "world"]).stdout == "hello world\n"


@pytest.mark.parametrize("parts", [False, True], ids=["one file", "in parts"])
def test_a_command_copies_an_adapter_under_a_mode_of_its_own(tmp_path: Path, *, parts: bool) -> None:
    source, out = write_adapter(tmp_path / "theirs", adapter_files()), tmp_path / "copy"
    if parts:
        in_parts(source)
    services = CommandServices()
    services.copy_adapter(services.adapter(str(source)), out, mode="stranger", state={"knob": torch.ones(2)})
    copy = services.adapter(str(out))
    assert (copy.mode, copy.card["state"]["knob"]["shape"]) == ("stranger", (2,))
    was, now = (inspect_adapter(folder, name="x") for folder in (source, out))
    assert {now.files[name] for name in was.files if name.startswith("adapter_")} <= set(was.files.values())
    assert len(now.modules) == len(was.modules)


def test_the_help_shows_commands_of_plugins_behind_ours(installed: Any) -> None:
    installed(point(commands(hello)))
    text = run(app, ["--help"]).stdout
    assert text.index("doctor") < text.index("Commands of plugins") < text.index("hello")
    assert "Greet somebody." in text
    assert "Greet somebody." in run(app, ["hello", "--help"]).stdout


def test_a_plugin_adds_a_group_of_commands(installed: Any) -> None:
    def lora_rt_commands(app: typer.Typer) -> None:
        inner = typer.Typer()
        inner.command()(hello)
        inner.command()(failing)
        app.add_typer(inner, name="greetings")

    def failing() -> None:
        raise ValueError("nobody there")

    installed(point(plugin(lora_rt_commands)))
    assert run(app, ["greetings", "hello", "world"]).stdout == "hello world\n"
    assert isinstance(run(app, ["greetings", "failing"]).exception, PluginError)


def test_a_group_that_has_the_modes_name_is_how_its_adapters_are_used(installed: Any) -> None:
    def lora_rt_commands(app: typer.Typer) -> None:
        inner = typer.Typer()
        inner.command()(hello)
        app.add_typer(inner, name="greeting")
        app.command("single")(hello)

    made = plugin(lora_rt_commands)
    bridge = next(point for point in loading.installed()[0] if point.name == "bridge")
    installed(point(made, "greeting"), point(made, "single"), bridge)
    assert subcommands_of("greeting") == ["hello"]
    assert subcommands_of("single") == subcommands_of("output-only") == subcommands_of("nobody") == []
    assert "compress" in subcommands_of("bridge")


def test_a_command_of_ours_loads_no_plugin(installed: Any) -> None:
    imported = []
    installed(point(lambda: imported.append(1) or commands(hello)))
    assert run(app, ["--version"]).exit_code == 0
    assert run(app, ["train", "--help"]).exit_code == 0
    assert imported == []
    run(app, ["hello", "world"])
    assert imported == [1]


def test_a_command_can_not_shadow_one_of_ours(installed: Any) -> None:
    installed(point(commands(hello, compose=hello, doctor=hello)))
    assert "hello" not in run(app, ["compose", "--help"]).stdout
    record = listed()
    assert record["status"] == "faulty"
    assert record["reason"] == (
        "lora_rt_commands: the command 'compose' is one of lora-rt's own; the command 'doctor' is one of lora-rt's own"
    )
    assert run(app, ["hello", "world"]).stdout == "hello world\n", "the rest of it is used"


def test_of_two_plugins_with_one_command_the_first_has_it(installed: Any) -> None:
    def other(name: str) -> None:
        print("other")

    installed(point(commands(hello=other), name="stranger"), point(commands(hello), name="a-mode"))
    assert run(app, ["hello", "world"]).stdout == "hello world\n"
    assert listed()["reason"] == "lora_rt_commands: the command 'hello' is taken by the plugin 'a-mode'"


def test_an_unknown_command_is_still_unknown(installed: Any) -> None:
    installed(point(commands(hello)))
    result = run(app, ["halo"])
    assert result.exit_code == 2
    assert "No such command 'halo'" in result.stderr


def _raise(app: Any) -> None:
    raise ValueError("a bad day")


def _exit(app: Any) -> None:
    sys.exit(4)


def _hang(app: Any) -> None:
    time.sleep(30)


def _nonsense(app: typer.Typer) -> None:
    app.command()(7)  # type: ignore[type-var]


BROKEN = {
    "raises": (_raise, "faulty", "ValueError: a bad day"),
    "exits": (_exit, "faulty", "SystemExit: 4"),
    "hangs": (_hang, "broken", "not finished after 0.3 s"),
    "adds what is no command": (_nonsense, "faulty", "AttributeError"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BROKEN)
def test_a_plugin_that_fails_to_add_commands_is_named(
    case: str, installed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, status, reason = BROKEN[case]
    monkeypatch.setenv(SECONDS_VARIABLE, "0.3")

    def lora_rt_commands(app: Any) -> None:
        function(app)

    installed(point(plugin(lora_rt_commands)), point(commands(hello), name="zzz"))
    assert run(app, ["hello", "world"]).stdout == "hello world\n"
    assert run(app, ["--help"]).exit_code == 0
    record = listed()
    assert record["status"] == status
    assert record["reason"].startswith("lora_rt_commands: ")
    assert reason in record["reason"]


def test_a_command_that_fails_names_its_plugin(installed: Any) -> None:
    def stumble() -> None:
        raise ValueError("a bad day")

    installed(point(commands(stumble)))
    error = run(app, ["stumble"]).exception
    assert isinstance(error, PluginError)
    assert "the plugin 'stranger' (stranger-mode 1.0) failed in the command 'stumble': ValueError" in error.message
    assert "(test_commands.py, line " in error.message, "where the plugin was, not what called it"


@pytest.mark.parametrize(
    ("error", "code"), [(typer.Exit(3), 3), (SystemExit(4), 4), (typer.Abort(), 1), (typer.BadParameter("x"), 2)]
)
def test_a_command_ends_as_it_wants_to(error: BaseException, code: int, installed: Any) -> None:
    def leave() -> None:
        raise error

    installed(point(commands(leave)))
    assert run(app, ["leave"]).exit_code == code
    assert listed()["status"] == "ok"


def test_an_explained_error_of_a_command_passes(installed: Any) -> None:
    error = LoraRtError("no such folder")

    def leave() -> None:
        raise error

    installed(point(commands(leave)))
    assert run(app, ["leave"]).exception is error


def test_a_source_that_fails_is_named_by_the_command(installed: Any, caplog: pytest.LogCaptureFixture) -> None:
    def lora_rt_sources(register: Any) -> None:
        raise ValueError("no shelf")

    installed(point(plugin(lora_rt_sources)))
    with caplog.at_level(logging.CRITICAL, "lora_rt.plugins"):
        assert listed()["reason"].startswith("lora_rt_sources: ValueError: no shelf")


def test_the_help_imports_nothing_heavy() -> None:
    """It has 0.3 s, and loads the built-in modes; what they need is imported when they are used."""
    code = (
        "import sys\n"
        "from lora_rt.core.cli.app import app\n"
        "try: app(['--help'])\n"
        "except SystemExit: pass\n"
        "print(*{'torch', 'transformers', 'peft', 'pydantic', 'huggingface_hub'} & set(sys.modules), file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert "compose" in ended.stdout
    assert ended.stderr.split() == []
