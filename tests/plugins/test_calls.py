"""A hook that fails costs its call: the plugin is named, the others go on, and a later process still knows."""

from __future__ import annotations

import contextvars
import logging
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import Gate, OptionError, read_options
from lora_rt.plugins.manager import SECONDS_VARIABLE, ModeHost, PluginError, PluginRecord, UnknownModeError, load_modes
from lora_rt.plugins.testing import InlinePoint, compose_context, gate_context, objective_context, scene_context
from support.plugins import plugin, point


class Doom(BaseException):
    """Neither an Exception nor an exit."""


ERRORS = [ValueError("a bad day"), SystemExit(2), Doom("no more"), KeyError("gate")]


def host_with(*functions: Any, name: str = "stranger", **others: Any) -> ModeHost:
    return load_modes([point(plugin(*functions, **others), name=name), point(plugin(lora_rt_gate), name="fine")])


def lora_rt_gate(context: Any) -> Gate:
    """The gate of the mode "fine"."""
    return Gate(ranks=torch.tensor([0.5]))


def record(host: ModeHost, name: str = "stranger") -> PluginRecord:
    return next(record for record in host.records if record.name == name)


def raising(hook: str, error: BaseException) -> Any:
    def function(context: Any) -> None:
        raise error

    function.__name__ = hook
    return function


def ask(host: ModeHost, hook: str, mode: str = "stranger") -> Any:
    """Call a hook as core does."""
    if hook == "lora_rt_gate":
        return host.gate(mode, gate_context([1], 2))
    if hook == "lora_rt_scene":
        return host.scene(mode, scene_context())
    if hook == "lora_rt_compose":
        return host.weights(mode, compose_context([1.0]))
    return host.objective(mode, objective_context())


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("hook", ["lora_rt_gate", "lora_rt_scene", "lora_rt_compose", "lora_rt_objective"])
def test_a_raising_hook_is_named_and_the_others_work(hook: str, error: BaseException) -> None:
    host = host_with(raising(hook, error))
    with pytest.raises(PluginError) as caught:
        ask(host, hook)
    assert caught.value.__cause__ is error
    assert f"the plugin 'stranger' (stranger-mode 1.0) failed in {hook}: {type(error).__name__}" in caught.value.message
    assert "(test_calls.py, line " in caught.value.message
    assert "LORA_RT_BLOCK_PLUGINS=stranger" in caught.value.next_step
    assert record(host).status == "faulty"
    assert record(host).reason.startswith(f"{hook}: {type(error).__name__}")
    assert ask(host, "lora_rt_gate", "fine").ranks.tolist() == [0.5]


def test_a_failed_call_does_not_disable_the_mode() -> None:
    """One request's content may be the reason; other users' requests of this mode go on, and the reason is kept."""

    def lora_rt_gate(context: Any) -> None:
        if context.input_ids.shape[1] > 3:
            raise ValueError("too long")

    host = host_with(lora_rt_gate)
    with pytest.raises(PluginError):
        host.gate("stranger", gate_context([1], 4))
    assert host.gate("stranger", gate_context([1], 2)) is None
    assert "stranger" in host.modes
    assert (record(host).status, "too long" in record(host).reason) == ("faulty", True)


def test_requests_of_other_modes_go_on_while_one_fails() -> None:
    host = host_with(raising("lora_rt_gate", ValueError("a bad day")))

    def request(number: int) -> bool:
        if number % 2:
            return ask(host, "lora_rt_gate", "fine") is not None
        with pytest.raises(PluginError):
            ask(host, "lora_rt_gate")
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(request, range(64)))


@pytest.mark.parametrize("hook", ["lora_rt_gate", "lora_rt_scene", "lora_rt_compose", "lora_rt_objective"])
def test_an_explained_error_of_a_hook_passes(hook: str) -> None:
    """A mistake of the user is not the plugin's."""
    error = LoraRtError("the option is wrong", next_step="Give another")
    host = host_with(raising(hook, error))
    with pytest.raises(LoraRtError) as caught:
        ask(host, hook)
    assert caught.value is error
    assert record(host).status == "ok"


def test_ctrl_c_in_a_gate_is_the_users() -> None:
    host = host_with(raising("lora_rt_gate", KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        ask(host, "lora_rt_gate")
    assert record(host).status == "ok"


@pytest.mark.parametrize("hook", ["lora_rt_scene", "lora_rt_compose", "lora_rt_objective"])
def test_a_hanging_hook_is_given_up_and_its_mode_disabled(hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each hanging call leaves a thread behind, so there is no second one."""
    monkeypatch.setenv(SECONDS_VARIABLE, "0.2")
    calls, release = [], threading.Event()

    def function(context: Any) -> None:
        calls.append(1)
        release.wait()

    function.__name__ = hook
    host = host_with(function)
    with pytest.raises(PluginError, match=f"failed in {hook}: not finished after 0.2 s"):
        ask(host, hook)
    with pytest.raises(UnknownModeError, match=r"is broken: .*not finished after 0\.2 s"):
        ask(host, hook)
    release.set()  # nobody got here by waiting for the hook: it had no other way to end
    assert calls == [1]
    assert record(host).status == "broken"
    assert host.modes == ["fine"]
    assert ask(host, "lora_rt_gate", "fine") is not None


def test_what_takes_long_before_a_plugin_is_asked_is_nobody_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECONDS_VARIABLE, "0.2")

    def lora_rt_compose(context: Any) -> list[float]:
        return [2.0]

    host = host_with(lora_rt_compose)
    release, times = threading.Event(), iter([30.0, 0.0])

    def decide() -> Any:
        release.wait(next(times))
        return host.weights("stranger", compose_context([1.0]))

    assert host.deciding(["stranger"], decide) == [2.0]
    release.set()
    assert record(host).status == "ok"


def test_a_hanging_gate_is_named_while_its_request_waits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It runs in the request's thread, where nothing can give it up; others are not held up by it."""
    monkeypatch.setenv(SECONDS_VARIABLE, "0.2")
    release = threading.Event()

    def lora_rt_gate(context: Any) -> None:
        release.wait(30)

    host = host_with(lora_rt_gate)
    waiting = threading.Thread(target=ask, args=(host, "lora_rt_gate"))
    with caplog.at_level(logging.WARNING, "lora_rt.plugins"):
        waiting.start()
        assert ask(host, "lora_rt_gate", "fine") is not None
        deadline = time.monotonic() + 10
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.02)
    assert record(host).reason == "lora_rt_gate: has not come back for 0.2 s"
    elsewhere = load_modes([point(plugin(lora_rt_gate))])  # as `lora-rt plugins` in another terminal
    assert record(elsewhere).reason == record(host).reason
    release.set()
    waiting.join()
    assert ["stranger" in text and "Ctrl-C" in text for text in caplog.messages] == [True]


FORKED = """
import os, threading, time
from lora_rt.plugins.manager import limits
from lora_rt.plugins.manager.limits import watched

def hanging():
    with watched(0.2, lambda: None):
        time.sleep(60)

threading.Thread(target=hanging, daemon=True).start()
while not limits._running:
    time.sleep(0.01)
limits._lock.acquire()  # as another thread may hold it at that moment
child = os.fork()
if not child:
    told = []
    with watched(0.2, lambda: told.append("mine")):
        time.sleep(1)
    os._exit(0 if told == ["mine"] and not limits._running else 1)
end = time.monotonic() + 20
while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < end:
    time.sleep(0.05)
if not ended[0]:
    os.kill(child, 9)
os._exit(2 if not ended[0] else os.waitstatus_to_exitcode(ended[1]))
"""


@pytest.mark.slow
def test_a_fork_looks_out_for_its_own_gates_alone() -> None:
    """What its parent's other threads wait for, and the lock that one of them holds, are not the child's."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_gate_runs_in_the_callers_thread_and_mode() -> None:
    seen = []

    def lora_rt_gate(context: Any) -> None:
        seen.append((threading.current_thread(), torch.is_inference_mode_enabled()))

    host = host_with(lora_rt_gate)
    with torch.inference_mode():
        ask(host, "lora_rt_gate")
    assert seen == [(threading.current_thread(), True)]


def test_timed_hooks_see_the_callers_context_variables() -> None:
    variable = contextvars.ContextVar("who", default="nobody")

    def lora_rt_compose(context: Any) -> list[float]:
        return [float(variable.get())]

    variable.set("3")
    assert ask(host_with(lora_rt_compose), "lora_rt_compose") == [3.0]


def test_a_failure_is_known_to_later_processes_until_the_hook_works_again() -> None:
    """`lora-rt plugins` is another process than the request that failed."""
    broken = [True]

    def lora_rt_gate(context: Any) -> None:
        if broken:
            raise ValueError("a bad day")

    def lora_rt_compose(context: Any) -> None: ...

    def process() -> ModeHost:
        return load_modes([point(plugin(lora_rt_gate, lora_rt_compose))])

    with pytest.raises(PluginError):
        ask(process(), "lora_rt_gate")
    later = process()
    assert record(later).status == "faulty"
    assert "a bad day" in record(later).reason
    ask(later, "lora_rt_compose")  # another hook's success says nothing
    assert "a bad day" in record(process()).reason
    broken.clear()
    ask(later, "lora_rt_gate")
    assert (record(later).status, record(later).reason) == ("ok", "")
    assert record(process()).status == "ok"


def test_another_version_of_a_package_starts_without_the_old_failure() -> None:
    made = plugin(raising("lora_rt_gate", ValueError("a bad day")))

    def process(version: str) -> ModeHost:
        return load_modes([InlinePoint("stranger", lambda: made, "stranger-mode", version)])

    with pytest.raises(PluginError):
        ask(process("1.0"), "lora_rt_gate")
    assert record(process("1.1")).status == "ok"
    assert record(process("1.0")).status == "faulty"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"package": "stranger-mode"}'])
def test_a_damaged_memory_of_failures_is_no_failure(content: str, tmp_path: Path) -> None:
    folder = tmp_path / "home" / "plugin-failures"
    folder.mkdir(parents=True)
    (folder / "stranger.json").write_text(content)
    assert record(host_with(lora_rt_gate)).status == "ok"


def test_a_home_that_can_not_be_written_hides_no_error(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(PluginError, match="a bad day"):
        ask(host_with(raising("lora_rt_gate", ValueError("a bad day"))), "lora_rt_gate")


def test_a_mode_name_is_no_path_into_the_home(tmp_path: Path) -> None:
    host = host_with(raising("lora_rt_gate", ValueError()), name="../../escape")
    with pytest.raises(PluginError):
        ask(host, "lora_rt_gate", "../../escape")
    assert [file.name for file in (tmp_path / "home" / "plugin-failures").iterdir()] == ["..%2F..%2Fescape.json"]


def test_only_the_plugin_that_owns_the_mode_is_called() -> None:
    called = []

    def gate_of(name: str) -> Any:
        def lora_rt_gate(context: Any) -> None:
            called.append(name)

        return plugin(lora_rt_gate)

    host = load_modes([point(gate_of(name), name=name) for name in ("a", "b", "c")])
    ask(host, "lora_rt_gate", "b")
    assert called == ["b"]
    assert host.call("b", "lora_rt_compose", context=None) is None


def test_an_unknown_mode_is_answered_with_those_there_are() -> None:
    with pytest.raises(UnknownModeError) as caught:
        host_with(lora_rt_gate).require("fade-in")
    assert caught.value.message == "no plugin provides the mode 'fade-in'; there are: fine, stranger"
    assert "lora-rt install" in caught.value.next_step


def test_sources_of_a_broken_plugin_are_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    def fine(register: Any) -> None:
        register("shelf", lambda name, base: f"/shelf/{name}" if name == "there" else None)

    def torn(register: Any) -> None:
        register("lost", lambda name, base: "/lost")
        raise ValueError("no shelf")

    fine.__name__ = torn.__name__ = "lora_rt_sources"
    host = load_modes([point(plugin(fine), name="fine"), point(plugin(torn), name="torn")])
    sources = host.sources()
    assert [label for label, _ in sources] == ["shelf"]
    find = sources[0][1]
    assert (find("there", None), find("gone", None)) == ("/shelf/there", None)
    assert record(host, "torn").status == "faulty"
    assert "the plugin 'torn' (stranger-mode 1.0) failed in lora_rt_sources: ValueError: no shelf" in caplog.text


def _raises(name: str, base: Any) -> None:
    raise ConnectionError("no answer")


@pytest.mark.parametrize(
    ("find", "reason"),
    [
        (_raises, "ConnectionError: no answer"),
        (lambda name, base: 7, "find returned a int, not a path"),
        (lambda name: "/x", "TypeError"),
        (lambda name, base: time.sleep(30), "not finished after 0.2 s"),
    ],
)
def test_a_source_that_fails_finds_nothing_and_is_named(
    find: Any, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(SECONDS_VARIABLE, "0.2")

    def lora_rt_sources(register: Any) -> None:
        register("shelf", find)

    host = host_with(lora_rt_sources)
    assert host.sources()[0][1]("emotion", None) is None
    assert reason in record(host).reason
    assert reason in caplog.text


def test_unknown_and_unreadable_options_are_named_at_once() -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Options:
        half_life: int = 24
        start: float = 0.0
        loud: bool = False
        name: str = ""

        def __post_init__(self) -> None:
            if self.half_life < 1:
                raise ValueError("half-life must be at least 1")

    globals()["Options"] = Options
    good = read_options({"half-life": "3", "start": "0.5", "loud": "yes", "name": "x"}, Options)
    assert good == Options(3, 0.5, True, "x")
    with pytest.raises(OptionError) as caught:
        read_options({"halflife": "3", "start": "inf", "loud": "maybe", "half_life": "2.5"}, Options)
    assert caught.value.problems == (
        "there is no option 'halflife'; near is 'half-life'",
        "start is 'inf', which is not a finite number",
        "loud is 'maybe', which is not yes or no",
        "half_life is '2.5', which is not a whole number",
    )
    assert "half-life=24" in caught.value.next_step
    with pytest.raises(OptionError) as caught:
        read_options({"half-life": "0"}, Options)
    assert caught.value.problems == ("half-life must be at least 1",)
