"""A base from the Hub: fetched at a commit, named by it, and one line for what the Hub does not give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_rt.core.base.load import load_base
from lora_rt.core.base.source import BaseError
from support.hub import LocalHub
from support.tiny import Zoo, some_ids


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "int4"])
def test_a_repository_is_the_base_that_it_holds_and_is_named_by_its_commit(
    zoo: Zoo, hub: LocalHub, precision: str
) -> None:
    commit = hub.commit("someone/tiny", files_of(zoo.base("llama")), tag="v1")
    hub.commit("someone/tiny", files_of(zoo.base("mistral")))
    base = load_base("someone/tiny@v1", precision, "cpu")
    assert (base.identity.id, base.identity.revision) == ("someone/tiny", commit)
    folder = load_base(str(zoo.base("llama")), precision, "cpu")
    assert base.identity.digest == folder.identity.digest
    with torch.inference_mode():
        found, wanted = (one.model(input_ids=some_ids()).logits for one in (base, folder))
    assert torch.equal(found, wanted)


@pytest.mark.slow
def test_what_the_hub_does_not_have_is_told_apart(zoo: Zoo, hub: LocalHub) -> None:
    hub.commit("someone/tiny", files_of(zoo.base("llama")))
    hub.commit("someone/words", {"README.md": b"no model"})
    hub.commit("someone/closed", files_of(zoo.base("llama")))
    hub.repos["someone/closed"].gated = True
    wrong = {
        "someone/nothing": "there is no model someone/nothing",
        "someone/tiny@v9": "has no revision 'v9'",
        "someone/words": "no transformers model",
        "someone/closed": "gated",
    }
    for text, message in wrong.items():
        with pytest.raises(BaseError) as caught:
            load_base(text, "float32", "cpu")
        assert message in caught.value.message
        assert caught.value.next_step
        assert "\n" not in caught.value.message


@pytest.mark.slow
def test_a_refusal_is_no_lack_of_a_network(zoo: Zoo, hub: LocalHub) -> None:
    hub.commit("someone/tiny", files_of(zoo.base("llama")))
    hub.twist = lambda handler: "/resolve/" in handler.path and (handler.send(403, {"error": "no"}) or True)
    with pytest.raises(BaseError, match=r"does not let you do that with someone/tiny \(403\)"):
        load_base("someone/tiny", "float32", "cpu")


@pytest.mark.slow
def test_without_a_network_what_is_cached_is_used_and_the_rest_explained(
    zoo: Zoo, hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    hub.commit("someone/tiny", files_of(zoo.base("llama")))
    load_base("someone/tiny", "float32", "cpu")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load_base("someone/tiny", "float32", "cpu").identity.id == "someone/tiny"
    with pytest.raises(BaseError, match="not cached and the Hub can't be reached"):
        load_base("someone/other", "float32", "cpu")
