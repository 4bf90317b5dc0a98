"""vLLM asks for the adapter of a name: it gets the composition's export, made once, or the reason why there is none."""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from lora_rt.core.export import run
from lora_rt.plugins.contract import Gate, GateContext, hookimpl
from support.adapters import CONFIG, adapter_files, write_adapter
from support.tiny import Zoo, dense_logits, mode_host, peft_model, some_ids

pytestmark = pytest.mark.slow

IDS = some_ids(rows=1)
MODEL = "someone/model"
ELSEWHERE = "vLLM answers compositions that are weights alone; `lora-rt serve` without --engine answers this one"
TERMS = "Write terms as name:weight, for instance: emotion:0.7 logic:0.3"
Served = Callable[..., Any]


def ask(resolver: Any, *names: str) -> list[Any]:
    """What the resolver says of each, asked at once; an error in place of what raises."""

    async def all_of_them() -> list[Any]:
        asked = [resolver.resolve_lora(MODEL, name) for name in names]
        return await asyncio.gather(*asked, return_exceptions=True)

    return asyncio.run(all_of_them())


def refusal(resolver: Any, name: str) -> str:
    """The text of the HTTP 400 that a client gets."""
    (error,) = ask(resolver, name)
    assert type(error) is ValueError, error
    return str(error)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that exports were written into."""
    seen: list[Path] = []
    write = run.Gathered.write

    def counted(self: run.Gathered, to: Any, out: Path, **options: Any) -> Any:
        seen.append(out)
        return write(self, to, out, **options)

    monkeypatch.setattr(run.Gathered, "write", counted)
    return seen


def test_the_request_names_the_export_of_the_composition(zoo: Zoo, base: Path, served: Served) -> None:
    (request,) = ask(served(), "emotion:0.7 logic:-0.3")
    assert (request.lora_name, request.base_model_name) == ("emotion:0.7 logic:-0.3", MODEL)
    terms = [
        (zoo.adapter("llama", seed=seed, r=r, mode="output-only"), w) for seed, r, w in ((1, 4, 0.7), (2, 6, -0.3))
    ]
    with torch.inference_mode():
        found = peft_model(base, Path(request.lora_path))(input_ids=IDS).logits
    assert_close(found, dense_logits(base, terms, IDS), atol=1e-4, rtol=0.0)


def test_vllm_can_call_it_as_it_calls_every_resolver(served: Served) -> None:
    from vllm.lora.resolver import LoRAResolver

    resolver = served()
    assert isinstance(resolver, LoRAResolver)
    assert list(inspect.signature(resolver.resolve_lora).parameters) == ["base_model_name", "lora_name"]
    assert inspect.iscoroutinefunction(resolver.resolve_lora)
    assert served() is resolver, "vLLM loads plugins in every process, and sometimes twice"


def test_two_spellings_are_one_folder(served: Served, writes: list[Path]) -> None:
    spelled = [
        "emotion:0.7 logic:0.3",
        "logic:.3,emotion:0.70",
        "emotion:0.4 + logic:0.3 + emotion:0.3",
        "logic:0.3 emotion:0.7 body:0",
    ]
    paths = {request.lora_path for request in ask(served(), *spelled)}
    assert (len(paths), len(writes)) == (1, 1)


def test_another_weight_another_base_or_a_changed_adapter_is_another_folder(
    zoo: Zoo, served: Served, install: Callable[..., None]
) -> None:
    other = zoo.base("llama", rms_norm_eps=0.01)
    resolver = served()
    (first, second) = ask(resolver, "emotion", "emotion:0.999")
    install("emotion", zoo.adapter("llama", seed=9, r=4, mode="output-only"))
    (changed,) = ask(resolver, "emotion")
    assert len({item.lora_path for item in (first, second, changed)}) == 3
    assert Path(first.lora_path).is_dir(), "a running server may ask for it again"
    install("plain", zoo.adapter("llama", seed=3, r=4))
    (here,), (there,) = ask(resolver, "plain"), ask(served(base=str(other)), "plain")
    assert here.lora_path != there.lora_path


def test_sixteen_new_compositions_are_built_side_by_side(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A barrier that only opens when several of them are being written at once."""
    together, write = threading.Barrier(4, timeout=60), run.Gathered.write

    def meet(self: run.Gathered, *given: Any, **options: Any) -> Any:
        together.wait()
        return write(self, *given, **options)

    monkeypatch.setattr(run.Gathered, "write", meet)
    found = ask(served(), *(f"emotion:{number / 16} logic" for number in range(1, 17)))
    assert len({request.lora_path for request in found}) == 16


def test_sixteen_askers_of_one_new_composition_wait_for_one_build(served: Served, writes: list[Path]) -> None:
    found = ask(served(), *["emotion:0.7 logic:0.3"] * 8, *["logic:0.3 emotion:0.7"] * 8)
    assert (len({request.lora_path for request in found}), len(writes)) == (1, 1)


def test_a_build_that_failed_is_tried_again(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = served()
    with monkeypatch.context() as broken:
        broken.setattr(run, "_write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        text = refusal(resolver, "emotion")
    assert text == "the export can't be written: No space left on device. Free some space, or use another disk"
    assert Path(ask(resolver, "emotion")[0].lora_path).is_dir()


class Fading:
    @hookimpl
    def lora_rt_gate(context: GateContext) -> Gate:  # type: ignore[misc]  # a hook is a function
        return Gate(ranks=torch.ones(1))


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ("", f"'' is not a composition: it has no terms. {TERMS}"),
        (
            "emotion:warm",
            f"'emotion:warm' is not a composition: 'warm' is not a number. {TERMS}",
        ),
        (
            "emotin:0.7 logic:0.3",
            "'emotin:0.7 logic:0.3' is not answered: there is no register 'emotin' here; did you mean 'emotion'? "
            "This server has archetype, body, bridge, emotion, logic",
        ),
        (
            "emotion xyzzy quux:2",
            "'emotion quux:2 xyzzy' is not answered. This server has archetype, body, bridge, emotion, logic\n"
            "  - there is no register 'quux' here\n  - there is no register 'xyzzy' here",
        ),
        (
            "/etc:1",
            "'/etc' is not answered: '/etc' is a path or a repository, and clients name registers of this server. "
            "This server has archetype, body, bridge, emotion, logic",
        ),
        (
            "someone/adapter",
            "'someone/adapter' is not answered: 'someone/adapter' is a path or a repository, and clients name "
            "registers of this server. This server has archetype, body, bridge, emotion, logic",
        ),
        (
            "emotion logic:0.5[So:]",
            "'emotion logic:0.5[So:]' is not answered: 'logic' has no static equivalent: it waits for 'So:'. "
            f"{ELSEWHERE}",
        ),
        (
            "emotion:0 logic:0",
            "'emotion:0 logic:0' is not answered: every weight is 0. That is the base: ask for 'base'",
        ),
        (
            "emotion logic body",
            "'body emotion logic' is not answered: its adapters have rank 18 together, and this server takes 16. "
            "Leave terms out, or have the server started with --max-lora-rank 32",
        ),
    ],
)  # fmt: skip
def test_what_is_refused_says_why_word_by_word(served: Served, asked: str, text: str) -> None:
    assert refusal(served(), asked) == text


def test_values_that_no_file_can_hold_are_refused(served: Served) -> None:
    assert refusal(served(), "emotion:1e39").startswith("8 layers have values that float32 can't hold. Use --dtype")


def test_gates_are_refused_by_name(
    zoo: Zoo, served: Served, install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    host = mode_host(fading=Fading)
    monkeypatch.setattr(run, "load_modes", lambda: host)
    install("fades", zoo.adapter("llama", seed=1, mode="fading"))
    assert refusal(served(), "fades:0.5 emotion") == (
        "'emotion fades:0.5' is not answered: 'fades' has no static equivalent: its mode 'fading' acts at inference "
        "(lora_rt_gate) and does not say that this one is static. " + ELSEWHERE
    )


def test_biases_are_refused_by_name(zoo: Zoo, served: Served, install: Callable[..., None]) -> None:
    install("biased", zoo.adapter("llama", seed=6, r=3, targets=("v_proj",), lora_bias=True))
    assert refusal(served(), "biased") == f"'biased' is not answered: it adds biases, which vLLM does not. {ELSEWHERE}"
    assert Path(ask(served(), "biased:0 emotion")[0].lora_path).is_dir(), "what has no weight is left out"


def test_dora_is_refused_by_name(served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store takes none; a name of a project may lead to one all the same."""
    dora = json.dumps(CONFIG | {"use_dora": True}).encode()
    write_adapter(tmp_path / "project" / "dora", adapter_files(card=False) | {"adapter_config.json": dora})
    (tmp_path / "project" / "lora-rt.toml").write_text('[adapters]\ndora = "./dora"\n')
    monkeypatch.chdir(tmp_path / "project")
    told = refusal(served(), "dora emotion")
    assert told.startswith("'dora emotion' is not answered")
    assert "DoRA" in told


def test_a_rank_that_no_server_takes_is_said_to_be_one(served: Served, install: Callable[..., None], zoo: Zoo) -> None:
    for name in ("one", "two"):
        install(name, zoo.adapter("llama", seed=ord(name[0]), r=300, targets=("up_proj",)))
    assert refusal(served(), "one two") == (
        "'one two' is not answered: its adapters have rank 600 together, and this server takes 16. "
        "Leave terms out: vLLM takes ranks up to 512"
    )


def test_only_the_registers_that_were_given_are_served(served: Served) -> None:
    resolver = served(registers=("emotion", "logic"))
    assert Path(ask(resolver, "emotion logic")[0].lora_path).is_dir()
    assert refusal(resolver, "body") == (
        "'body' is not answered: there is no register 'body' here. This server has emotion, logic"
    )


def test_the_rank_is_vllms_own_where_nobody_used_the_launcher(plugin: None) -> None:
    from lora_rt_vllm.settings import read

    for words, rank in ((["serve", "m"], 16), (["--max-lora-rank", "64"], 64), (["--max_lora_rank=256"], 256)):
        assert read({"LORA_RT_VLLM_CACHE": "/c"}, words).max_rank == rank
    assert read({"LORA_RT_VLLM_CACHE": "/c", "LORA_RT_VLLM_MAX_RANK": "8"}, ["--max-lora-rank", "64"]).max_rank == 8


def test_without_lora_rt_beside_it_vllm_says_how_to_get_it(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = served()
    monkeypatch.setitem(sys.modules, "lora_rt", None)
    assert refusal(resolver, "emotion") == "lora-rt is not installed beside vLLM: pip install --no-deps lora-rt"
