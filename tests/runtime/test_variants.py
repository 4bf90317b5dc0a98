"""What PEFT writes besides plain LoRA is exact alone and in mixes, or refused with a way out.

The whole table of a hundred is printed by `python -m support.variants`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from lora_rt.core.export.run import export
from lora_rt.core.runtime import Runtime
from lora_rt.errors import LoraRtError
from support.tiny import Zoo, some_ids
from support.variants import IDS, VARIANTS, check, trained

pytestmark = pytest.mark.slow

EXACT = {"atol": 3e-4, "rtol": 0.0}
ALONE = (
    "with the embedding", "with a tied embedding", "a scaled embedding", "an embedding of GPT-2", "DoRA",
    "DoRA, rank-stabilised", "DoRA over biases", "DoRA of Conv1D", "all biases", "biases of GPT-2's layers",
    "all biases of GPT-2", "token rows", "token rows, tied", "token rows of the head",
    "token rows of a scaled embedding", "token rows and DoRA", "a whole head", "a whole head, tied",
    "a whole embedding", "whole norms", "a whole head, DoRA", "PiSSA, converted", "OLoRA, converted",
    "PiSSA, rank-stabilised, converted", "pickled, converted", "DoRA, pickled, converted",
    "of FSDP", "with a name of a trainer", "whole norms of queries",
    "whole MLPs", "whole norms and all biases", "whole, tied by force", "a head, tied by force",
    "PiSSA of a compiled model, converted", "ranks and alphas by patterns", "layers by a pattern",
    "without r and alpha", "weights of linear layers", "the weight of a head",
    "an embedding of positions", "negative alpha", "DoRA, negative alpha",
)  # fmt: skip
REFUSED = ("DoRA of the embedding", "PiSSA", "LoftQ", "X-LoRA", "Arrow", "QA-LoRA", "pickled", "weights of Conv1D")


@pytest.fixture
def runtime(zoo: Zoo) -> Iterator[Runtime]:
    made = zoo.runtime("llama", fresh=True)
    yield made
    made.close()


@pytest.mark.parametrize("name", ALONE)
def test_it_computes_what_pefts_model_in_memory_computes(name: str, zoo: Zoo, tmp_path: Path) -> None:
    assert check(VARIANTS[name], zoo, tmp_path) == "exact"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_composed_is_refused_with_a_way_out(name: str, zoo: Zoo, tmp_path: Path) -> None:
    assert check(VARIANTS[name], zoo, tmp_path).startswith("refused: ")


def adapter(zoo: Zoo, folder: Path, seed: int, **options: object) -> Tensor:
    """Write one and return its logits."""
    return trained(zoo.base("llama"), folder, {"target_modules": ["q_proj", "v_proj"], **options}, seed)


def merged(base: Path, adapters: list[Path], weights: list[float]) -> Tensor:
    """The logits of the base's weights plus the weighted changes of every weight that PEFT's merges make."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def dense(adapter: Path | None) -> dict[str, Tensor]:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    own = dense(None)
    total = {name: tensor.clone() for name, tensor in own.items()}
    for folder, weight in zip(adapters, weights, strict=True):
        for name, tensor in dense(folder).items():
            total[name] += weight * (tensor - own[name])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    model.load_state_dict(total)
    with torch.inference_mode():
        found: Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"trainable_token_indices": [20, 30]},
    ],
)
def test_weights_and_mixes_are_the_dense_sum(
    options: dict[str, object], zoo: Zoo, runtime: Runtime, tmp_path: Path
) -> None:
    adapter(zoo, tmp_path / "one", 5, **options)
    adapter(zoo, tmp_path / "two", 6, target_modules=["q_proj", "down_proj"])
    for name in ("one", "two"):
        runtime.load_adapter(str(tmp_path / name), name)
    wanted = merged(zoo.base("llama"), [tmp_path / "one", tmp_path / "two"], [0.6, -0.4])
    assert_close(runtime.logits(IDS, compositions="one:0.6 two:-0.4"), wanted, **EXACT)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"modules_to_save": ["lm_head", "norm"]}])
def test_every_row_of_a_batch_has_its_own(
    options: dict[str, object], zoo: Zoo, runtime: Runtime, tmp_path: Path
) -> None:
    adapter(zoo, tmp_path / "one", 5, **options)
    adapter(zoo, tmp_path / "two", 6)
    for name in ("one", "two"):
        runtime.load_adapter(str(tmp_path / name), name)
    specs = ["one", None, "two", "one"]
    ids = some_ids(rows=4)
    together = runtime.logits(ids, compositions=specs)
    for row, spec in enumerate(specs):
        assert_close(together[row], runtime.logits(ids[row : row + 1], compositions=spec)[0], **EXACT)
    texts = runtime.generate(["a", "b", "c", "d"], specs, max_new_tokens=4)
    assert texts == [runtime.generate(p, s, max_new_tokens=4) for p, s in zip("abcd", specs, strict=True)]
    runtime.unload_adapter("one")
    assert_close(runtime.logits(ids), zoo.runtime("llama").logits(ids), **EXACT)


@pytest.mark.parametrize("spec", ["one:0.5", "one two"])
def test_whole_modules_have_no_weight_but_one_and_no_company(
    spec: str, zoo: Zoo, runtime: Runtime, tmp_path: Path
) -> None:
    adapter(zoo, tmp_path / "one", 5, modules_to_save=["lm_head"])
    adapter(zoo, tmp_path / "two", 6)
    for name in ("one", "two"):
        runtime.load_adapter(str(tmp_path / name), name)
    with pytest.raises(LoraRtError, match="whole modules") as caught:
        runtime.logits(IDS, compositions=spec)
    assert caught.value.next_step


def test_two_that_trained_one_token_agree_or_are_refused_together(zoo: Zoo, runtime: Runtime, tmp_path: Path) -> None:
    for name, seed in (("one", 5), ("same", 5), ("other", 6)):
        adapter(zoo, tmp_path / name, seed, trainable_token_indices=[20])
        runtime.load_adapter(str(tmp_path / name), name)
    runtime.logits(IDS, compositions="one:0.5 same:0.5")
    with pytest.raises(LoraRtError, match="token 20"):
        runtime.logits(IDS, compositions="one:0.5 other:0.5")


def test_an_export_refuses_what_an_adapter_can_not_say(zoo: Zoo, tmp_path: Path) -> None:
    adapter(zoo, tmp_path / "one", 5, use_dora=True)
    with pytest.raises(LoraRtError, match="DoRA"):
        export(f"{tmp_path / 'one'}", "peft", tmp_path / "out", base=str(zoo.base("llama")))


class Evil:
    """What a pickle may hold."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("ran",)


def test_a_pickle_that_holds_more_than_tensors_is_not_read(
    zoo: Zoo, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from lora_rt.core.export.convert import convert

    adapter(zoo, tmp_path / "one", 5)
    (tmp_path / "one/adapter_model.safetensors").unlink()
    torch.save({"a": Evil()}, tmp_path / "one/adapter_model.bin")
    with pytest.raises(LoraRtError, match="does not hold tensors alone"):
        convert(tmp_path / "one", tmp_path / "out")
    assert "ran" not in capfd.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_plain_adapter_needs_no_conversion(zoo: Zoo, tmp_path: Path) -> None:
    from lora_rt.core.export.convert import convert

    adapter(zoo, tmp_path / "one", 5)
    with pytest.raises(LoraRtError, match="is a plain LoRA"):
        convert(tmp_path / "one", tmp_path / "out")


ALORA = {"alora_invocation_tokens": [40, 41]}


def of_alora(base: Path, folder: Path, ids: Tensor) -> Tensor:
    """What PEFT's own aLoRA makes of these tokens; it searches for the invocation itself only where it generates."""
    from peft import PeftModel
    from peft.tuners.lora.variants import calculate_alora_offsets
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder).eval()
    offsets = calculate_alora_offsets(model.peft_config, "default", ids)
    with torch.inference_mode():
        found: Tensor = model(input_ids=ids, alora_offsets=offsets).logits
    return found


def test_an_alora_acts_from_where_its_tokens_stand_last(zoo: Zoo, runtime: Runtime, tmp_path: Path) -> None:
    adapter(zoo, tmp_path / "one", 5, **ALORA)
    adapter(zoo, tmp_path / "two", 6)
    for name in ("one", "two"):
        runtime.load_adapter(str(tmp_path / name), name)
    ids = some_ids(rows=4, tokens=9)
    ids[0, 2:4] = ids[0, 5:7] = ids[1, 7:9] = ids[3, 0:2] = torch.tensor([40, 41])
    ids[2][ids[2] == 41] = 42
    wanted = of_alora(zoo.base("llama"), tmp_path / "one", ids)
    assert_close(runtime.logits(ids, compositions="one"), wanted, **EXACT)
    base = runtime.logits(ids)
    assert_close(wanted[2], base[2], **EXACT)
    assert_close(wanted[0, :5], base[0, :5], **EXACT)
    assert (wanted[3] - base[3]).abs().max() > 0.05
    mixed = runtime.logits(ids, compositions=["one", "two", None, "one:0.5 two"])
    assert_close(mixed[0], wanted[0], **EXACT)
    for row, spec in ((1, "two"), (3, "one:0.5 two")):
        assert_close(mixed[row], runtime.logits(ids[row : row + 1], compositions=spec)[0], **EXACT)


def test_an_alora_generates_what_peft_generates(zoo: Zoo, runtime: Runtime, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter(zoo, tmp_path / "one", 5, **ALORA)
    runtime.load_adapter(str(tmp_path / "one"), "one")
    plain = AutoModelForCausalLM.from_pretrained(zoo.base("llama"), dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, tmp_path / "one").eval()
    for start in (None, 3):
        ids = some_ids(tokens=8, seed=3)
        ids[ids == 41] = 42
        if start is not None:
            ids[0, start : start + 2] = torch.tensor([40, 41])
        given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
        wanted = model.generate(input_ids=ids, **given)[0, 8:].tolist()
        said = [step[0] for step in runtime.decode(ids.tolist(), "one", max_new_tokens=6)]
        assert said == wanted[: len(said)]
        assert len(said) > 2


def test_an_export_does_not_forget_what_wakes_an_alora(zoo: Zoo, tmp_path: Path) -> None:
    adapter(zoo, tmp_path / "one", 5, **ALORA)
    with pytest.raises(LoraRtError, match="aLoRA"):
        export(f"{tmp_path / 'one'}", "peft", tmp_path / "out", base=str(zoo.base("llama")))


def test_a_router_is_refused_with_the_names_of_its_parts(zoo: Zoo, runtime: Runtime, tmp_path: Path) -> None:
    for name, changes in {
        "arrow": {"arrow_config": {"top_k": 2, "task_adapter_names": ["math", "code"], "gks_adapter_names": ["text"]}},
        "xlora": {"peft_type": "XLORA", "adapters": {"math": "org/math", "code": "org/code", "text": "./text"}},
    }.items():
        adapter(zoo, tmp_path / name, 5)
        config = tmp_path / name / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
        with pytest.raises(LoraRtError) as caught:
            runtime.load_adapter(str(tmp_path / name), name)
        said = " ".join(caught.value.problems)
        assert all(part in said for part in ("math", "code", "text"))
        assert "with weights of yours" in str(caught.value.next_step)
