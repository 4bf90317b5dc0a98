"""The facts of huggingface_hub that ours stands on, and that an application which uses it too keeps what it set."""

from __future__ import annotations

import inspect
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpcore2._sync.http11
import httpx2
import pytest
from huggingface_hub import get_session, set_client_factory
from huggingface_hub.utils import _detect_agent, _http

from lora_rt.registry.errors import HubError
from lora_rt.registry.hub import internals, library, limits
from lora_rt.registry.hub.client import explained, session
from lora_rt.registry.hub.pull import pull
from lora_rt.registry.hub.remote import commit_of
from lora_rt.registry.reference import Reference
from lora_rt.registry.store import Store
from support.adapters import adapter_files
from support.hub import LocalHub

REPO = "someone/emotion"


@pytest.fixture
def factory() -> Iterator[list[httpx2.Client]]:
    """An application's own factory; the clients that it made."""
    made: list[httpx2.Client] = []

    def make() -> httpx2.Client:
        made.append(httpx2.Client(follow_redirects=True, headers={"x-mine": "1"}))
        return made[-1]

    before = _http._GLOBAL_CLIENT_FACTORY
    set_client_factory(make)
    yield made
    set_client_factory(before)
    for client in made:
        client.close()


def test_the_library_has_every_name_that_is_asked_of_it() -> None:
    assert [name for name in library.__all__ if not hasattr(library, name)] == []
    assert not hasattr(library, "snapshot_download")


def test_huggingface_hub_has_one_client_made_by_one_factory_under_one_lock() -> None:
    source = inspect.getsource(_http.get_session)
    assert "_GLOBAL_CLIENT = _GLOBAL_CLIENT_FACTORY()" in source
    assert "with _CLIENT_LOCK" in source
    assert "_GLOBAL_CLIENT_FACTORY = client_factory" in inspect.getsource(_http.set_client_factory)


def test_huggingface_hub_logs_retries_by_the_loggers_that_are_listed() -> None:
    assert _http.logger.name == internals.LOGGERS[0]
    for name in internals.LOGGERS:
        __import__(name)


def test_the_client_asks_for_nothing_that_a_pull_does_not_need(
    hub: LocalHub, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_detect_agent, "_registry", None)
    hub.commit(REPO, adapter_files())
    pull(store, Reference.parse(REPO))
    assert [line for line in hub.requests if internals.HARNESSES in line] == []
    assert internals.HARNESSES in inspect.getsource(_detect_agent)


def test_httpcore_says_which_connection_it_opened_and_reads_through_it(hub: LocalHub) -> None:
    seen: dict[str, object] = {}
    with httpx2.Client() as client:
        client.get(hub.endpoint, extensions={"trace": lambda name, facts: seen.update({name: facts})})
    facts = seen["connection.connect_tcp.complete"]
    assert isinstance(facts, dict)
    assert callable(facts["return_value"].read)
    assert "self._network_stream.read" in inspect.getsource(httpcore2._sync.http11)


def test_an_applications_client_and_factory_are_what_they_were_after_a_pull(
    hub: LocalHub, store: Store, factory: list[httpx2.Client]
) -> None:
    hub.commit(REPO, adapter_files())
    theirs, chosen = get_session(), _http._GLOBAL_CLIENT_FACTORY
    hooks, timeout = dict(theirs.event_hooks), theirs.timeout
    pull(store, Reference.parse(REPO))
    assert get_session() is theirs
    assert _http._GLOBAL_CLIENT_FACTORY is chosen
    assert not theirs.is_closed
    assert (theirs.event_hooks, theirs.timeout) == (hooks, timeout)
    assert len(factory) == 2  # ours is made by theirs, so proxies and certificates hold


def test_our_client_is_kept_from_call_to_call_and_follows_a_new_factory(
    hub: LocalHub, factory: list[httpx2.Client]
) -> None:
    hub.commit(REPO, adapter_files())
    for _ in range(3):
        commit_of(REPO, None)
    assert len(factory) == 1
    set_client_factory(lambda: httpx2.Client(headers={"x-mine": "2"}))
    with session():
        assert get_session().headers["x-mine"] == "2"


def test_a_factory_that_is_set_meanwhile_stays(factory: list[httpx2.Client]) -> None:
    theirs = get_session()

    def other() -> httpx2.Client:
        return httpx2.Client()

    with session():
        get_session()
        set_client_factory(other)
    assert _http._GLOBAL_CLIENT_FACTORY is other
    assert theirs.is_closed


def test_an_error_in_the_block_gives_the_client_back_too(factory: list[httpx2.Client]) -> None:
    theirs = get_session()
    with pytest.raises(HubError), explained("a/b"):
        raise httpx2.ConnectError("no")
    assert get_session() is theirs


@pytest.mark.slow
def test_threads_that_pull_at_once_share_the_client_and_leave_theirs(
    hub: LocalHub, factory: list[httpx2.Client]
) -> None:
    hub.commit(REPO, adapter_files())
    theirs, commits = get_session(), []
    threads = [threading.Thread(target=lambda: commits.append(commit_of(REPO, None))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(commits) == 8
    assert get_session() is theirs
    assert len(factory) == 2


def test_the_client_may_log_again_afterwards(caplog: pytest.LogCaptureFixture) -> None:
    with session():
        logging.getLogger(internals.LOGGERS[0]).warning("a retry")
    assert caplog.records == []
    caplog.set_level(logging.WARNING)
    logger = logging.getLogger(internals.LOGGERS[0])
    assert all(rule(logger.makeRecord("", 30, "", 0, "a retry", (), None)) for rule in logger.filters)


def test_the_clients_own_limits_are_only_shortened(hub: LocalHub) -> None:
    request = httpx2.Request("GET", hub.endpoint, extensions={"timeout": {"read": 3.0, "connect": None}})
    limits.forget()
    limits.on_request(request)
    assert request.extensions["timeout"]["read"] == 3.0
    assert request.extensions["timeout"]["connect"] == limits.LIMITS.connect


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ALL_PROXY", "socks4://x", "a proxy that the environment names can not be used: .*socks4"),
        ("ALL_PROXY", "http://x:y", "a proxy that the environment names can not be used: "),
        ("ALL_PROXY", "socks5://x", "SOCKS proxy, and the package that speaks to one is missing.* pip install socksio"),
        ("SSL_CERT_FILE", "/nonexistent", "the certificates of SSL_CERT_FILE=/nonexistent can not be read: No such"),
        ("SSL_CERT_FILE", __file__, "the certificates of SSL_CERT_FILE=.* can not be read: "),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "10.5", "HF_HUB_DOWNLOAD_TIMEOUT is '10.5'; it must be a whole number of seconds"),
        ("HF_HUB_ETAG_TIMEOUT", "", "HF_HUB_ETAG_TIMEOUT is ''; it must be a whole number of seconds"),
    ],
)
def test_what_the_environment_sets_wrongly_is_named(
    hub: LocalHub, factory: list[httpx2.Client], monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "socksio", None)
    with pytest.raises(HubError, match=says) as error:
        commit_of(REPO, None)
    assert "unset " in error.value.next_step


@pytest.mark.slow
def test_a_setting_that_the_client_can_not_read_stops_nobody_who_does_not_need_it(tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_DOWNLOAD_TIMEOUT": "abc", "LORA_RT_HOME": str(tmp_path)}
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    code = "from lora_rt.core.cli.app import run; run()"
    commands = {
        ("list",): False,
        ("search", "x"): True,
        ("pull", REPO, "--offline"): True,
        ("plan", str(tmp_path)): True,
    }
    for command, needs in commands.items():
        line = [sys.executable, "-c", code, *command]
        done = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert ("HF_HUB_DOWNLOAD_TIMEOUT is 'abc'" in done.stderr) == needs, done.stderr
        assert "Traceback" not in done.stderr
