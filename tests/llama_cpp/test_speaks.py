"""llama.cpp says what our own engine says, by the same rules of text, over the same GGUF file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_rt.core.export.run import Exporter
from lora_rt.core.llama_cpp.runtime import LlamaRuntime
from lora_rt.core.llama_cpp.server import LlamaServer
from lora_rt.core.requests.composition import RequestError
from lora_rt.core.runtime import Runtime
from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import Gate, GateContext, hookimpl
from lora_rt.plugins.manager import load_modes
from lora_rt.registry.compositions import NamedComposition, NamedTerm
from lora_rt.registry.registry import Registry
from support.tiny import Zoo, mode_host

pytest.importorskip("xllamacpp")


@pytest.fixture
def llama(gguf: Path) -> Iterator[LlamaRuntime]:
    made = LlamaRuntime.load(str(gguf), registry=Registry(), modes=load_modes(), device="cpu")
    yield made
    made.close()


PROMPTS: list[Any] = [
    "ab",
    "<eos> is text, é too",
    [{"role": "system", "content": "be kind"}, {"role": "user", "content": "ab"}],
]


@pytest.mark.slow
def test_greedy_texts_are_those_of_the_torch_engine_whatever_the_scales(
    llama: LlamaRuntime, torch_runtime: Runtime, adapters: tuple[str, str]
) -> None:
    one, other = adapters
    specs = [None, one, f"{one}:0.7 {other}:-0.6", f"{other}:2 {one}:0 {other}:-0.5"]
    rows = [(prompt, spec) for prompt in PROMPTS for spec in specs]
    prompts, compositions = [row[0] for row in rows], [row[1] for row in rows]
    for settings in ({}, {"repetition_penalty": 1.4}, {"stop": ["a"]}):
        asked = {"max_new_tokens": 12, **settings}
        told = torch_runtime.generate(prompts, compositions, deterministic=True, **asked)
        assert llama.generate(prompts, compositions, **asked) == told
        assert len(set(told)) > 6
    assert llama.generate(tuple(prompts[:3]), tuple(compositions[:3]), **asked) == told[:3]
    assert llama.generate([]) == torch_runtime.generate([]) == []
    for runtime in (llama, torch_runtime):
        with pytest.raises(RequestError, match="2 compositions for 3 rows"):
            runtime.generate(prompts[:3], compositions[:2])


def test_weights_per_layer_are_kept_and_shown_as_their_mean(
    llama: LlamaRuntime, gguf: Path, adapters: tuple[str, str]
) -> None:
    terms = (NamedTerm(reference=adapters[0], weight=2.0, layers=(0.0, 0.7)), NamedTerm(reference=adapters[1]))
    Registry().compositions.save(NamedComposition(name="mine", base=gguf.stem, terms=terms))
    torch_runtime = Runtime.load(str(gguf), precision="float32", device="cpu")
    for spec in ("mine", f"mine:-0.5 {adapters[0]}:0.2"):
        asked = {"max_new_tokens": 12}
        assert llama.generate(["ab"], spec, **asked) == torch_runtime.generate(["ab"], spec, **asked)
    found = [(origin.name, weight) for origin, weight in llama.terms("mine")]
    assert found == [(Path(adapters[0]).name, pytest.approx(0.7)), (Path(adapters[1]).name, 1.0)]
    mean = llama.generate(["ab"], f"{adapters[0]}:0.7 {adapters[1]}", max_new_tokens=12)
    assert mean != llama.generate(["ab"], "mine", max_new_tokens=12)


def test_a_file_that_is_cut_off_is_named(gguf: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf.read_bytes()[:-4096])
    with pytest.raises(LoraRtError, match=r"llama\.cpp can't load cut\.gguf"):
        LlamaServer(cut, [], 256, "cpu")


def test_an_adapter_that_its_mode_gates_is_refused(gguf: Path, zoo: Zoo) -> None:
    class Fading:
        @hookimpl
        def lora_rt_gate(context: GateContext) -> Gate:  # type: ignore[misc]  # a hook is a function
            raise AssertionError("it is not asked")

    gated = str(zoo.adapter("llama", seed=1, mode="fading"))
    llama = LlamaRuntime.load(str(gguf), registry=Registry(), modes=mode_host(fading=Fading), device="cpu")
    with pytest.raises(LoraRtError, match="its mode 'fading' acts at inference") as caught:
        llama.terms(gated)
    assert caught.value.next_step == "Use --engine torch"


def test_an_adapter_that_changes_while_it_is_written_is_not_kept_for_what_it_was(
    llama: LlamaRuntime, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(zoo.adapter("llama", seed=1, r=4), tmp_path / "mine"))
    gather = Exporter.gather

    def changed(self: Exporter, composition: Any) -> Any:
        shutil.copy(zoo.adapter("llama", seed=9, r=4) / "adapter_model.safetensors", folder)
        return gather(self, composition)

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(Exporter, "gather", changed)
        with pytest.raises(LoraRtError, match="was changed while it was read"):
            llama.generate("ab", str(folder), max_new_tokens=2)
    assert llama.generate("ab", str(folder), max_new_tokens=2)


def test_new_weights_hold_from_the_next_token_on(
    llama: LlamaRuntime, torch_runtime: Runtime, adapters: tuple[str, str]
) -> None:
    before, after = f"{adapters[0]}:0.7", f"{adapters[1]}:2"
    stream = llama.stream("ab", before, max_new_tokens=9)
    said = [next(stream) for _ in range(3)]
    stream.compose(after)
    said += stream
    assert "".join(said[:3]) == torch_runtime.generate("ab", before, max_new_tokens=9)[: len("".join(said[:3]))]
    assert "".join(said) != torch_runtime.generate("ab", before, max_new_tokens=9)


def test_scales_change_without_a_reload_and_a_new_adapter_is_one(
    llama: LlamaRuntime, adapters: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[list[Path]] = []
    begin = LlamaServer.__init__

    def noted(self: LlamaServer, gguf: Path, files: list[Path], *rest: Any) -> None:
        loads.append(files)
        begin(self, gguf, files, *rest)

    monkeypatch.setattr(LlamaServer, "__init__", noted)
    for spec in (adapters[0], f"{adapters[0]}:0.2", None, f"{adapters[0]}:-1", f"{adapters[1]}:1", adapters[0]):
        llama.generate(["ab"], spec, max_new_tokens=2)
    assert [len(files) for files in loads] == [1, 2]


def test_an_answer_ends_where_the_context_does(llama: LlamaRuntime, torch_runtime: Runtime) -> None:
    prompt = "a" * 200  # of 256 tokens
    told = torch_runtime.generate(prompt, max_new_tokens=500)
    assert llama.generate([prompt], max_new_tokens=500) == [told]
    with pytest.raises(LoraRtError, match="context holds 256"):
        llama.generate(["a" * 300])
