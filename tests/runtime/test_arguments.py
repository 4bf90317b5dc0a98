"""What a program's call can't take is named with a next step; one text is never taken for a list of its letters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lora_rt.core.runtime import Runtime
from lora_rt.errors import LoraRtError
from support.tiny import Zoo


@pytest.fixture(scope="module")
def runtime(zoo: Zoo) -> Runtime:
    return zoo.runtime("llama")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda rt: rt.generate(5), "prompts is a int"),
        (lambda rt: rt.generate(b"a"), "prompts is a bytes"),
        (lambda rt: rt.rows("ab"), "prompts is one text"),
        (lambda rt: rt.generate("a", stop=5), "stop is"),
        (lambda rt: rt.generate("a", scenes=5), "5 is not a scene"),
        (lambda rt: rt.logits(None), "is not a tensor"),
        (lambda rt: rt.answer_nll("ab", ["c", "d"]), "prompts is one text"),
        (lambda rt: rt.answer_nll(["a", "b"], "cd"), "answers is one text"),
        (lambda rt: rt.answer_nll(["a"], ["c", "d"]), "2 answers for 1 prompts"),
        (lambda rt: rt.answer_nll(["a"], [5]), "the answer is a int"),
        (lambda rt: rt.choices_nll("a", "bc"), "answers is one text"),
        (lambda rt: rt.decode([[]]), "rows that are not token ids"),
        (lambda rt: rt.decode([[10**6]]), "rows that are not token ids"),
        (lambda rt: rt.decode([[-1]]), "rows that are not token ids"),
        (lambda rt: rt.decode([[1.5]]), "rows that are not token ids"),
        (lambda rt: rt.decode([[True]]), "rows that are not token ids"),
        (lambda rt: rt.decode([1, 2]), "rows that are not token ids"),
        (lambda rt: rt.decode(["ab"]), "rows that are not token ids"),
        (lambda rt: rt.plan([[10**6]]), "rows that are not token ids"),
        (lambda rt: rt.batch(chunk=0), "chunk is 0"),
        (lambda rt: rt.load_adapter(5), "5 is not a reference"),
        (lambda rt: rt.load_adapter("a", 5), "'5' is not a name"),
        (lambda _: Runtime.load(5), "a base is a int"),
        (lambda _: Runtime.load(device=5), "there is no device '5'"),
    ],
)
def test_what_a_call_can_not_take_is_named_and_letters_are_no_rows(runtime: Runtime, call: Any, said: str) -> None:
    with pytest.raises(LoraRtError) as error:
        call(runtime)
    assert said in error.value.message
    assert error.value.next_step


def test_token_ids_may_be_arrays(runtime: Runtime) -> None:
    wanted = list(runtime.decode([[5, 6, 7]], max_new_tokens=2))
    for given in (torch.tensor([[5, 6, 7]]), np.array([[5, 6, 7]]), [np.array([5, 6, 7])], [list(np.array([5, 6, 7]))]):
        assert list(runtime.decode(given, max_new_tokens=2)) == wanted


def test_shares_of_scene_types_stand_for_every_row(runtime: Runtime) -> None:
    """A mapping is one scene, and not a list of its keys."""
    with pytest.raises(LoraRtError, match="not shares of scene types"):
        runtime.generate(["a", "b"], scenes={"body": 2.0, "logic": 1.0})
    assert len(runtime.generate(["a", "b"], scenes={"body": 0.5, "logic": 0.5}, max_new_tokens=2)) == 2


def test_a_device_may_be_torchs_own(zoo: Zoo) -> None:
    with Runtime.load(zoo.base("llama"), precision="float32", device=torch.device("cpu")) as own:
        assert own.generate("a", max_new_tokens=1) == zoo.runtime("llama").generate("a", max_new_tokens=1)
