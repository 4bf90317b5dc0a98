"""What runs when a runtime is closed ends with an error: it would go on as the base, whatever it was asked for."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from lora_rt.core.runtime import Runtime
from lora_rt.errors import LoraRtError
from support.tiny import Zoo


@pytest.fixture
def runtime(zoo: Zoo) -> Runtime:
    made = Runtime.load(zoo.base("llama"), precision="float32", device="cpu")
    made.load_adapter(str(zoo.adapter("llama", seed=41)), name="one")
    return made


def _in_a_batch(runtime: Runtime) -> Any:
    batch = runtime.batch()
    batch.add(runtime.rows(["a"], "one", max_new_tokens=9, min_new_tokens=9))
    while True:
        yield batch.step()


@pytest.mark.parametrize(
    "begin",
    [
        lambda rt: rt.stream("a", "one", max_new_tokens=9, min_new_tokens=9),
        lambda rt: rt.decode([[5, 6]], "one", max_new_tokens=9, min_new_tokens=9),
        _in_a_batch,
    ],
    ids=["stream", "decode", "batch"],
)
def test_whatever_is_being_said_is_not_gone_on_with(runtime: Runtime, begin: Any) -> None:
    running = begin(runtime)
    next(running)
    runtime.close()
    with pytest.raises(LoraRtError, match="this runtime was closed"):
        list(running)


def test_a_pass_in_which_adapters_leave_gives_no_answer(runtime: Runtime) -> None:
    """Another thread closes in the middle of a forward pass, of which half the layers have adapters then."""
    inside, closed = threading.Event(), threading.Event()
    layer = runtime.model.model.layers[1]

    def hold(*_: Any) -> None:
        inside.set()
        assert closed.wait(60)

    handle = layer.register_forward_pre_hook(hold)
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            runtime.answer_nll(["a"], ["b"], "one")
        except LoraRtError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    assert inside.wait(60)
    runtime.close()
    closed.set()
    thread.join()
    handle.remove()
    assert [str(error).partition(".")[0] for error in errors] == ["this runtime was closed"]
