"""What a mode says of weights and gates reaches the engine, and it is told the truth about the pass."""

from __future__ import annotations

import threading
from typing import Any, ClassVar

import pytest
import torch
from torch.testing import assert_close

from lora_rt.core.runtime import Runtime
from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import ComposeContext, Gate, GateContext, JointGateContext, hookimpl
from support.tiny import LAYERS, Zoo, mode_host, some_ids

EXACT = {"atol": 1e-4, "rtol": 0.0}
OPTIONS = {"max_new_tokens": 6, "min_new_tokens": 6}


def with_mode(zoo: Zoo, hooks: Any, **options: Any) -> Runtime:
    """A runtime with an adapter "own" of that mode and an adapter "free" of none."""
    runtime = zoo.runtime_with(mode_host(tested=hooks), "llama")
    runtime.load_adapter(str(zoo.adapter("llama", mode="tested", seed=51, **options)), name="own")
    runtime.load_adapter(str(zoo.adapter("llama", seed=52)), name="free")
    return runtime


def test_the_mode_of_a_term_decides_its_weight(zoo: Zoo) -> None:
    class Halved:
        @hookimpl
        def lora_rt_compose(context: ComposeContext) -> list[float]:  # type: ignore[misc]
            return [context.terms[index].weight / 2 for index in context.mine]

    runtime = with_mode(zoo, Halved)
    ids = some_ids()
    found = runtime.logits(ids, compositions="own:1 free:1")
    plain = zoo.runtime("llama", fresh=True)
    for name in ("own", "free"):
        plain.parts.bank.add(runtime.resident(name))
    plan = plain.parts.bank.plan([{"own": 0.5, "free": 1.0}])
    assert plan is not None
    with torch.inference_mode(), plan.running(*ids.shape):
        assert_close(found, plain.model(input_ids=ids).logits, **EXACT)


def test_sixteen_rows_with_four_waking_texts_are_weighed_in_one_thread(zoo: Zoo) -> None:
    """A mode may take its time, so it is asked in a thread that can be given up: one a request, not one a phase."""
    asked: list[int] = []

    class Noting:
        @hookimpl
        def lora_rt_compose(context: ComposeContext) -> list[float]:  # type: ignore[misc]
            asked.append(threading.get_ident())
            return [1.0] * len(context.mine)

    runtime = with_mode(zoo, Noting)
    runtime.parts.rows([[5, 6, 7]] * 16, "own own:2[a] own:3[b] own:4[c] own:5[d]")
    assert len(asked) == 16 * 2**4
    assert len(set(asked)) == 1
    assert threading.get_ident() not in asked


def test_a_gate_that_opens_with_the_answer_leaves_the_prompt_to_the_base(zoo: Zoo) -> None:
    class Late:
        @hookimpl
        def lora_rt_gate(context: GateContext) -> Gate:  # type: ignore[misc]
            begun = context.positions >= context.prompt_lengths[:, None]
            return Gate(begun.float()[..., None])

    runtime = with_mode(zoo, Late)
    base, own = runtime.generate("a prompt", None, **OPTIONS), runtime.generate("a prompt", "own:3", **OPTIONS)
    assert own[0] == base[0], "the first token comes from the prompt alone"
    assert own != base
    batch = runtime.generate(["a prompt", "a longer prompt than that"], ["own:3", "own:-2 free"], **OPTIONS)
    assert batch[0] == own
    assert batch[1] == runtime.generate("a longer prompt than that", "own:-2 free", **OPTIONS)


def test_a_gate_is_told_the_truth_about_every_pass(zoo: Zoo) -> None:
    seen: list[GateContext] = []

    class Watching:
        @hookimpl
        def lora_rt_gate(context: GateContext) -> None:  # type: ignore[misc]
            seen.append(context)

    runtime = with_mode(zoo, Watching, r=3)
    runtime.generate(
        ["ab", "a longer one"], ["own:0.5", "free"], scenes=["body", None], max_new_tokens=3, min_new_tokens=3
    )
    lengths = [len(f"user: {text}\nassistant: ") for text in ("ab", "a longer one")]
    assert [tuple(c.input_ids.shape) for c in seen] == [(2, max(lengths)), (2, 1), (2, 1)]
    assert [c.positions[:, -1].tolist() for c in seen] == [[n - 1 + step for n in lengths] for step in range(3)]
    assert all(c.prompt_lengths.tolist() == lengths for c in seen)
    assert all((list(c.active), list(c.scene_types)) == ([True, False], ["body", None]) for c in seen)
    assert all((c.adapter, c.rank, c.uniform_rank, c.base.layers) == ("own", 3, True, LAYERS) for c in seen)


def test_the_early_hidden_state_of_a_cached_pass_sees_all_tokens_so_far(zoo: Zoo) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Looking:
        @hookimpl
        def lora_rt_gate(context: GateContext) -> None:  # type: ignore[misc]
            seen.append((context.input_ids, context.hidden()))

    runtime = with_mode(zoo, Looking)
    runtime.generate("ab", "own", max_new_tokens=3, min_new_tokens=3)
    ids = torch.cat([given for given, _ in seen], dim=1)
    with torch.inference_mode():
        wanted = runtime.model(input_ids=ids, output_hidden_states=True).hidden_states[1]
    assert_close(torch.cat([hidden for _, hidden in seen], dim=1), wanted, **EXACT)
    assert [hidden.shape[1] for _, hidden in seen[1:]] == [1, 1]


def test_what_a_gate_holds_for_rows_that_do_not_use_the_adapter_is_ignored(zoo: Zoo) -> None:
    class Careless:
        @hookimpl
        def lora_rt_gate(context: GateContext) -> Gate:  # type: ignore[misc]
            active = torch.tensor(list(context.active))[:, None, None]
            return Gate(torch.where(active, 1.0, torch.nan), torch.where(active, 1.0, torch.inf).expand(-1, -1, 4))

    runtime = with_mode(zoo, Careless)
    ids = some_ids(rows=2)
    found = runtime.logits(ids, compositions=["own", "free:0.5"])
    assert_close(found[1:], runtime.logits(ids[1:], compositions="free:0.5"), **EXACT)
    assert_close(found[:1], runtime.logits(ids[:1], compositions="own"), **EXACT)


@pytest.mark.parametrize(
    "gate",
    [
        1.0,
        Gate(torch.ones(7)),
        Gate(torch.tensor(torch.nan)),
        Gate(heads=torch.ones(5)),
        Gate(torch.ones(1, 1, 1, 1, 1)),
    ],
    ids=["no gate", "another rank", "not a number", "other heads", "five axes"],
)
def test_an_impossible_gate_is_its_plugin_s_fault(zoo: Zoo, gate: Any) -> None:
    class Wrong:
        @hookimpl
        def lora_rt_gate(context: GateContext) -> Any:  # type: ignore[misc]
            return gate

    with pytest.raises(LoraRtError, match="tested"):
        with_mode(zoo, Wrong).generate("x", "own", **OPTIONS)


class Routing:
    """A softmax among the mode's adapters over their early hidden state, per token; weights are its scores' prior."""

    seen: ClassVar[list[list[tuple[str, list[bool], list[float]]]]] = []

    @hookimpl
    def lora_rt_joint_gate(context: JointGateContext) -> list[Gate]:  # type: ignore[misc]
        Routing.seen.append([(a.adapter, list(a.active), list(a.weights)) for a in context.adapters])
        scores = torch.stack([one.hidden()[..., k] for k, one in enumerate(context.adapters)])
        active = torch.tensor([list(one.active) for one in context.adapters])[..., None]
        shares = scores.masked_fill(~active, -torch.inf).softmax(0).nan_to_num()
        return [Gate(ranks=share[..., None]) for share in shares]


def test_a_gate_among_adapters_reaches_the_engine_per_token(zoo: Zoo) -> None:
    """With a cache, beside rows that use fewer of them, equal to the row alone; one of them alone has all of it."""
    runtime = with_mode(zoo, Routing)
    runtime.load_adapter(str(zoo.adapter("llama", mode="tested", seed=53)), name="other")
    prompts, specs = ["rain", "a longer prompt about bread", "rain"], ["own:1 other:0.5", "own:1 other:0.5", "own free"]
    together = runtime.generate(prompts, specs, **OPTIONS)
    assert Routing.seen[-1] == [("own", [True] * 3, [1.0] * 3), ("other", [True, True, False], [0.5, 0.5, 0.0])]
    for prompt, spec, text in zip(prompts, specs, together, strict=True):
        assert runtime.generate(prompt, spec, **OPTIONS) == text
    ids = some_ids()
    plain = with_mode(zoo, type("Nothing", (), {"lora_rt_compose": hookimpl(_users_own)}))
    assert_close(runtime.logits(ids, compositions="own:1"), plain.logits(ids, compositions="own:1"), **EXACT)
    assert not torch.allclose(runtime.logits(ids, compositions="own other"), runtime.logits(ids, compositions="own"))


def _users_own(context: ComposeContext) -> None:
    return None
