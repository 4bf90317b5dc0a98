"""What acts at inference has no static form: it is refused by name, all of it at once, or exported on request."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from lora_rt.core.export import ExportError
from lora_rt.core.step.adapter import described_state
from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import AdapterView, ComposeContext, Gate, GateContext, hookimpl
from lora_rt.plugins.manager import PluginError
from lora_rt.registry.card import AdapterCard, BaseIdentity, write_card
from lora_rt.registry.errors import OccupiedFolderError
from support.exports import Export
from support.tiny import HEADS, HIDDEN, LAYERS, Zoo, dense_logits, mode_host, peft_model, some_ids

IDS = some_ids(rows=1)


class Fading:
    @hookimpl
    def lora_rt_gate(context: GateContext) -> Gate:  # type: ignore[misc]  # a hook is a function
        return Gate(ranks=torch.linspace(0, 1, context.input_ids.shape[1])[:, None])


class Quiet:
    """Gates only adapters that keep something."""

    @hookimpl
    def lora_rt_gate(context: GateContext) -> Gate | None:  # type: ignore[misc]
        return Gate(ranks=torch.zeros(1)) if context.state else None

    @hookimpl
    def lora_rt_static(context: AdapterView) -> str:  # type: ignore[misc]
        return "it keeps something" if context.state else ""


class Silent:
    """Gates where a prompt asks for it, which nobody can find out by trying."""

    @hookimpl
    def lora_rt_gate(context: GateContext) -> Gate | None:  # type: ignore[misc]
        return Gate(ranks=torch.zeros(1)) if "open sesame" in context.prompts else None


class Nonsense:
    @hookimpl
    def lora_rt_gate(context: GateContext) -> None:  # type: ignore[misc]
        return None

    @hookimpl
    def lora_rt_static(context: AdapterView) -> Any:  # type: ignore[misc]
        return True


class Doubling:
    @hookimpl
    def lora_rt_compose(context: ComposeContext) -> Sequence[float]:  # type: ignore[misc]
        return [2 * context.terms[index].weight for index in context.mine]


HOOKS = {"fading": Fading, "quiet": Quiet, "silent": Silent, "doubling": Doubling, "nonsense": Nonsense}


def stateful(zoo: Zoo, folder: Path, mode: str, state: Mapping[str, torch.Tensor], **card: Any) -> Path:
    """A random adapter whose mode keeps this state."""
    shutil.copytree(zoo.adapter("llama", seed=1), folder)
    save_file(dict(state), folder / "mode.safetensors")
    base = BaseIdentity(id=zoo.base("llama").name, revision=None, digest="")
    write_card(folder, AdapterCard(register="logic", mode=mode, base=base, state=described_state(folder), **card))
    return folder


def context_adapter(zoo: Zoo, folder: Path, size: float) -> Path:
    """Gates of every head for two scene types, all 1 where size is 0."""
    shapes = {"theta": (2, LAYERS, HEADS), "scale": (2,), "registrar": (3, HIDDEN + 1)}
    state = {name: torch.full(shape, size) for name, shape in shapes.items()}
    return stateful(zoo, folder, "context", state, scene_types=("logic", "body"))


def matches(zoo: Zoo, out: Path, terms: Sequence[tuple[Path, float]]) -> None:
    with torch.inference_mode():
        found = peft_model(zoo.base("llama"), out)(input_ids=IDS).logits
    assert_close(found, dense_logits(zoo.base("llama"), terms, IDS), atol=1e-4, rtol=0.0)


@pytest.mark.parametrize("mode", ["fading", "silent", "doubling"])
def test_a_mode_that_acts_is_refused_by_name(zoo: Zoo, exported: Export, tmp_path: Path, mode: str) -> None:
    adapter = zoo.adapter("llama", seed=1, mode=mode)
    with pytest.raises(
        ExportError, match=f"{adapter.name}.* has no static equivalent: its mode '{mode}' acts"
    ) as caught:
        exported(f"{adapter}:0.5", modes=mode_host(**HOOKS))
    assert "--static" in caught.value.next_step
    assert list(tmp_path.glob("*export-*")) == []


@pytest.mark.parametrize("mode", ["fading", "doubling"])
def test_on_request_it_is_exported_with_gates_of_one_and_the_weights_given(
    zoo: Zoo, exported: Export, mode: str
) -> None:
    adapter = zoo.adapter("llama", seed=1, mode=mode)
    done = exported(f"{adapter}:0.5", modes=mode_host(**HOOKS), static=True)
    matches(zoo, done.path, [(adapter, 0.5)])
    assert json.loads((done.path / "register.json").read_text())["training"]["gates_left_out"] is True
    assert "as if always on" in (done.path / "README.md").read_text()


def test_a_mode_that_could_act_and_does_not_is_exported_with_a_note(zoo: Zoo, exported: Export) -> None:
    adapter = zoo.adapter("llama", seed=1, mode="quiet")
    done = exported(f"{adapter}:0.5", modes=mode_host(**HOOKS))
    matches(zoo, done.path, [(adapter, 0.5)])
    assert done.notes == [f"{adapter.name}: its mode 'quiet' can act at inference, and leaves this one alone"]


def test_a_mode_says_why_an_adapter_is_not_static(zoo: Zoo, exported: Export, tmp_path: Path) -> None:
    keeping = stateful(zoo, tmp_path / "keeping", "quiet", {"x": torch.ones(1)})
    with pytest.raises(ExportError, match="its mode 'quiet' acts at inference: it keeps something"):
        exported(str(keeping), modes=mode_host(**HOOKS))
    with pytest.raises(PluginError, match=r"'nonsense' .*failed in lora_rt_static: it returned a bool, not a text"):
        exported(str(zoo.adapter("llama", seed=1, mode="nonsense")), modes=mode_host(**HOOKS))


def test_context_gates_are_refused_and_untrained_ones_are_none(zoo: Zoo, exported: Export, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="'context' acts at inference: its gate depends on the scene type"):
        exported(str(context_adapter(zoo, tmp_path / "trained", 0.7)))
    matches(zoo, exported(str(context_adapter(zoo, tmp_path / "fresh", 0.0))).path, [(tmp_path / "fresh", 1.0)])


def test_a_bridge_is_refused_where_it_reserves_ranks(zoo: Zoo, exported: Export, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="'bridge' acts at inference: a share of its ranks"):
        exported(str(stateful(zoo, tmp_path / "reserving", "bridge", {"reserve": torch.tensor(0.25)})))
    shared = zoo.adapter("llama", seed=1, mode="bridge")
    matches(zoo, exported(str(shared)).path, [(shared, 1.0)])


def test_a_term_that_waits_is_refused_or_awake_from_the_start(zoo: Zoo, exported: Export, pool: list[Path]) -> None:
    spec = f"{pool[0]}:0.5[So:] {pool[1]}:0.25"
    with pytest.raises(ExportError, match="it waits for 'So:'"):
        exported(spec)
    matches(zoo, exported(spec, static=True).path, [(pool[0], 0.5), (pool[1], 0.25)])


def test_an_absent_mode_is_refused_and_static_on_request(zoo: Zoo, exported: Export) -> None:
    adapter = zoo.adapter("llama", seed=1, mode="from-elsewhere")
    with pytest.raises(LoraRtError, match="no plugin provides the mode 'from-elsewhere'"):
        exported(str(adapter))
    matches(zoo, exported(str(adapter), static=True).path, [(adapter, 1.0)])


def test_everything_that_is_wrong_is_named_at_once(zoo: Zoo, exported: Export, pool: list[Path]) -> None:
    fading = zoo.adapter("llama", seed=1, mode="fading")
    wide = zoo.adapter("llama", seed=9, changes={"hidden_size": 128})
    with pytest.raises(ExportError, match="4 terms of") as caught:
        exported(f"nobody:1 {pool[0]}:1[x] {wide} {fading}", modes=mode_host(**HOOKS))
    found = "\n".join(caught.value.problems)
    for part in (
        "no adapter 'nobody'",
        "waits for 'x'",
        "(8, 128), should be (8, 64)",
        "'fading' acts at inference (lora_rt_gate)",
    ):
        assert part in found


def test_a_folder_with_something_in_it_is_left_alone(
    zoo: Zoo, exported: Export, pool: list[Path], tmp_path: Path
) -> None:
    from lora_rt.core.export.run import export

    kept, empty = tmp_path / "kept", tmp_path / "empty"
    kept.mkdir()
    empty.mkdir()
    (kept / "thesis.txt").write_text("x")
    with pytest.raises(OccupiedFolderError, match="not empty"):
        export(str(pool[0]), "peft", kept, base=str(zoo.base("llama")))
    assert [path.name for path in kept.iterdir()] == ["thesis.txt"]
    export(str(pool[0]), "peft", empty, base=str(zoo.base("llama")))
    names = {path.name for path in empty.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "register.json", "README.md"}
    assert {path.stat().st_mode & 0o777 for path in empty.iterdir()} == {0o644}
    assert list(tmp_path.glob(".*")) == []
