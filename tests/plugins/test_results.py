"""What hooks return is checked before core uses it: nonsense is named as its plugin's and reaches no forward pass."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from lora_rt.plugins.contract import (
    IGNORE,
    Encoded,
    Gate,
    LoraRtError,
    Mixture,
    MixtureContext,
    Objective,
    ScenePrediction,
)
from lora_rt.plugins.manager import ModeHost, PluginError
from lora_rt.plugins.testing import compose_context, gate_context, host_of, objective_context, scene_context
from support.plugins import plugin


def returning(hook: str, value: Any) -> ModeHost:
    def function(context: Any) -> Any:
        return value

    function.__name__ = hook
    return host_of(plugin(function), builtin=False)


def refused(host: ModeHost, call: Any) -> str:
    """The reason with which a result is refused; the record has it as well."""
    with pytest.raises(PluginError) as caught:
        call()
    assert host.records[0].reason in caught.value.message
    assert host.records[0].status == "faulty"
    return host.records[0].reason


class Odd(torch.Tensor):
    """A tensor of a stranger's own kind."""


with warnings.catch_warnings(action="ignore"):  # torch means to drop or change these one day
    QUANTIZED = torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)
    NESTED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


# layers 2, rows 2, tokens 3, rank 4, heads 4
BAD_GATES = {
    "no Gate": (torch.ones(1), "it returned a Tensor, not a Gate"),
    "a number": (1.0, "it returned a float, not a Gate"),
    "ranks a list": (Gate(ranks=[1.0]), "ranks is a list, not a tensor"),  # type: ignore[arg-type]
    "ranks of another rank": (Gate(ranks=torch.ones(5)), "ranks of shape (5,) does not broadcast to (2, 2, 3, 4)"),
    "more layers": (Gate(ranks=torch.ones(3, 1, 1, 1)), "ranks of shape (3, 1, 1, 1) does not broadcast"),
    "more rows": (Gate(ranks=torch.ones(5, 1, 1)), "does not broadcast"),
    "five axes": (Gate(ranks=torch.ones(1, 1, 1, 1, 1)), "does not broadcast"),
    "empty": (Gate(ranks=torch.ones(0)), "does not broadcast"),
    "NaN": (Gate(ranks=torch.tensor([math.nan])), "ranks holds numbers that are not finite"),
    "infinite": (Gate(ranks=torch.tensor([math.inf])), "ranks holds numbers that are not finite"),
    "complex": (Gate(ranks=torch.ones(1, dtype=torch.complex64)), "ranks is complex"),
    "sparse": (Gate(ranks=torch.ones(2, 2).to_sparse()), "ranks is sparse (sparse_coo), not a plain tensor"),
    "quantized": (Gate(heads=QUANTIZED), "heads is quantized, not a plain tensor of real numbers"),
    "nested": (Gate(ranks=NESTED), "ranks is nested"),
    "a subclass": (Gate(ranks=torch.ones(1).as_subclass(Odd)), "ranks is a Odd, not a plain tensor"),
    "elsewhere": (Gate(ranks=torch.ones(1, device="meta")), "ranks is on meta, and this pass on cpu"),
    "heads of another number": (Gate(heads=torch.ones(3)), "heads of shape (3,) does not broadcast to (2, 2, 3, 4)"),
    "heads NaN": (Gate(heads=torch.full((4,), math.nan)), "heads holds numbers that are not finite"),
}


@pytest.mark.parametrize("case", BAD_GATES)
def test_a_gate_of_nonsense_is_refused(case: str) -> None:
    gate, reason = BAD_GATES[case]
    host = returning("lora_rt_gate", gate)
    assert reason in refused(host, lambda: host.gate("mine", gate_context([1, 1], 3)))


@pytest.mark.parametrize("shape", [(), (1,), (4,), (3, 1), (2, 1, 1), (2, 1, 1, 1), (2, 2, 3, 4)])
def test_a_gate_that_broadcasts_is_taken_as_it_is(shape: tuple[int, ...]) -> None:
    given = Gate(ranks=torch.rand(shape), heads=torch.rand(shape))
    taken = returning("lora_rt_gate", given).gate("mine", gate_context([1, 1], 3))
    assert taken is not None
    assert torch.equal(taken.ranks, given.ranks)  # type: ignore[arg-type]
    assert torch.equal(taken.heads, given.heads)  # type: ignore[arg-type]


def test_a_gate_that_would_be_trained_is_taken_without_its_gradient() -> None:
    for gate in (torch.ones(1, requires_grad=True), nn.Parameter(torch.ones(1))):
        with torch.inference_mode():
            taken = returning("lora_rt_gate", Gate(ranks=gate)).gate("mine", gate_context([1], 2))
        assert taken is not None
        assert taken.ranks is not None
        assert (type(taken.ranks), taken.ranks.requires_grad) == (torch.Tensor, False)


SEEN = ("input_ids", "positions", "prompt_lengths", "hidden", "history", "state", "card")


@pytest.mark.parametrize("what", SEEN)
def test_a_gate_that_writes_into_its_context_changes_nobody_elses(what: str) -> None:
    """Other rows, other adapters and other requests see what was there; a card can't be written to at all."""

    def lora_rt_gate(context: Any) -> None:
        if what == "card":
            context.card["mode"] = "mine"
        elif what == "state":
            context.state["theta"].fill_(7)
        elif what == "history":
            for tensor in context.history():
                tensor.fill_(7)
        else:
            tensor = getattr(context, what)
            (tensor() if what == "hidden" else tensor).fill_(7)

    host = host_of(plugin(lora_rt_gate), builtin=False)
    before, history = gate_context([1, 2], 3), gate_context([1, 2], 3).history()
    context = gate_context([1, 2], 3, state={"theta": torch.zeros(2)}, card={"mode": "mine"}, history=lambda: history)
    for mode in (torch.inference_mode(), torch.enable_grad()):
        with mode:
            if what == "card":
                assert "TypeError" in refused(host, lambda: host.gate("mine", context))
            else:
                assert host.gate("mine", context) is None
    for name in SEEN[:3]:
        assert torch.equal(getattr(context, name), getattr(before, name))
    assert torch.equal(context.hidden(), before.hidden())
    assert all(map(torch.equal, history, before.history()))
    assert context.state["theta"].tolist() == [0, 0]


def test_the_gates_of_a_pass_are_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU every look at a number waits for all that was asked of it."""
    looks: list[int] = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: looks.append(1) or tolist(self))
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: looks.append(1) or tolist(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: looks.append(1) or tolist(self))
    host = returning("lora_rt_gate", Gate(ranks=torch.ones(1), heads=torch.ones(4)))
    gates = host.gates([("mine", gate_context([1], 2)) for _ in range(5)])
    assert (len(gates), len(looks)) == (5, 1)


def test_of_many_gates_the_bad_one_is_found() -> None:
    def lora_rt_gate(context: Any) -> Gate | None:
        return {"a": None, "b": Gate(ranks=torch.ones(1)), "c": Gate(heads=torch.full((4,), math.inf))}[context.adapter]

    host = host_of(plugin(lora_rt_gate), builtin=False)
    asked = [("mine", gate_context([1], 2, adapter=name)) for name in "abc"]
    assert "heads holds numbers that are not finite" in refused(host, lambda: host.gates(asked))
    assert [gate is None for gate in host.gates(asked[:2])] == [True, False]


def joint(answer: Any) -> ModeHost:
    def lora_rt_joint_gate(context: Any) -> Any:
        return answer(context)

    def lora_rt_gate(context: Any) -> Gate:
        return Gate(ranks=torch.zeros(1))

    return host_of(plugin(lora_rt_joint_gate, lora_rt_gate), builtin=False)


def test_a_joint_gate_sees_all_adapters_of_its_mode_at_once() -> None:
    """A softmax among adapters, over those that are active in each row."""

    def softmax(context: Any) -> list[Gate]:
        scores = torch.stack([a.state["score"].expand(len(a.active)) for a in context.adapters])  # (adapters, rows)
        active = torch.tensor([list(a.active) for a in context.adapters])
        shares = scores.masked_fill(~active, -math.inf).softmax(0)
        return [Gate(ranks=share[:, None, None]) for share in shares]

    rows = [([True, True], 0.0), ([True, False], math.log(3.0))]
    asked = [
        ("mine", gate_context([1, 1], 2, adapter=f"a{n}", active=active, state={"score": torch.tensor(score)}))
        for n, (active, score) in enumerate(rows)
    ]
    first, second = joint(softmax).gates(asked)
    assert first is not None
    assert second is not None
    torch.testing.assert_close(first.ranks, torch.tensor([0.25, 1.0])[:, None, None])
    torch.testing.assert_close(second.ranks, torch.tensor([0.75, 0.0])[:, None, None])
    alone = joint(lambda context: None).gates(asked)
    assert [gate.ranks.item() for gate in alone if gate and gate.ranks is not None] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Gate(), "it returned a Gate, not a list of 2 gates"),
        ([None], "it returned a list of 1, not a list of 2 gates"),
        ([None, 1.0], "it returned a float, not a Gate"),
        ([None, Gate(ranks=torch.ones(9))], "ranks of shape (9,) does not broadcast"),
        ([None, Gate(ranks=torch.full((1,), math.nan))], "ranks holds numbers that are not finite"),
    ],
)
def test_a_joint_gate_of_nonsense_is_refused(answer: Any, reason: str) -> None:
    host = joint(lambda context: answer)
    told = refused(host, lambda: host.gates([("mine", gate_context([1], 2))] * 2))
    assert told.startswith("lora_rt_joint_gate: ")
    assert reason in told


def test_ranks_are_told_apart_only_where_all_modules_have_as_many() -> None:
    host = returning("lora_rt_gate", Gate(ranks=torch.ones(4)))
    context = gate_context([1, 1], 3, uniform_rank=False)
    assert "ranks of shape (4,) does not broadcast to (2, 2, 3, 1)" in refused(host, lambda: host.gate("mine", context))


def test_a_wide_gate_does_not_widen_the_layer() -> None:
    for kind in (torch.float64, torch.int64, torch.bool):
        gate = returning("lora_rt_gate", Gate(ranks=torch.ones(1, dtype=kind))).gate("mine", gate_context([1], 2))
        assert gate is not None
        assert gate.ranks is not None
        assert gate.ranks.dtype == torch.float32


def test_rows_that_do_not_use_the_adapter_may_hold_anything() -> None:
    """Their weight is 0, and 0 times NaN would be NaN in a row of somebody else's."""
    ranks = torch.tensor([0.5, math.nan])[:, None, None]
    context = gate_context([1, 1], 3, active=[True, False])
    gate = returning("lora_rt_gate", Gate(ranks=ranks)).gate("mine", context)
    assert gate is not None
    assert gate.ranks is not None
    assert gate.ranks.flatten().tolist() == [0.5, 0.0]


BAD_WEIGHTS = {
    "a number": (1.0, "not a list of numbers"),
    "texts": (["a", "b"], "not a list of numbers"),
    "too few": ([1.0], "[1.0] for 2 terms"),
    "too many": ([1.0] * 3, "for 2 terms"),
    "NaN": ([1.0, math.nan], "for 2 terms"),
    "infinite": ([1.0, -math.inf], "for 2 terms"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_weights_of_nonsense_are_refused(case: str) -> None:
    weights, reason = BAD_WEIGHTS[case]
    host = returning("lora_rt_compose", weights)
    assert reason in refused(host, lambda: host.weights("mine", compose_context([1.0, 2.0], others=[3.0])))


def test_weights_are_numbers_of_any_kind() -> None:
    host = returning("lora_rt_compose", torch.tensor([-1.0, 0.5]))
    assert host.weights("mine", compose_context([1.0, 2.0])) == [-1.0, 0.5]
    assert returning("lora_rt_compose", None).weights("mine", compose_context([1.0])) is None


def shares(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows)


BAD_REGISTRATIONS = {
    "a name": ("body", "it returned a str, not a ScenePrediction"),
    "no types": (ScenePrediction([], torch.ones(2, 0)), "ScenePrediction.types is []"),
    "one type twice": (ScenePrediction(["a", "a"], shares((0.5, 0.5), (1, 0))), "not a list of different names"),
    "no tensor": (ScenePrediction(["a"], [[1.0], [1.0]]), "probabilities is list"),  # type: ignore[arg-type]
    "one row too few": (ScenePrediction(["a"], shares((1,))), "probabilities is (1, 1), not a tensor of shape (2, 1)"),
    "negative": (ScenePrediction(["a", "b"], shares((-1, 2), (1, 0))), "negative or do not add up to 1"),
    "more than 1": (ScenePrediction(["a", "b"], shares((1, 1), (1, 0))), "negative or do not add up to 1"),
    "NaN": (ScenePrediction(["a", "b"], shares((math.nan, 1), (1, 0))), "negative or do not add up to 1"),
}


@pytest.mark.parametrize("case", BAD_REGISTRATIONS)
def test_scene_types_of_nonsense_are_refused(case: str) -> None:
    registration, reason = BAD_REGISTRATIONS[case]
    host = returning("lora_rt_scene", registration)
    assert reason in refused(host, lambda: host.scene("mine", scene_context(2)))


def test_scene_types_are_distributions_or_none() -> None:
    given = ScenePrediction(["body", "logic"], shares((0.25, 0.75), (1, 0)))
    assert returning("lora_rt_scene", given).scene("mine", scene_context(2)) is given
    assert returning("lora_rt_scene", None).scene("mine", scene_context(2)) is None


class Given(Objective):
    """An objective whose methods return, or raise, what they are given."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers

    def _answer(self, name: str) -> Any:
        answer = self.answers.get(name)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def check(self, example: Any) -> Any:
        return self._answer("check")

    def encode(self, example: Any) -> Any:
        return self._answer("encode")

    def loss(self, logits: Any, labels: Any, extra: Any) -> Any:
        return self._answer("loss")


BAD_ANSWERS = [
    ("check", ({},), None, "it returned None, not a list of texts"),
    ("check", ({},), KeyError("scene"), "KeyError: 'scene'"),
    ("encode", ({},), None, "it returned a NoneType, not a list of Encoded"),
    ("encode", ({},), [([1], [1])], "not a list of Encoded"),
    ("encode", ({},), [Encoded([1, 999], [1, 999])], "token ids from 0 to 258"),
    ("encode", ({},), [Encoded([1.5], [IGNORE])], "token ids from 0 to 258"),  # type: ignore[list-item]
    ("encode", ({},), [Encoded([1, 2], [IGNORE, 1])], "neither its own position's token nor IGNORE"),
    ("encode", ({},), SystemExit(1), "SystemExit: 1"),
    ("loss", (None, None, {}), 0.5, "it returned a float, not a scalar tensor"),
    ("loss", (None, None, {}), torch.ones(2), "it returned a Tensor of shape (2,), not a scalar tensor"),
    ("loss", (None, None, {}), RuntimeError("shapes"), "RuntimeError: shapes"),
]


@pytest.mark.parametrize(("method", "arguments", "answer", "reason"), BAD_ANSWERS)
def test_a_failing_method_of_an_objective_names_its_plugin(
    method: str, arguments: tuple[Any, ...], answer: Any, reason: str
) -> None:
    """They run in the training loop, long after the hook has returned."""
    host = returning("lora_rt_objective", Given(**{method: answer}))
    objective = host.objective("mine", objective_context())
    told = refused(host, lambda: getattr(objective, method)(*arguments))
    assert told.startswith(f"lora_rt_objective, Objective.{method}: ")
    assert reason in told


def test_an_explained_error_of_an_objective_passes() -> None:
    host = returning("lora_rt_objective", Given(check=LoraRtError("this line is for another mode")))
    objective = host.objective("mine", objective_context())
    assert objective is not None
    with pytest.raises(LoraRtError, match="another mode") as caught:
        objective.check({})
    assert not isinstance(caught.value, PluginError)
    assert host.records[0].status == "ok"


def test_a_good_objective_stays_what_it_is() -> None:
    """Core tells by the class whether the loss is the mode's own."""

    @dataclass(frozen=True)
    class Frozen(Objective):
        fields = ("text",)

        def encode(self, example: Any) -> list[Encoded]:
            return [Encoded([1, 2], [IGNORE, 2])]

    objective = returning("lora_rt_objective", Frozen()).objective("mine", objective_context())
    assert type(objective) is Frozen
    assert type(objective).loss is Objective.loss
    assert objective.encode({}) == [Encoded([1, 2], [IGNORE, 2])]
    assert objective.loss(torch.ones(1), torch.ones(1), {}) is None


class WithFields(Objective):
    fields = ["scene"]  # type: ignore[assignment]  # noqa: RUF012


class WithState(Objective):
    state = {"a": 1}  # type: ignore[assignment]  # noqa: RUF012


BAD_OBJECTIVES = [
    ("objective", "it returned a str, not an Objective"),
    (Objective, "it returned a type, not an Objective"),
    (nn.Module(), "it returned a Module, not an Objective"),
    (WithFields(), "Objective.fields is ['scene'], not a tuple of names"),
    (WithState(), "Objective.state is a dict, not a torch.nn.Module"),
]


@pytest.mark.parametrize(("value", "reason"), BAD_OBJECTIVES)
def test_an_objective_of_nonsense_is_refused(value: Any, reason: str) -> None:
    host = returning("lora_rt_objective", value)
    assert reason in refused(host, lambda: host.objective("mine", objective_context()))


def test_a_mixture_that_can_not_be_fitted_is_named() -> None:
    context = MixtureContext(
        ["a", "b"], [0.5, 0.5], [], {}, gate_context([1], 2).base, lambda _depth: torch.zeros(3, 4)
    )
    for bad, told in (
        ({"state": {}}, "a dict, not a Mixture"),
        (Mixture({"map": [1.0]}), "the state 'map' is a list, not a tensor"),  # type: ignore[dict-item]
        (Mixture({"map": torch.tensor([float("nan")])}), "not finite"),
        (Mixture({}, {"gate": {1, 2}}), "Mixture.card is not JSON"),
        (Mixture({}, hidden_layers=-1), "Mixture.hidden_layers is -1"),
    ):

        def lora_rt_mixture(context: Any, bad: Any = bad) -> Any:
            return bad

        with pytest.raises(PluginError, match=told):
            host_of(plugin(lora_rt_mixture), builtin=False).mixture("mine", context)
    with pytest.raises(LoraRtError, match="does not mix adapters"):
        joint(None).mixture("mine", context)
