"""A plugin costs only those who use it: nothing waits for one that it does not need."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from lora_rt.core.cli.app import app
from lora_rt.errors import UsageError
from lora_rt.plugins.manager import OTHERS, SECONDS_VARIABLE, UnknownModeError, load_modes, loading
from lora_rt.plugins.testing import InlinePoint, compose_context, gate_context, objective_context
from lora_rt.registry.registry import Registry
from support.plugins import plugin, point
from support.tiny import Zoo

run = CliRunner().invoke


def lora_rt_gate(context: Any) -> None: ...


def lora_rt_commands(app: typer.Typer) -> None:
    @app.command("hello")
    def hello() -> None:
        print("hello")


def lora_rt_sources(register: Any) -> None:
    register("shelf", lambda name, base: None)


@pytest.fixture
def sleeper() -> Any:
    """A plugin that hangs at its import until the test is over."""
    imported, release = [], threading.Event()

    def load() -> object:
        imported.append(1)
        release.wait(60)
        return plugin(lora_rt_gate)

    made = point(load, "sleeper")
    vars(made)["imported"] = imported
    yield made
    release.set()


def test_what_needs_no_plugin_imports_none(sleeper: Any, installed: Any) -> None:
    """Compositions over built-in modes, shipped adapters, our own commands, and commands that name their plugin."""
    installed(sleeper, point(plugin(lora_rt_commands), "hello"))
    host = load_modes()
    assert host.objective("output-only", objective_context()) is not None
    registry = Registry(sources=host.sources())
    assert registry.resolve("emotion").name == "emotion"
    with pytest.raises(UnknownModeError, match="no plugin provides the mode 'nobody'; there are: hello, outp"):
        host.require("nobody")
    assert run(app, ["show", "emotion", "--json"]).exit_code == 0
    assert run(app, ["hello"]).stdout == "hello\n"
    assert sleeper.imported == []


def test_training_in_a_built_in_mode_asks_no_stranger(sleeper: Any, installed: Any, tmp_path: Path) -> None:
    installed(sleeper)
    (tmp_path / "d.jsonl").write_text('{"scene": "a", "text": "b"}\n')
    done = run(app, ["train", "mine", "--mode", "output-only", "--data", str(tmp_path / "d.jsonl"), "--r", "-4"])
    assert isinstance(done.exception, UsageError)
    assert "-4" in str(done.exception)
    assert sleeper.imported == []


def test_which_package_brings_a_mode_is_known_without_its_import(sleeper: Any, installed: Any) -> None:
    installed(sleeper)
    host = load_modes()
    assert [record.package for record in host.listed("output-only")] == ["lora-rt"]
    assert [record.name for record in host.listed("sleeper")] == ["sleeper"]
    assert host.listed("nobody") == []
    assert sleeper.imported == []


def test_a_composition_over_built_in_modes_is_answered_without_a_stranger(
    sleeper: Any, installed: Any, zoo: Zoo
) -> None:
    """From the command's first look to its last token."""
    installed(sleeper)
    base = ["--base", str(zoo.base("llama")), "--precision", "float32", "--device", "cpu"]
    done = run(app, ["compose", str(zoo.adapter("llama", seed=1)), "-p", "x", "--max-new-tokens", "2", *base, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["terms"][0]["mode"] == "output-only"
    assert sleeper.imported == []


def test_what_a_hook_prints_stays_out_of_the_json(installed: Any, zoo: Zoo) -> None:
    def lora_rt_gate(context: Any) -> None:
        print("from a gate")

    installed(point(plugin(lora_rt_gate)))
    base = ["--base", str(zoo.base("llama")), "--precision", "float32", "--device", "cpu"]
    adapter = str(zoo.adapter("llama", seed=1, mode="stranger"))
    done = run(app, ["compose", adapter, "-p", "x", "--max-new-tokens", "2", *base, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["terms"][0]["mode"] == "stranger"
    assert "from a gate" in done.stderr


def test_those_who_look_at_all_wait_for_all_at_once(installed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight that hang at their import cost one time limit, not eight."""
    monkeypatch.setenv(SECONDS_VARIABLE, "0.5")
    release, together = threading.Event(), threading.Barrier(8)

    def load() -> object:
        together.wait(20)  # broken unless eight are imported at the same time
        release.wait(20)
        return plugin(lora_rt_gate)

    installed(*(point(load, f"sleeper-{n}") for n in range(8)), point(plugin(lora_rt_commands), "fine"))
    records = {r["name"]: r for r in json.loads(run(app, ["plugins", "--json"]).stdout)}
    release.set()
    assert {records[f"sleeper-{n}"]["reason"] for n in range(8)} == {"import: not finished after 0.5 s"}
    assert records["fine"]["status"] == "ok"
    assert not together.broken


def test_hooks_that_all_are_asked_for_are_asked_at_once(installed: Any) -> None:
    together = threading.Barrier(3, timeout=20)

    def asked(hook: str, name: str) -> object:
        def function(app: Any = None, register: Any = None) -> None:
            together.wait()

        function.__name__ = hook
        return point(plugin(function), name)

    installed(*(asked("lora_rt_commands", f"commands-{n}") for n in range(3)))
    assert run(app, ["--help"]).exit_code == 0
    host = load_modes([asked("lora_rt_sources", f"sources-{n}") for n in range(3)])  # type: ignore[misc]
    assert list(host.sources()) == []
    assert [record.reason for record in host.records] == [""] * 3


def test_printing_of_imports_that_overlap_leaves_standard_output_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    gate = threading.Barrier(4, timeout=20)

    def load() -> object:
        gate.wait()
        print("from a stranger")
        return plugin(lora_rt_gate)

    assert len(load_modes([point(load, f"m{n}") for n in range(4)]).modes) == 4
    print("ours")
    assert capsys.readouterr().out == "ours\n"


def test_what_is_no_mode_has_a_group_of_its_own(installed: Any) -> None:
    """It may add commands and sources; a hook of modes is refused there, and it is not a mode."""
    installed(
        InlinePoint("shelf", lambda: plugin(lora_rt_commands, lora_rt_sources), "shelf", group=OTHERS),
        InlinePoint("wrong", lambda: plugin(lora_rt_gate), "wrong", group=OTHERS),
    )
    host = load_modes()
    reasons = {record.name: record.reason for record in host.records}
    assert reasons == {
        "output-only": "",
        "shelf": "",
        "wrong": "lora_rt_gate is a mode's, and this is an entry point of lora_rt.plugins, not of lora_rt.modes",
    }
    assert host.modes == ["output-only"]
    with pytest.raises(UnknownModeError, match="no plugin provides the mode 'shelf'; there are: output-only"):
        host.require("shelf")
    assert [label for label, _ in host.sources()] == ["shelf"]
    assert run(app, ["hello"]).stdout == "hello\n"


def test_the_entry_points_of_both_groups_are_found() -> None:
    assert {point.group for point in loading.installed()[0]} >= {"lora_rt.modes"}


def threads_of(count: int, weigh: Callable[[Any], Any]) -> tuple[Any, set[int]]:
    seen = set()

    def lora_rt_compose(context: Any) -> list[float]:
        seen.add(threading.get_ident())
        return [2.0] * len(context.mine)

    host = load_modes([point(plugin(lora_rt_compose))])
    return host.deciding(["stranger"], lambda: [weigh(host) for _ in range(count)]), seen


def test_the_weights_of_a_request_are_decided_in_one_thread_that_is_not_its_own() -> None:
    weights, seen = threads_of(64, lambda host: host.weights("stranger", compose_context([1.0])))
    assert weights == [[2.0]] * 64
    assert len(seen) == 1
    assert seen != {threading.get_ident()}


def test_a_mode_without_weights_of_its_own_costs_no_thread() -> None:
    host = load_modes([point(plugin(lora_rt_gate))])
    assert host.deciding(["stranger"], threading.get_ident) == threading.get_ident()


@pytest.mark.parametrize("late", [False, True])
def test_in_a_shared_thread_too_the_plugin_that_fails_is_named(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_rt.plugins.manager import PluginError

    monkeypatch.setenv(SECONDS_VARIABLE, "0.2")
    release = threading.Event()

    def fine(context: Any) -> None: ...

    def failing(context: Any) -> None:
        if late:
            release.wait(30)
        raise KeyboardInterrupt

    fine.__name__ = failing.__name__ = "lora_rt_compose"
    host = load_modes([point(plugin(fine), "fine"), point(plugin(failing), "failing")])

    def weigh() -> None:
        host.weights("fine", compose_context([1.0]))
        host.weights("failing", compose_context([1.0]))

    reason = "not finished after 0.2 s" if late else "KeyboardInterrupt"
    with pytest.raises(PluginError, match=f"'failing' .*failed in lora_rt_compose: {reason}"):
        host.deciding(["fine", "failing"], weigh)
    release.set()
    assert host.modes == (["fine"] if late else ["failing", "fine"])
    assert host.gate("fine", gate_context([1], 2)) is None
