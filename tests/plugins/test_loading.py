"""Plugins that can't be loaded cost only themselves: the host starts, the others work, the culprit is named."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from lora_rt.core.cli.app import app
from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import hookimpl
from lora_rt.plugins.manager import BLOCK_VARIABLE, GROUP, SECONDS_VARIABLE, ModeHost, UnknownModeError, load_modes
from lora_rt.plugins.manager.loading import installed as installed_modes
from lora_rt.plugins.manager.surface import summary_of
from lora_rt.plugins.testing import objective_context
from support.plugins import plugin, point, torn_package


def lora_rt_gate(context: Any) -> None:
    """A good hook."""


class Doom(BaseException):
    """Neither an Exception nor an exit."""


def failing(error: BaseException) -> Callable[[], object]:
    def load() -> object:
        raise error

    return load


def hanging() -> object:
    time.sleep(60)
    return plugin(lora_rt_gate)


def with_signature(*names: str) -> Callable[[], object]:
    scope: dict[str, Any] = {}
    exec(f"def lora_rt_gate({', '.join(names)}): ...", scope)
    return lambda: plugin(scope["lora_rt_gate"])


def lora_rt_gates(context: Any) -> None: ...


def lora_rt_dance(context: Any) -> None: ...


async def async_gate(context: Any) -> None: ...


async_gate.__name__ = "lora_rt_gate"


@hookimpl(wrapper=True)
def wrapping(context: Any) -> Any:
    return (yield)


def unmarked(context: Any) -> None: ...


class Exploding:
    LORA_RT_API = 1

    def __dir__(self) -> list[str]:
        raise Doom("looked at")


# What happens when the plugin is imported, and a word of the reason that must be given.
BROKEN = {
    "import error": (failing(ModuleNotFoundError("No module named 'nowhere'")), "No module named 'nowhere'"),
    "syntax error": (failing(SyntaxError("invalid syntax")), "SyntaxError"),
    "exit": (failing(SystemExit(3)), "SystemExit: 3"),
    "keyboard interrupt": (failing(KeyboardInterrupt()), "KeyboardInterrupt"),
    "base exception": (failing(Doom("no more")), "Doom: no more"),
    "hanging": (hanging, "not finished after 0.3 s"),
    "explodes when looked at": (lambda: Exploding(), "Doom: looked at"),
    "no API version": (lambda: plugin(lora_rt_gate, api=None), "does not state LORA_RT_API"),
    "another API version": (lambda: plugin(lora_rt_gate, api=2), "written for LORA_RT_API 2"),
    "API version as text": (lambda: plugin(lora_rt_gate, api="1"), "written for LORA_RT_API '1'"),
    "wrong signature": (with_signature("ctx"), "lora_rt_gate takes ctx; it is called with context"),
    "one argument too many": (with_signature("context", "layer"), "lora_rt_gate takes layer"),
    "keywords": (with_signature("**anything"), "lora_rt_gate takes anything"),
    "misspelled hook": (lambda: plugin(lora_rt_gates), "no hook is called lora_rt_gates; near is lora_rt_gate"),
    "invented hook": (lambda: plugin(lora_rt_dance), "no hook is called lora_rt_dance; the hooks are"),
    "async hook": (lambda: plugin(async_gate), "async or a generator"),
    "wrapper": (lambda: plugin(lora_rt_gate=wrapping), "wrapper"),
    "no hook": (lambda: plugin(), "implements no hook"),
    "unmarked hook": (lambda: plugin(lora_rt_gate=unmarked), "lora_rt_gate lacks its @hookimpl"),
    "nothing at all": (lambda: None, "does not state LORA_RT_API"),
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECONDS_VARIABLE, "0.3")


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_named_and_the_others_work(case: str, installed: Any) -> None:
    load, reason = BROKEN[case]
    installed(point(load), point(plugin(lora_rt_gate), name="fine"))
    host = load_modes()
    record = next(record for record in host.records if record.name == "stranger")
    assert (record.status, record.package, record.version) == ("broken", "stranger-mode", "1.0")
    assert reason in record.reason
    assert host.modes == ["fine", "output-only"]
    assert works(host)
    with pytest.raises(UnknownModeError, match="is broken") as caught:
        host.require("stranger")
    assert record.reason in caught.value.message


@pytest.mark.slow
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_named_by_the_command(case: str, installed: Any) -> None:
    load, reason = BROKEN[case]
    installed(point(load))
    listed = CliRunner().invoke(app, ["plugins", "--json"])
    records = {record["name"]: record for record in json.loads(listed.stdout)}
    assert listed.exit_code == 0
    assert records["stranger"].keys() == {"name", "package", "version", "hooks", "status", "reason", "summary"}
    assert (records["stranger"]["status"], records["output-only"]["status"]) == ("broken", "ok")
    assert reason in records["stranger"]["reason"]
    table = CliRunner().invoke(app, ["plugins"])
    assert f"stranger (stranger-mode 1.0) is broken: {records['stranger']['reason']}" in table.stdout


@pytest.mark.parametrize(
    ("docstring", "summary"),
    [("fade-in: comes slowly.\n\nMore.", "comes slowly."), ("\n  It \x1b[31mglows.\n", "It ?[31mglows."), (None, "")],
)
def test_what_a_mode_is_for_is_the_first_line_of_its_docstring(docstring: str | None, summary: str) -> None:
    assert summary_of(ModuleType("fade_in", docstring), "fade-in") == summary


def test_the_command_says_what_a_mode_is_for() -> None:
    assert "a mixture of adapters that is decided anew at every token" in CliRunner().invoke(app, ["plugins"]).stdout


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("name", ["stranger", "stranger-mode", "Stranger_Mode"])
def test_a_blocked_plugin_is_never_imported(
    case: str, name: str, installed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the mode's name or the package's."""
    imported = []
    installed(point(lambda: imported.append(case) or BROKEN[case][0]()))
    monkeypatch.setenv(BLOCK_VARIABLE, f"other, {name}")
    host = load_modes()
    record = next(record for record in host.records if record.name == "stranger")
    assert (record.status, record.reason) == ("blocked", f"named in {BLOCK_VARIABLE}")
    assert imported == []
    assert host.modes == ["output-only"]
    with pytest.raises(UnknownModeError, match="is blocked"):
        host.require("stranger")


def test_of_two_plugins_with_one_name_the_second_is_refused(installed: Any) -> None:
    """Which one is second does not depend on the order on the disk."""
    points = [point(plugin(lora_rt_gate), package=package) for package in ("b-mode", "a-mode")]
    installed(*points)
    packages = {record.package: record for record in load_modes().records}
    assert packages["a-mode"].status == "ok"
    assert (packages["b-mode"].status, packages["b-mode"].reason) == (
        "broken",
        "the mode name 'stranger' is taken by a-mode 1.0",
    )


def test_a_built_in_mode_can_not_be_shadowed(installed: Any) -> None:
    imported = []
    installed(point(lambda: imported.append(1) or plugin(lora_rt_gate), name="output-only", package="aaa"))
    host = load_modes()
    refused = next(record for record in host.records if record.package == "aaa")
    assert refused.status == "broken"
    assert refused.reason.startswith("the mode name 'output-only' is taken by lora-rt")
    assert imported == []
    assert works(host)


def test_a_plugin_may_be_an_object_with_methods() -> None:
    class Mode:
        LORA_RT_API = 1

        @hookimpl(specname="lora_rt_compose")
        def weights(self, context: Any) -> list[float]:
            return [2.0]

        @property
        def lora_rt_trap(self) -> None:
            raise Doom

    host = load_modes([point(Mode())])
    assert [(record.status, record.hooks) for record in host.records] == [("ok", ("lora_rt_compose",))]
    assert host.call("stranger", "lora_rt_compose", context=None) == [2.0]


def test_what_a_plugin_prints_at_import_stays_out_of_the_json(installed: Any) -> None:
    installed(point(lambda: print("hello from a stranger") or plugin(lora_rt_gate)))
    result = CliRunner().invoke(app, ["plugins", "--json"])
    assert len(json.loads(result.stdout)) == 2
    assert "hello from a stranger" in result.stderr


def test_a_reason_is_one_plain_line(installed: Any) -> None:
    """Nothing in it is read as the terminal's or rich's own markup, and it is not a page long."""
    installed(point(failing(ValueError("[red]a\n\x1b[31mb[/nothing] " + "x" * 1000))))
    reason = load_modes().records[1].reason
    assert reason.startswith("import: ValueError: [red]a ?[31mb[/nothing] xxx")
    assert "\x1b" not in reason
    assert len(reason) < 400
    assert reason in CliRunner().invoke(app, ["plugins"]).stdout


def test_the_reason_names_the_line_of_the_plugin(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tripping_mode.py").write_text("import json\n\njson.loads('{')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    reason = load_modes([EntryPoint("stranger", "tripping_mode", GROUP)]).records[0].reason
    assert reason.startswith("import: JSONDecodeError: ")
    assert reason.endswith("(tripping_mode.py, line 3)")


def test_a_package_with_unreadable_entry_points_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torn_package(tmp_path, monkeypatch)
    points, records = installed_modes()
    assert "output-only" in [point.name for point in points]
    assert [(record.package, record.version, record.status) for record in records] == [("torn-mode", "1", "broken")]
    assert "its entry points can't be read: TypeError" in records[0].reason


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_a_time_limit_that_is_none_is_explained(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECONDS_VARIABLE, text)
    with pytest.raises(LoraRtError, match=f"{SECONDS_VARIABLE} is '{text}'"):
        load_modes([])


def works(host: ModeHost) -> bool:
    """Whether output-only answers."""
    return host.objective("output-only", objective_context()) is not None
