"""What is checked of an architecture, each check by itself: `exact`, `refused` in one line, `wrong`, or `crash`."""

from __future__ import annotations

import copy
import json
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lora_rt import train
from lora_rt.core.base.fused import given_to_experts
from lora_rt.core.base.precision import Precision, quantization_config
from lora_rt.core.runtime import Runtime
from lora_rt.errors import LoraRtError
from support.architectures.oracle import Oracle
from support.architectures.shrink import random_model, tiny_config
from support.tiny import VOCAB, save_tokenizer

TOLERANCE = 2e-3  # of float32 logits whose spread is about 1
_SHARE = 0.2  # of the largest share: so much may another rounding move one
COARSE = 0.4  # of a base that is kept in few bits, times the spread of its logits


class PeftCan(Exception):  # not an error of ours: PEFT itself can't do it
    """PEFT itself can't, and why."""


@dataclass
class Finding:
    """What one check found of one type."""

    kind: str
    check: str
    result: str
    why: str = ""


@dataclass
class Subject:
    """One architecture, its folder, its oracle and the runtime under test, each made when first asked for."""

    kind: str
    folder: Path
    adapters: dict[str, Path] = field(default_factory=dict)

    @cached_property
    def model(self) -> Any:
        model = random_model(tiny_config(self.kind))
        self._is_causal(model)
        return model

    @cached_property
    def base(self) -> Path:
        folder = self.folder / self.kind
        self.model.save_pretrained(folder)
        save_tokenizer(folder)
        with torch.device("meta"):  # that transformers itself can load what it has saved
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        return folder

    @cached_property
    def oracle(self) -> Oracle:
        try:
            oracle = Oracle(copy.deepcopy(self.model))
        except Exception as error:
            raise PeftCan(_first(error)) from error
        self.adapters["one"], self.adapters["two"] = oracle.save(self.folder / f"{self.kind}-adapters")
        return oracle

    @cached_property
    def runtime(self) -> Runtime:
        return self.load("float32")

    def load(self, precision: str) -> Runtime:
        return Runtime.load(str(self.base), precision=precision, device="cpu", project=self.folder)

    def ready(self, runtime: Runtime, *names: str) -> None:
        _ = self.oracle
        for name in names:
            if name not in runtime.adapters:
                runtime.load_adapter(str(self.adapters[name]), name=name)

    def rows(self, *lengths: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(7)
        return [torch.randint(8, VOCAB, (n,), generator=generator).tolist() for n in lengths]

    @staticmethod
    def _is_causal(model: Any) -> None:
        ids = torch.arange(8, 20)[None]
        other = ids.clone()
        other[0, -1] += 1
        with torch.no_grad():
            one, two = (model(input_ids=i).logits[:, :-1] for i in (ids, other))
        if not torch.allclose(one, two, atol=1e-4):
            raise NotCausalError("a later token changes what stands before it")


class NotCausalError(Exception):
    """The type has no causal form."""


def load(s: Subject) -> None:
    """The base alone is what transformers computes."""
    (row,) = s.rows(9)
    with torch.no_grad():
        wanted = s.model(input_ids=torch.tensor([row])).logits[0]
    _same(s.runtime.logits([row])[0], wanted)


def all_linear(s: Subject) -> None:
    _one_adapter(s, "one")


def attention(s: Subject) -> None:
    if not s.oracle.attention:
        raise PeftCan("it has no attention")
    _one_adapter(s, "two")


def _one_adapter(s: Subject, name: str) -> None:
    s.ready(s.runtime, name)
    (row,) = s.rows(9)
    wanted = s.oracle.logits(row, {name: 1.0})
    assert (wanted - s.oracle.logits(row, {})).abs().max() > 10 * TOLERANCE, "the adapter does too little to tell"
    _same(s.runtime.logits([row], compositions=f"{name}:1")[0], wanted)


def mixed_rows(s: Subject) -> None:
    """Rows of one batch under compositions of their own."""
    _batch(s, [9] * 4, [{"one": 1.0}, {}, {"one": 0.5, "two": -0.7}, {"two": 1.0}])


def an_adapter_a_row(s: Subject) -> None:
    _batch(s, [9] * 2, [{"one": 1.0}, {"two": 1.0}])


def left_padding(s: Subject) -> None:
    """Rows of other lengths, padded on the left, are what they are alone."""
    _batch(s, [5, 9, 12], [{"one": 1.0}, {}, {"one": 0.5, "two": 0.5}])


def generate(s: Subject) -> None:
    """Greedy tokens with a cache are those of passes over all tokens."""
    s.ready(s.runtime, "one", "two")
    rows, weights = s.rows(6, 9), [{"one": 1.0}, {"one": 0.4, "two": 0.8}]
    steps = list(s.runtime.decode(rows, [_spec(w) for w in weights], max_new_tokens=6))
    for number, (row, own) in enumerate(zip(rows, weights, strict=True)):
        said = [step[number] for step in steps if step[number] is not None]
        wanted = s.oracle.greedy(row, own, 6)
        ends = [n for n, token in enumerate(wanted) if token in s.runtime.text.end_ids]
        wanted = wanted[: ends[0]] if ends else wanted
        assert said == wanted, f"row {number} says {said}, and should say {wanted}"


def text(s: Subject) -> None:
    """Text in, text out, in one piece and streamed."""
    s.ready(s.runtime, "one")
    whole = s.runtime.generate("rain, tin roof", "one:1", max_new_tokens=5)
    assert "".join(s.runtime.stream("rain, tin roof", "one:1", max_new_tokens=5)) == whole


def training(s: Subject) -> None:
    """One step of training on all linear layers makes an adapter that acts."""
    _ = s.oracle
    data = s.folder / "data.jsonl"
    data.write_text("".join(json.dumps({"scene": f"a {n}", "text": f"rain {n}"}) + "\n" for n in range(4)))
    out = s.folder / f"{s.kind}-trained"
    settings = {"r": 2, "alpha": 4, "target_modules": "all-linear", "epochs": 2, "batch_size": 4}
    train("taught", data, out=out, base=str(s.base), precision="float32", device="cpu", **settings)
    name = s.runtime.load_adapter(str(out), name="taught")
    (row,) = s.rows(9)
    change = s.runtime.logits([row], compositions=name)[0] - s.runtime.logits([row])[0]
    assert bool(change.isfinite().all()), "the trained adapter gives what is no number"
    assert change.abs().max() > 0, "the trained adapter does nothing"


def int8(s: Subject) -> None:
    _quantized(s, "int8")


def int4(s: Subject) -> None:
    _quantized(s, "int4")


def _quantized(s: Subject, precision: Precision) -> None:
    """Over a quantized base, PEFT's adapter over the same weights is met as far as rounding lets tell."""
    _ = s.oracle
    (row,) = s.rows(9)
    chosen: tuple[list[Choice], list[Choice]] = ([], [])
    with s.load(precision) as runtime:
        s.ready(runtime, "one")
        base = runtime.logits([row])[0].float()
        with _choosing(runtime.parts.base.model, chosen[0]):
            found = runtime.logits([row], compositions="one:1")[0].float()
        folder = runtime.parts.base.folder
        dtype = runtime.parts.base.dtype
        mixture = any("expert" in name for name, _ in runtime.parts.base.model.named_modules())
    wanted = _peft_over(folder, dtype, s, row, precision, chosen[1])
    spread = float(wanted.std())
    moved = float((base - wanted).abs().max())
    worst = (found - wanted).abs().amax(-1)
    off = float(worst[_alike(*chosen)].max()) if chosen[0] else float(worst.sort().values[-2 if mixture else -1])
    assert off <= COARSE * spread, f"off by {off:.3g}, the spread is {spread:.3g} and the adapter's part {moved:.3g}"


Choice = tuple[Tensor, Tensor]
"""The experts of each token and their shares, both (tokens, k)."""


@contextmanager
def _choosing(model: Any, chosen: list[Choice]) -> Iterator[None]:
    """Notes which experts every token is sent to in each layer whose experts are fused."""

    def note(_module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        _, index, shares = given_to_experts(args, named)
        order = index.sort(-1)
        chosen.append((order.values, shares.float().expand_as(index).gather(-1, order.indices)))

    layers = [module for module in model.modules() if hasattr(module, "_apply_gate")]
    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _alike(mine: Sequence[Choice], theirs: Sequence[Choice]) -> Tensor:
    """The tokens that were sent to the same experts in every layer, in about the same shares: more than half of them.

    Rounding sends a token to another expert where two of them are as good (or, in PhiMoE, gives one of two all of it);
    that is no fault. Where experts are not fused nobody is asked, and one of nine tokens is let off for it.
    """
    assert len(mine) == len(theirs), "other experts were asked"
    same = [
        (one[0] == other[0]).all(-1) & ((one[1] - other[1]).abs() < _SHARE * other[1].abs().amax()).all(-1)
        for one, other in zip(mine, theirs, strict=True)
    ]
    alike = torch.stack(same).all(0)
    assert 2 * int(alike.sum()) > len(alike), f"{len(alike) - int(alike.sum())} of {len(alike)} tokens go elsewhere"
    return alike


def _peft_over(
    folder: Path, dtype: torch.dtype, s: Subject, row: Sequence[int], precision: Precision, chosen: list[Tensor]
) -> Tensor:
    try:
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        except NotImplementedError:  # transformers does not read what it has saved
            how = quantization_config(precision)
            model = AutoModelForCausalLM.from_pretrained(s.base, dtype=dtype, quantization_config=how).eval()
        if precision == "int4":
            _round_experts(model)
        oracle = Oracle(model)
        own = dict(s.oracle.model.named_parameters())
        with torch.no_grad():
            for name, parameter in oracle.model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(own[name])
        with _choosing(oracle.model, chosen), _given_numbers(oracle.model):
            return oracle.logits(row, {"one": 1.0}).float()
    except Exception as error:
        raise PeftCan(_first(error)) from error


@contextmanager
def _given_numbers(model: Any) -> Iterator[None]:
    """Refuses a pass in which a packed layer is given whole numbers: some models cast to the dtype of its weight."""

    def enter(_module: Any, given: tuple[Any, ...]) -> None:
        if given and not given[0].is_floating_point():
            raise TypeError("the model casts what it gives a layer to the dtype of its packed weight")

    handles = [m.register_forward_pre_hook(enter) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _round_experts(model: Any) -> None:
    """Fused experts as NF4 keeps each of their matrices: the product packs them, transformers does not."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for module in model.modules():
        for parameter in module._parameters.values():
            if hasattr(module, "_apply_gate") and parameter is not None and parameter.dim() == 3:
                for number, one in enumerate(parameter.data):
                    kept = quantize_4bit(one.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
                    parameter.data[number] = dequantize_4bit(*kept)


def _batch(s: Subject, lengths: Sequence[int], weights: Sequence[dict[str, float]]) -> None:
    s.ready(s.runtime, "one", "two")
    rows, width = s.rows(*lengths), max(lengths)
    ids = torch.tensor([[8] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    specs = [_spec(w) for w in weights]
    found = s.runtime.logits(ids, mask if len(set(lengths)) > 1 else None, compositions=specs)
    for number, (row, own) in enumerate(zip(rows, weights, strict=True)):
        _same(found[number, -len(row) :], s.oracle.logits(row, own), f"row {number}: ")


def _spec(weights: dict[str, float]) -> str | None:
    return " ".join(f"{name}:{weight!r}" for name, weight in weights.items()) or None


def _same(found: Tensor, wanted: Tensor, what: str = "") -> None:
    off = (found - wanted).abs().max()
    assert off <= TOLERANCE * max(1.0, float(wanted.std())), f"{what}off by {off:.3g}, the spread is {wanted.std():.3g}"


CHECKS: dict[str, Callable[[Subject], None]] = {
    "load": load,
    "all-linear": all_linear,
    "attention": attention,
    "mixed rows": mixed_rows,
    "adapter a row": an_adapter_a_row,
    "left padding": left_padding,
    "generate": generate,
    "text": text,
    "train": training,
    "int8": int8,
    "int4": int4,
}


def findings(kind: str, checks: Sequence[str] = tuple(CHECKS)) -> Iterator[Finding]:
    """What each check finds of a type; a type that transformers can't make small, or that is not causal, has none."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subject = Subject(kind, Path(folder))
        try:
            _ = subject.base
        except NotCausalError as error:
            yield Finding(kind, "base", "not causal", str(error))
            return
        except Exception as error:
            yield Finding(kind, "base", "no tiny base", _first(error))
            return
        for name in checks:
            yield _finding(subject, name)


def _finding(subject: Subject, name: str) -> Finding:
    try:
        CHECKS[name](subject)
    except PeftCan as error:
        return Finding(subject.kind, name, "not by PEFT", str(error))
    except LoraRtError as error:
        return Finding(subject.kind, name, "refused", f"{error.message} | {error.next_step} | {error.problems[:2]}")
    except AssertionError as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        if "support/architectures" not in where.filename:
            return Finding(subject.kind, name, "crash", f"AssertionError {error} {where.filename}:{where.lineno}")
        return Finding(subject.kind, name, "wrong", str(error))
    except Exception as error:
        where = [f for f in traceback.extract_tb(error.__traceback__) if "/w/" in f.filename or "lora_rt" in f.filename]
        last = f"{Path(where[-1].filename).name}:{where[-1].lineno}" if where else ""
        return Finding(subject.kind, name, "crash", f"{_first(error)} at {last}")
    return Finding(subject.kind, name, "exact")


def _first(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"
