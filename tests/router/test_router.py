"""A routed composition does what a dense model does whose weights are made anew for every token."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_rt.core.requests.composition import Term
from lora_rt.core.requests.named import expanded
from lora_rt.core.requests.planner import RowPlanner
from lora_rt.core.runtime import Runtime
from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import MixtureContext
from lora_rt.plugins.modes import context as context_mode
from lora_rt.plugins.modes import router
from lora_rt.plugins.modes.router.gates import _faded
from lora_rt.registry.reference import Reference
from lora_rt.registry.registry import Registry
from support.routers import router_state
from support.tiny import LAYERS, Zoo, deltas, dense_model

Routed = Callable[..., list[Path]]
IDS = [1, 40, 41, 90, 7, 130, 60]
OTHER = [1, 77, 12, 200, 31, 5, 99]


def early(zoo: Zoo, depth: int = 1) -> Tensor:
    """The base's state after so many blocks at each of IDS, (tokens, hidden), by transformers alone."""
    model = dense_model(zoo.base("llama"), [])
    with torch.inference_mode():
        states: Tensor = model(torch.tensor([IDS]), output_hidden_states=True, use_cache=False).hidden_states[depth]
    return states[0].float()


def weights_by_hand(
    kind: str, state: Mapping[str, Tensor], h: Tensor, start: tuple[float, ...], recent: int = 3
) -> Tensor:
    """The weights that the manual promises, with loops and math alone: (groups, tokens, adapters)."""
    table = []
    for group in range(len(state["total"])):
        rows = []
        said: list[list[float]] = []  # by each token alone, from the first one on
        for token in h:
            unit = token / token.norm()
            features = ((unit - state["mean"]) / state["spread"]).clamp(-6, 6)
            width = len(features) + 1
            said.append([float(features @ m[:-1]) / math.sqrt(width) for m in state["map"][group]])
            counts = [(1 - 1 / recent) ** back for back in range(len(said))]
            means = [
                sum(c * one[k] for c, one in zip(counts, reversed(said), strict=True)) / sum(counts)
                for k in range(len(start))
            ]
            z = [m * math.sqrt(recent) + float(own[-1]) for m, own in zip(means, state["map"][group], strict=True)]
            sizes = [abs(w) for w in start]
            if kind == "independent":
                most = [max(1.0, 2 * w) for w in sizes]
                logits = [math.log(w / c / (1 - w / c)) + x for w, c, x in zip(sizes, most, z, strict=True)]
                found = [c / (1 + math.exp(-x)) for c, x in zip(most, logits, strict=True)]
            else:
                parts = [w * math.exp(x) for w, x in zip(sizes, z, strict=True)]
                shares = [part / sum(parts) for part in parts]
                if kind == "top1":
                    shares = [1.0 if share == max(shares) else 0.0 for share in shares]
                found = [share * sum(sizes) * math.exp(float(state["total"][group])) for share in shares]
            rows.append([math.copysign(f, w) for f, w in zip(found, start, strict=True)])
        table.append(rows)
    return torch.tensor(table)


def dense_logits(zoo: Zoo, folders: list[Path], ids: list[int], table: Tensor) -> Tensor:
    """Logits of a model of transformers whose linear layers add sum_k w[layer, token, k] * PEFT's own delta_k."""
    model = dense_model(zoo.base("llama"), [])
    found = [deltas(zoo.base("llama"), folder) for folder in folders]
    for name, module in model.named_modules():
        mine = [(k, delta[name][0]) for k, delta in enumerate(found) if name in delta]
        if mine:
            layer = int(name.split(".layers.")[1].split(".")[0])
            group = table[layer * len(table) // LAYERS]

            def add(_m: Any, x: tuple[Tensor, ...], y: Tensor, mine: Any = mine, group: Tensor = group) -> Tensor:
                return y + sum(group[None, :, k, None] * (x[0] @ delta.T) for k, delta in mine)

            module.register_forward_hook(add)
    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0].float()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "groups", "recent", "depth"),
    [
        ("softmax", 1, 1, 0),
        ("softmax", 2, 3, 1),
        ("independent", 1, 3, 0),
        ("independent", 2, 1, 1),
        ("top1", 1, 3, 1),
        ("top1", 2, 1, 0),
    ],
)
def test_every_token_gets_the_weights_that_the_manual_promises(
    zoo: Zoo, routed: Routed, kind: str, groups: int, recent: int, depth: int
) -> None:
    start = (0.5, -0.3)
    folders = routed("mine", start, gate=kind, groups=groups, recent=recent, hidden_layers=depth)
    runtime = zoo.runtime("llama", fresh=True)
    table = weights_by_hand(kind, router_state(2, groups), early(zoo, depth), start, recent)
    assert (table.amax(1) - table.amin(1)).max() > 0.15  # the tokens differ
    expected = dense_logits(zoo, folders, IDS, table)
    assert torch.allclose(runtime.logits([IDS], compositions="mine")[0], expected, atol=2e-4)


def test_a_factor_before_its_name_and_terms_beside_it_add_up(zoo: Zoo, routed: Routed) -> None:
    start = (0.5, 0.3)
    folders = routed("mine", start)
    runtime = zoo.runtime("llama", fresh=True)
    table = weights_by_hand("softmax", router_state(), early(zoo), start)
    expected = dense_logits(zoo, folders, IDS, 0.5 * table + torch.tensor([0.0, 0.25]))
    found = runtime.logits([IDS], compositions=f"mine:0.5 {folders[1]}:0.25")[0]
    assert torch.allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_row_alone_is_the_row_in_a_batch_beside_static_ones_and_the_base(
    zoo: Zoo, routed: Routed, depth: int
) -> None:
    folders = routed("mine", hidden_layers=depth)
    routed("hard", gate="top1")
    runtime = zoo.runtime("llama", fresh=True)
    specs = ["mine", f"{folders[0]}:0.7", None, "hard", "mine:0.4", f"{folders[1]}:0.2 {folders[0]}"]
    rows = [IDS, OTHER, IDS, OTHER, OTHER, IDS]
    together = runtime.logits(rows, compositions=specs)
    for row, spec, found in zip(rows, specs, together, strict=True):
        assert torch.allclose(found, runtime.logits([row], compositions=[spec])[0], atol=1e-4)


@pytest.mark.parametrize("depth", [0, 1])
def test_decoding_with_the_cache_is_decoding_without_it(zoo: Zoo, routed: Routed, depth: int) -> None:
    routed("mine", hidden_layers=depth)
    runtime = zoo.runtime("llama", fresh=True)
    ids = list(IDS)
    for (token,) in runtime.decode([IDS], "mine", max_new_tokens=10):
        assert token is not None
        assert int(runtime.logits([ids], compositions="mine")[0, -1].argmax()) == token
        ids.append(token)


@pytest.mark.parametrize("tokens", [3, 40, 700])
def test_a_mean_over_the_last_tokens_is_the_same_in_pieces_behind_padding_and_at_once(tokens: int) -> None:
    z = torch.randn(2, 1, tokens, 3, generator=torch.Generator().manual_seed(tokens))
    padded = torch.cat([torch.full((2, 1, 5, 3), float("nan")), z], 2)
    mask = torch.ones(1, tokens)
    whole = _faded(z, mask, tokens, 2)
    last: list[Tensor] = []
    for token in z.unbind(2):  # one after another, as it is defined, without an end to what counts
        last.append(token)
        counts = torch.tensor([0.5**back for back in range(len(last))][::-1])
        wanted = torch.einsum("t,tgrk->grk", counts / counts.sum(), torch.stack(last)) * 2**0.5
        assert torch.allclose(whole[:, :, len(last) - 1], wanted, atol=1e-3)
        if len(last) == 30:
            break
    behind = _faded(padded, torch.cat([torch.zeros(1, 5), mask], 1), 2, 2)
    assert torch.allclose(behind, whole[:, :, -2:], atol=1e-6)


def test_it_wakes_up_after_a_text(zoo: Zoo, routed: Routed) -> None:
    routed("mine")
    runtime = zoo.runtime("llama", fresh=True)
    ids = runtime.tokenizer("one two three", return_tensors="pt").input_ids
    waiting, plain, whole = (runtime.logits(ids, compositions=[spec])[0] for spec in ("mine[two]", None, "mine"))
    before = len("one two")  # a token is a byte
    assert torch.allclose(waiting[: before - 1], plain[: before - 1], atol=1e-5)
    assert not torch.allclose(waiting[before:], plain[before:], atol=1e-3)
    assert not torch.allclose(waiting[before:], whole[before:], atol=1e-3)  # keys and values before are the base's


def test_no_adapter_is_asked_for_its_mode_and_the_early_state_is_read_once(
    zoo: Zoo, routed: Routed, monkeypatch: pytest.MonkeyPatch
) -> None:
    routed("mine")
    runtime = zoo.runtime("llama", fresh=True)
    calls: list[int | None] = []
    hidden = RowPlanner._hidden
    monkeypatch.setattr(
        RowPlanner, "_hidden", lambda self, info, depth: calls.append(depth) or hidden(self, info, depth)
    )
    runtime.logits([IDS, OTHER], compositions=["mine", "mine:0.5"])
    assert calls == [1]


def test_an_adapter_s_mode_and_a_composition_s_read_one_early_state(
    zoo: Zoo, routed: Routed, monkeypatch: pytest.MonkeyPatch
) -> None:
    routed("mine")
    runtime = zoo.runtime("llama", fresh=True)
    made: list[object] = []
    own = RowPlanner._hidden_of
    monkeypatch.setattr(RowPlanner, "_hidden_of", lambda self, info: made.append(1) or own(self, info))
    runtime.logits([IDS], compositions=["mine"])
    assert made == [1]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"state": router_state(3)}, "does not fit 2 adapters over a base of hidden size 64"),
        ({"state": router_state(2, hidden=32)}, "does not fit 2 adapters over a base of hidden size 64"),
        ({"state": {"map": torch.zeros(1, 2, 65)}}, "does not fit"),
        ({"hidden_layers": 9}, "9 blocks, and this base has 2"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(zoo: Zoo, routed: Routed, changes: dict[str, Any], told: str) -> None:
    routed("mine", **changes)
    with pytest.raises(LoraRtError) as caught:
        zoo.runtime("llama", fresh=True).logits([IDS], compositions="mine")
    assert told in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.next_step


def test_another_base_is_refused_before_anything_is_read(zoo: Zoo, routed: Routed) -> None:
    routed("mine", base="someone/else")
    facts = replace(zoo.runtime("llama").base, id="some/base")
    with pytest.raises(LoraRtError, match="does not fit this base: it is for someone/else, in use is some/base"):
        expanded(Term(Reference.parse("mine")), Registry().compositions, facts)


def test_tensors_that_were_swapped_and_adapters_that_are_others_are_refused(zoo: Zoo, routed: Routed) -> None:
    routed("mine")
    compositions = Registry().compositions
    saved = compositions.own("mine")
    assert saved is not None
    wrong = saved.terms[0].model_copy(update={"sha256": "0" * 64})
    compositions.save(saved.model_copy(update={"name": "stale", "terms": (wrong, saved.terms[1])}))
    runtime = zoo.runtime("llama", fresh=True)
    with pytest.raises(LoraRtError, match="was tuned for other files"):
        runtime.logits([IDS], compositions="stale")
    (compositions.folder / "mine.safetensors").write_bytes(b"something else")
    with pytest.raises(LoraRtError, match="lacks the tensors of its mode 'router'") as caught:
        runtime.logits([IDS], compositions="mine")
    assert "has other bytes" in caught.value.problems[0]


def test_a_composition_without_a_mode_has_the_digest_and_the_file_it_always_had(zoo: Zoo, routed: Routed) -> None:
    routed("mine")
    saved = Registry().compositions.own("mine")
    assert saved is not None
    plain = saved.model_copy(update={"mode": "", "state": "", "card": {}, "hidden_layers": None})
    assert set(plain.document()) == {"name", "base", "terms", "data_sha256", "seed", "metrics"}
    assert plain.sha256 != saved.sha256
    assert saved.model_copy(update={"card": {"gate": "top1"}}).sha256 != saved.sha256


def test_the_static_mix_is_where_a_router_starts(zoo: Zoo, routed: Routed) -> None:
    for kind in ("softmax", "independent"):
        state = {**router_state(), "map": torch.zeros(1, 2, 65), "total": torch.zeros(1)}
        folders = routed("mine", (0.5, -0.3), gate=kind, state=state)
        runtime: Runtime = zoo.runtime("llama", fresh=True)
        static = runtime.logits([IDS], compositions=f"{folders[0]}:0.5 {folders[1]}:-0.3")
        assert torch.allclose(runtime.logits([IDS], compositions="mine"), static, atol=1e-5)


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("settings", [{"deterministic": True}, {"chunk": 4}])
def test_rows_that_are_read_in_passes_of_their_own_say_what_they_say_alone(
    zoo: Zoo, routed: Routed, settings: dict[str, Any], depth: int
) -> None:
    """Of other lengths, one of which joins while the other speaks: several groups of rows ask for early states."""
    routed("mine", hidden_layers=depth)
    runtime = zoo.runtime("llama", fresh=True)
    asked = ["abc", "some longer words to be read", "x"]

    def said(prompts: list[str], **settings: Any) -> list[list[int]]:
        batch = runtime.batch(**settings)
        rows = runtime.rows(prompts, ["mine"] * len(prompts), max_new_tokens=6)
        for row in rows:
            batch.add([row])
            batch.step()
        while batch.rows:
            batch.step()
        return [list(row.answer) for row in rows]

    assert said(asked, **settings) == [said([prompt])[0] for prompt in asked]


def test_options_beyond_the_base_are_refused_by_their_range(zoo: Zoo) -> None:
    facts = zoo.runtime("llama").base
    context = MixtureContext(["a", "b"], [0.5, 0.5], ["x"], {}, facts, lambda _depth: torch.zeros(3, 64))
    for options, told in (({"hidden-layers": "-1"}, "2 layers"), ({"hidden-layers": "3"}, "2 layers")):
        for mode in (router, context_mode):
            with pytest.raises(LoraRtError, match=told):
                mode.lora_rt_mixture(replace(context, options=options))
    for groups in ("-1", "3"):
        with pytest.raises(LoraRtError, match="groups is"):
            router.lora_rt_mixture(replace(context, options={"groups": groups}))
