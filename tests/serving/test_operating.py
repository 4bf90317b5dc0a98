"""What an operator does while the server runs, and what a listener does while an answer is spoken."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from lora_rt.core.runtime import Runtime
from lora_rt.core.serving.service import Service
from lora_rt.core.serving.settings import Limits, ServeSettings
from lora_rt.registry.compositions import NamedComposition, NamedTerm
from support.serving import Live, asked, live
from support.tiny import config_of, save_adapter

pytestmark = pytest.mark.slow

ADMIN = "the operator's own"
PROMPT = "rain, tin roof"


@pytest.fixture
def admin(server: Live) -> Iterator[httpx2.Client]:
    with server.http(ADMIN) as http:
        yield http


def act(admin: httpx2.Client, name: str, action: str) -> httpx2.Response:
    return admin.post("/admin/adapters", json={"name": name, "action": action})


def shelved(admin: httpx2.Client) -> dict[str, dict[str, Any]]:
    return {item["name"]: item for item in admin.get("/admin/adapters").json()["adapters"]}


def turn(http: httpx2.Client, name: str, **body: Any) -> httpx2.Response:
    return http.patch(f"/v1/responses-in-flight/{name}", json=body)


def test_an_adapter_is_loaded_pinned_and_unloaded_by_its_name(server: Live, admin: httpx2.Client) -> None:
    assert act(admin, "huge", "pin").status_code == 200
    assert shelved(admin)["huge"]["pinned"]
    assert act(admin, "huge", "unpin").status_code == 200
    assert not shelved(admin)["huge"]["pinned"]
    assert act(admin, "huge", "unload").status_code == 200
    assert "huge" not in shelved(admin)
    assert act(admin, "huge", "unload").status_code == 400
    assert act(admin, "huge", "load").status_code == 200
    assert shelved(admin)["huge"]["bytes"] > 0


@pytest.mark.parametrize("name", ["../x", "/etc", "org/repo", "./one", "a b", "", "https://example.org/x"])
@pytest.mark.parametrize("action", ["load", "reload", "pin", "unload"])
def test_an_operators_client_can_name_no_path_either(admin: httpx2.Client, name: str, action: str) -> None:
    assert act(admin, name, action).status_code in (400, 404)


def test_admin_wants_its_own_key(server: Live) -> None:
    with server.http("another") as http:
        assert http.get("/admin/adapters").status_code == 401
        assert act(http, "one", "unload").status_code == 401


def test_a_changed_file_is_read_again_and_a_running_answer_keeps_the_old_one(
    server: Live, client: openai.OpenAI, admin: httpx2.Client, runtime: Runtime, project: Path
) -> None:
    config = config_of("llama", max_position_embeddings=512)
    folder = project / "changing"
    with (project / "lora-rt.toml").open("a") as file:
        file.write('changing = "./changing"\n')
    save_adapter(folder, config, targets=["q_proj", "v_proj"], seed=91)
    before = client.chat.completions.create(**asked(model="changing:2")).choices[0].message.content
    whole = runtime.generate([PROMPT], ["changing:2"], max_new_tokens=200)[0]
    with client.chat.completions.create(**asked(model="changing:2", max_tokens=200), stream=True) as stream:
        pieces = iter(stream)
        said = [next(pieces) for _ in range(3)]
        shutil.rmtree(folder)
        save_adapter(folder, config, targets=["q_proj", "v_proj"], seed=92)
        digest = shelved(admin)["changing"]["sha256"]
        assert act(admin, "changing", "reload").status_code == 200
        assert shelved(admin)["changing"]["sha256"] != digest
        after = client.chat.completions.create(**asked(model="changing:2")).choices[0].message.content
        said += list(pieces)
    assert "".join(choice.delta.content or "" for piece in said for choice in piece.choices) == whole
    assert after != before
    assert after == runtime.generate([PROMPT], ["changing:2"], max_new_tokens=12)[0]


def test_a_changed_file_that_is_refused_leaves_the_old_one_in_place(
    client: openai.OpenAI, admin: httpx2.Client, project: Path
) -> None:
    before = client.chat.completions.create(**asked(model="two")).choices[0].message.content
    weights = project / "two" / "adapter_model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(b"nothing of an adapter")
    try:
        assert act(admin, "two", "reload").status_code >= 400
        assert client.chat.completions.create(**asked(model="two")).choices[0].message.content == before
    finally:
        weights.write_bytes(kept)


def test_adapters_that_nobody_uses_make_room_but_pinned_ones_stay(runtime: Runtime) -> None:
    settings = ServeSettings(port=0, pin=("fading",), limits=Limits(adapter_bytes=1))
    with live(runtime, settings) as server, server.openai() as client:
        for name in ("one", "two", "huge", "one"):
            client.chat.completions.create(**asked(model=name, max_tokens=2))
        client.chat.completions.create(**asked(model="base", max_tokens=2))
        assert [item.info.name for item in server.service.shelf.items()] == ["fading"]
        with client.chat.completions.create(**asked(model="one two", max_tokens=300), stream=True) as stream:
            next(iter(stream))
            client.chat.completions.create(**asked(model="huge", max_tokens=2))
            names = {item.info.name for item in server.service.shelf.items()}
            assert {"one", "two", "fading"} <= names
        assert server.idle()


def test_an_answer_goes_on_under_other_weights_from_its_next_token_on(
    server: Live, client: openai.OpenAI, runtime: Runtime
) -> None:
    """What was said stays; the rest is what the runtime says when it is turned at the same token."""
    with server.http() as http, client.chat.completions.create(**asked(model="one", max_tokens=120), stream=True) as s:
        pieces = iter(s)
        said = [next(pieces) for _ in range(5)]
        told = turn(http, said[0].id, composition={"two": -1.5}).json()
        said += list(pieces)
    assert told["id"] == said[0].id
    assert told["model"] == "two:-1.5"
    (turned,) = told["tokens"]
    assert 0 < turned < 120
    (row,) = runtime.rows([PROMPT], ["one"], max_new_tokens=120)
    batch = runtime.batch()
    batch.add([row])
    while batch.rows:
        if len(row.answer) == turned and row.timeline.still:
            row.compose("two:-1.5")
        batch.step()
    assert "".join(choice.delta.content or "" for piece in said for choice in piece.choices) == row.new_text()


def test_only_an_answer_that_is_being_given_can_be_turned(server: Live, client: openai.OpenAI) -> None:
    with server.http() as http:
        assert turn(http, "chatcmpl-nothing", model="one").status_code == 404
        done = client.chat.completions.create(**asked(max_tokens=2))
        assert turn(http, done.id, model="one").status_code == 404
        with client.chat.completions.create(**asked(model="one", max_tokens=300), stream=True) as stream:
            name = next(iter(stream)).id
            assert turn(http, name, model="../x").status_code == 404
            assert turn(http, name, model="one:nan").status_code == 400
            assert turn(http, name, model="one:1e39").status_code == 400
            assert turn(http, name, colour="red").status_code == 400
            assert turn(http, name, model="two").status_code == 200


def test_what_the_operator_allows_by_its_reference_can_be_named(runtime: Runtime, project: Path) -> None:
    path = str(project / "one")
    settings = ServeSettings(port=0, allow=frozenset({path}))
    with live(runtime, settings) as server, server.openai() as client:
        assert client.chat.completions.create(**asked(model=f"{path}:0.5", max_tokens=2)).model == f"{path}:0.5"
        for other in (f"{path}/../two", str(project / "two"), f"{path}/"):
            with pytest.raises(openai.NotFoundError):
                client.chat.completions.create(**asked(model=other))


def test_a_pinned_name_that_nothing_has_stops_the_start(runtime: Runtime) -> None:
    service = Service(runtime, ServeSettings(pin=("nobody",)))
    with pytest.raises(Exception, match="nobody"):
        service.start()
    service.close()


def test_a_named_composition_is_pinned_and_let_go_whole(runtime: Runtime, project: Path) -> None:
    compositions = runtime.parts.registry.compositions
    terms = tuple(NamedTerm(reference=name) for name in ("one", "two"))
    compositions.save(NamedComposition(name="both", base=runtime.base.id, terms=terms))
    with live(runtime, ServeSettings(port=0, admin_key=ADMIN, pin=("both",))) as server, server.http(ADMIN) as admin:

        def pinned() -> set[str]:
            return {item["name"] for item in admin.get("/admin/adapters").json()["adapters"] if item["pinned"]}

        assert {"one", "two"} <= pinned()
        assert admin.post("/admin/adapters", json={"name": "both", "action": "unpin"}).status_code == 200
        assert not {"one", "two"} & pinned()
    compositions.remove("both")


def test_a_change_that_names_nothing_is_refused(server: Live) -> None:
    with server.http() as http:
        answer = http.patch("/v1/responses-in-flight/x", json={})
        assert answer.status_code == 400
        assert "give a model or a composition" in answer.json()["error"]["message"]
