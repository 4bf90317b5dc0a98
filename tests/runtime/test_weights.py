"""What a weight means: a factor on what an adapter adds, absolute, of any sign; nothing is normalised unasked."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from lora_rt.core.requests.composition import Composition, InvalidCompositionError
from lora_rt.core.requests.measured import outside
from lora_rt.core.runtime import Runtime
from support.tiny import Zoo, some_ids


@pytest.fixture
def runtime(zoo: Zoo) -> Runtime:
    made = zoo.runtime("llama", fresh=True)
    for name, seed in (("a", 1), ("b", 2)):
        made.load_adapter(str(zoo.adapter("llama", seed=seed)), name)
    return made


def moved(runtime: Runtime, spec: str) -> torch.Tensor:
    """How far the logits move from the base's, in float64."""
    ids = some_ids()
    return runtime.logits(ids, compositions=spec).double() - runtime.logits(ids).double()


def test_near_zero_two_adapters_add_up_on_the_logits(runtime: Runtime) -> None:
    """What is left over is of second order: a weight ten times smaller leaves a hundredth of it."""
    rests = []
    for w in (0.2, 0.02):
        both, first, second = (moved(runtime, spec) for spec in (f"a:{w} b:{w}", f"a:{w}", f"b:{w}"))
        rests.append(float((both - first - second).norm() / both.norm()))
    assert rests[1] < 0.05
    assert rests[1] < rests[0] / 4


def test_near_zero_a_negative_weight_is_the_opposite_direction(runtime: Runtime) -> None:
    there, back = moved(runtime, "a:0.02"), moved(runtime, "a:-0.02")
    assert float((there + back).norm() / there.norm()) < 0.1


def test_what_an_adapter_adds_where_it_first_acts_is_proportional_to_its_weight(runtime: Runtime) -> None:
    """In q, k and v of the first layer, whose input no adapter has changed: for small, large and negative weights, and
    whatever the sum of all weights is."""
    unit = runtime.explain("hello", "a").heads[0, 0]
    for w in (0.1, 0.75, 1.25, 3.0, -0.5):
        found = runtime.explain("hello", f"a:{w} b:2")
        assert torch.allclose(found.heads[found.names.index("a"), 0], abs(w) * unit, rtol=1e-3)


def test_nothing_is_normalised_unless_somebody_asks(runtime: Runtime) -> None:
    ids = some_ids()
    large, same = (runtime.logits(ids, compositions=spec) for spec in ("a:2 b:-1", "a b:-0.5 a b:-0.5"))
    assert torch.allclose(large, same, atol=1e-4)
    asked = Composition.parse("a:2 b:-1").normalized(1.5)
    assert str(asked) == "a b:-0.5"
    assert torch.allclose(runtime.logits(ids, compositions=asked), runtime.logits(ids, compositions="a b:-0.5"))


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        ("a:0.7 b:0.3", 1.0, "a:0.7 b:0.3"),
        ("a:3 b:1", 1.0, "a:0.75 b:0.25"),
        ("a:-1 b:1", 1.0, "a:-0.5 b:0.5"),
        ("a:1.5 b:0.5[So:]", 1.0, "a:0.75 b:0.25[So:]"),
        ("a:0 b:0", 1.0, "a:0 b:0"),
    ],
)
def test_normalising_scales_all_weights_alike_and_only_down(text: str, limit: float, expected: str) -> None:
    assert str(Composition.parse(text).normalized(limit)) == expected


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan"), float("inf")])
def test_a_limit_that_makes_no_sense_is_refused(limit: float) -> None:
    with pytest.raises(InvalidCompositionError, match="can't be normalized to"):
        Composition.parse("a b").normalized(limit)


def test_weights_whose_sum_no_number_holds_are_refused_and_not_made_zero() -> None:
    with pytest.raises(InvalidCompositionError, match="add up to more than a number holds"):
        Composition.parse("a:1e308 b:1e308").normalized(1)


def test_a_mix_that_was_normalized_to_the_limit_is_not_said_to_be_beyond_it() -> None:
    for last in range(1, 400):
        made = Composition.parse(f"a:0.7 b:1.31 c:{last / 100}").normalized(1.25)
        assert "sum" not in outside([(str(term.reference), term.weight) for term in made.terms])


def test_a_mix_outside_of_what_was_measured_is_named(runtime: Runtime) -> None:
    default = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert not outside([("a", 0.7), ("b", 0.3), ("c", -0.25)], default)
    assert outside([("a", 1.0), ("b", 0.5)], default).keys() == {"sum"}
    assert outside([("a", 1.0), ("a", -0.4)], default).keys() == {"doubled"}  # together 0.6
    assert outside([("a", -0.5)], default).keys() == {"negative"}
    assert outside([("a", -0.25), ("b", -0.25), ("c", 0.1)], default)["negative"].startswith("a:-0.25 and b:-0.25 push")
    assert outside([("a", 0.5), ("a", -0.5)], default).keys() == {"doubled"}  # together nothing
    assert outside([("a", 0.2), ("a", 0.2)], default).keys() == {"doubled"}
    assert "nothing was on some/base" in outside([("a", 2.0)], "some/base")["base"]


def test_a_runtime_warns_once_of_each_kind(runtime: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="lora_rt"):
        for spec in ("a:0.5 b:0.5", "a b", "a b", "a:1.5", "a:-1", "a:-2 b:3"):
            runtime.generate("x", spec, max_new_tokens=1)
    told = [record.message for record in caplog.records]
    assert len(told) == 2
    assert told[0].startswith("the weights add up to 2, and beyond 1.25 texts fall apart")
    assert told[1].startswith("a:-1 pushes hard away")


@pytest.mark.parametrize(
    ("text", "paths", "weights"),
    [
        ('"./a b":0.5 c', ["./a b", "c"], [0.5, 1.0]),
        ('"/x, y/z+1:2":-0.5[So:],"~/q"', ["/x, y/z+1:2", "~/q"], [-0.5, 1.0]),
        ('"logic":2', ["logic"], [2.0]),
    ],
)
def test_a_path_with_separators_stands_in_quotes(text: str, paths: list[str], weights: list[float]) -> None:
    found = Composition.parse(text)
    assert [term.reference.text for term in found.terms] == paths
    assert [term.weight for term in found.terms] == weights
    again = Composition.parse(str(Composition(found.terms)))  # of the terms, not of the text that was read
    assert again == found


def test_the_key_of_a_mapping_may_be_such_a_path() -> None:
    wanted = Composition.parse('"./a b":0.5')
    assert Composition.of({'"./a b"': 0.5}) == Composition.of({Path("./a b"): 0.5}) == wanted
    with pytest.raises(InvalidCompositionError, match="a path that has blanks in quotes"):
        Composition.of({"./a b": 0.5})


@pytest.mark.parametrize("text", ['"./a b', '""', '"a" "', '"./a"b'])
def test_quotes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InvalidCompositionError):
        Composition.parse(text)
