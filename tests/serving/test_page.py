"""The page: what it asks of the server, and a person at a browser who drags a slider while the model speaks."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from lora_rt.core.runtime import Runtime
from lora_rt.core.serving import page
from lora_rt.core.serving.settings import Limits, ServeSettings
from lora_rt.plugins.contract import JointGateContext, SceneContext, ScenePrediction, hookimpl
from lora_rt.registry.compositions import NamedComposition, NamedTerm
from lora_rt.registry.files import sha256_bytes
from support.serving import Live, asked, live
from support.tiny import Zoo, mode_host

PROMPT = "rain, tin roof"
FILES = Path(page.__file__).resolve().parent / "static"


class Knowing:
    """A composition's mode that takes every prompt for three parts dusk."""

    @hookimpl
    def lora_rt_scene(context: SceneContext) -> ScenePrediction:  # type: ignore[misc]  # a hook of a module
        rows = context.hidden.shape[0]
        return ScenePrediction(("dusk", "dawn"), torch.tensor([[0.75, 0.25]]).expand(rows, 2))

    @hookimpl
    def lora_rt_joint_gate(context: JointGateContext) -> None:  # type: ignore[misc]
        return None


@pytest.fixture(scope="module")
def served(runtime: Runtime) -> Iterator[Live]:
    with live(runtime, ServeSettings(port=0), extend=page.install) as started:
        yield started


def test_every_file_of_the_page_is_there_and_no_other_site_is_named(served: Live) -> None:
    with served.http() as http:
        for file in FILES.iterdir():
            answer = http.get(f"/{file.name}")
            assert answer.status_code == 200
            assert answer.headers["content-security-policy"].startswith("default-src 'self'")
            text = answer.text.replace("http://www.w3.org/2000/svg", "")
            assert "http://" not in text
            assert "https://" not in text
        assert http.get("/").text == (FILES / "index.html").read_text()
        assert http.get("/../api.py").status_code == 404


def test_the_page_begins_with_what_can_have_a_slider(served: Live) -> None:
    with served.http() as http:
        state = http.get("/ui/state").json()
    names = [adapter["name"] for adapter in state["adapters"]]
    assert {"one", "two", "fading"} <= set(names)
    assert "base" not in names
    assert set(state["start"]) <= set(names)
    assert state["precision"] == "float32"


def test_what_acted_at_each_token_is_what_the_runtime_explains(served: Live, runtime: Runtime) -> None:
    request = {"model": "one:0.7 two:-0.5", "messages": [{"role": "user", "content": PROMPT}], "answer": "and so on"}
    with served.http() as http:
        told = http.post("/ui/acted", json=request).json()
    known = runtime.explain(PROMPT, "one:0.7 two:-0.5", answer="and so on")
    answer = len(runtime.text.text_ids("and so on"))
    assert told["adapters"] == known.names
    assert len(told["tokens"]) == answer
    for found, whole in zip(told["per_token"], known.tokens[:, -answer:].tolist(), strict=True):
        assert found == pytest.approx(whole, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"model": "nobody:1"}, 404, "nobody"),
        ({"model": "../secrets"}, 404, "names only"),
        ({"model": "base"}, 400, "no adapter acts"),
        ({"answer": ""}, 400, "answer"),
        ({"messages": []}, 400, "messages"),
        ({"answer": "long " * 4000}, 400, "longer than the model takes"),
    ],
)
def test_what_can_not_be_explained_is_refused_in_words(
    served: Live, change: dict[str, Any], status: int, says: str
) -> None:
    request = {"model": "one", "messages": [{"role": "user", "content": PROMPT}], "answer": "so", **change}
    with served.http() as http:
        answer = http.post("/ui/acted", json=request)
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]


@pytest.mark.slow
def test_a_composition_whose_mode_knows_scenes_shows_what_it_makes_of_a_prompt(zoo: Zoo, tmp_path: Path) -> None:
    """As `registers` does, which ships: over plain adapters, by a classifier of its own."""
    runtime = zoo.runtime_with(mode_host(knowing=Knowing), "llama")
    folder = zoo.adapter("llama", seed=41)
    compositions = runtime.parts.registry.compositions
    for name, reference in (("led", str(folder)), ("lost", str(tmp_path / "nothing"))):
        term = NamedTerm(reference=reference, weight=0.5)
        made = {"terms": (term,), "mode": "knowing", "scene_types": ("dusk", "dawn"), "state": sha256_bytes(save({}))}
        compositions.save(NamedComposition(name=name, base=runtime.base.id, hidden_layers=1, **made), save({}))
    with live(runtime, ServeSettings(port=0), extend=page.install) as served, served.http() as http:
        state = http.get("/ui/state").json()
        told = http.post("/ui/scenes", json={"text": PROMPT}).json()
    assert state["classifier"] == "led"
    assert state["scene_types"] == ["dawn", "dusk"]
    assert {"name": "led", "about": "a named composition, knowing"} in state["adapters"]
    assert "lost" not in [adapter["name"] for adapter in state["adapters"]]
    assert told == {"adapter": "led", "scene_types": {"dusk": 0.75, "dawn": 0.25}}


def test_a_long_look_at_an_answer_keeps_nobody_from_being_prepared(served: Live, runtime: Runtime) -> None:
    """The look waits for the model's thread, and the thread that prepares goes on."""
    begun, go_on = threading.Event(), threading.Event()
    service = served.service
    service.scheduler.between(lambda: (begun.set(), go_on.wait(60)))
    begun.wait()
    request = {"model": "one", "messages": [{"role": "user", "content": PROMPT}], "answer": "so"}
    with ThreadPoolExecutor(1) as beside, served.http() as http:
        looked = beside.submit(http.post, "/ui/acted", json=request)
        try:
            for _ in range(20):
                service.beside(lambda: None).result(timeout=20)
                time.sleep(0.005)
            assert not looked.done()
        finally:
            go_on.set()
        assert looked.result().status_code == 200


@pytest.mark.slow
def test_without_an_adapter_that_recognizes_scenes_this_is_said(served: Live) -> None:
    with served.http() as http:
        assert http.get("/ui/state").json()["classifier"] is None
        answer = http.post("/ui/scenes", json={"text": PROMPT})
    assert answer.status_code == 404
    assert "recognizes scenes" in answer.json()["error"]["message"]


def test_the_page_is_open_and_what_it_asks_needs_the_key(runtime: Runtime) -> None:
    with live(runtime, ServeSettings(port=0, api_key="k"), extend=page.install) as served:
        with served.http() as http:
            assert http.get("/").status_code == 200
            assert http.get("/ui/state").status_code == 401
        with served.http("k") as http:
            assert http.get("/ui/state").status_code == 200


# In a real browser, where there is one.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 400, "height": 800})
    shown = context.new_page()
    wrong: list[str] = []
    shown.on("pageerror", lambda error: wrong.append(str(error)))
    yield shown
    context.close()
    assert wrong == []


def opened(tab: Any, url: str) -> None:
    """The page, as soon as it can be used."""
    tab.goto(url)
    tab.locator("#send:enabled").wait_for()


@pytest.mark.slow
def test_a_weight_that_is_dragged_while_the_model_speaks_acts_from_the_next_token(served: Live, tab: Any) -> None:
    opened(tab, f"{served.url}/#mix=one:0.5+two:0&max_tokens=300&temperature=0")
    tab.get_by_text("Registers", exact=True).click()
    tab.get_by_label("Your message").fill(PROMPT)
    tab.get_by_label("Your message").press("Enter")
    tab.locator(".answer .text:not(:empty)").wait_for()
    tab.get_by_label("two", exact=True).focus()
    for _ in range(3):
        tab.keyboard.press("ArrowRight")
    tab.locator(".turned").first.wait_for()
    assert tab.locator(".answer .spec").inner_text() == "one:0.5 → one:0.5 two:0.15"
    tab.keyboard.press("Escape")
    tab.get_by_text("stopped").wait_for()
    assert "two:0.15" in tab.url.replace("%3A", ":")
    assert tab.locator("body").bounding_box()["width"] <= 400


@pytest.mark.slow
def test_an_answer_shows_which_register_acted_where(served: Live, tab: Any) -> None:
    opened(tab, f"{served.url}/#mix=one:0.5+two:1&max_tokens=8&temperature=0")
    tab.get_by_label("Your message").fill(PROMPT)
    tab.get_by_role("button", name="Send").click()
    tab.get_by_role("button", name="Which register acted where").click()
    tab.locator(".heat .token").first.hover()
    assert "one" in tab.locator(".token-detail").inner_text()
    assert "%" in tab.locator(".token-detail").inner_text()


@pytest.mark.slow
def test_what_is_sent_before_the_page_is_ready_goes_out_as_soon_as_it_is(served: Live, tab: Any) -> None:
    held: list[Any] = []
    tab.route("**/ui/state", lambda route: held.append(route))
    tab.goto(f"{served.url}/#mix=one:0.5&max_tokens=4&temperature=0")
    tab.get_by_label("Your message").fill(PROMPT)
    tab.get_by_label("Your message").press("Enter")
    tab.get_by_text("loading").wait_for()
    assert tab.locator(".answer").count() == 0
    held[0].continue_()
    tab.locator(".answer .text:not(:empty)").wait_for()
    assert tab.get_by_label("Your message").input_value() == ""


@pytest.mark.slow
def test_a_composition_that_is_broken_is_told_where_the_answer_would_stand(served: Live, tab: Any) -> None:
    opened(tab, f"{served.url}/#mix=nobody:1")
    tab.get_by_label("Your message").fill(PROMPT)
    tab.get_by_label("Your message").press("Enter")
    assert "nobody" in tab.get_by_role("alert").inner_text()


@pytest.mark.slow
def test_a_server_that_is_full_says_so_on_the_page(runtime: Runtime, tab: Any) -> None:
    with live(runtime, ServeSettings(port=0, limits=Limits(answers=1, tokens=8)), extend=page.install) as small:
        opened(tab, f"{small.url}/#mix=one:1")
        tab.get_by_label("Your message").fill("far too long for so small a model, " * 3)
        tab.get_by_label("Your message").press("Enter")
        assert "tokens" in tab.get_by_role("alert").inner_text()


def test_what_the_page_asks_for_is_bounded_in_length_and_number(
    served: Live, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a pass between two steps of everybody's answers."""
    limits = Limits(reading=10)
    with live(runtime, ServeSettings(port=0, limits=limits), extend=page.install) as short, short.http() as http:
        for text, told in (
            ("rain " * 300_000, "letters"),
            ("rain " * 300, "than the model"),
            ("rain " * 30, "20 tokens"),
        ):
            answer = http.post("/ui/scenes", json={"text": text})
            assert answer.status_code == 400
            assert told in answer.json()["error"]["message"]
    with served.http() as http:
        monkeypatch.setattr(page, "_LOOKS", 0)
        full = http.post("/ui/acted", json={"model": "one", "messages": asked()["messages"], "answer": "so"})
        assert full.status_code == 429
        assert full.headers["retry-after"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v1/embeddings", 404),
        ("PUT", "/v1/chat/completions", 405),
        ("GET", "/nothing.html", 404),
        ("HEAD", "/", 200),
        ("POST", "/", 405),
    ],
)
def test_beside_the_page_the_api_answers_as_without_it(served: Live, method: str, path: str, status: int) -> None:
    with served.http() as http:
        assert http.request(method, path).status_code == status
