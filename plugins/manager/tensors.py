"""What hooks return that holds tensors, or takes and gives them: `results.py`, where torch is imported."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import (
    IGNORE,
    Encoded,
    Gate,
    GateContext,
    Mixture,
    MixtureContext,
    Objective,
    ObjectiveContext,
    SceneContext,
    ScenePrediction,
)
from lora_rt.plugins.manager.results import ResultError

Blame = Callable[[str, object], Exception]
"""(what failed, why) -> the error that names the plugin."""


def checked_gate(value: object, context: GateContext) -> Gate:
    """The gate with its tensors on the pass's device, floating-point and finite; they broadcast as `Gate` says."""
    if not isinstance(value, Gate):
        raise ResultError(f"it returned a {type(value).__name__}, not a Gate")
    rows, tokens = context.input_ids.shape
    place = (context.base.layers, rows, tokens)
    ranks = _gate_part("ranks", value.ranks, (*place, context.rank if context.uniform_rank else 1), context)
    heads = _gate_part("heads", value.heads, (*place, context.base.heads), context)
    return Gate(ranks=ranks, heads=heads)


def _gate_part(name: str, tensor: object, full: tuple[int, ...], context: GateContext) -> Tensor | None:
    if tensor is None:
        return None
    if not isinstance(tensor, Tensor):
        raise ResultError(f"{name} is a {type(tensor).__name__}, not a tensor")
    odd = _oddity(tensor)
    if odd:
        raise ResultError(f"{name} is {odd}, not a plain tensor of real numbers")
    shape = tuple(tensor.shape)
    if len(shape) > 4 or any(have not in (1, want) for have, want in zip(shape[::-1], full[::-1], strict=False)):
        raise ResultError(f"{name} of shape {shape} does not broadcast to {full}")
    if tensor.device != context.input_ids.device:
        raise ResultError(f"{name} is on {tensor.device}, and this pass on {context.input_ids.device}")
    # Where gates are fitted, gradients are on and lead through the gate to the state of the mode.
    gate = tensor if torch.is_grad_enabled() else tensor.detach()
    # The gate multiplies float32 or bfloat16 weights; a float64 one would turn the whole layer into float64.
    if gate.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        gate = gate.float()
    # Rows that do not use the adapter may hold anything. Their weight is 0, and 0 times NaN would be NaN.
    if len(shape) >= 3 and shape[-3] > 1 and not all(context.active):
        active = torch.tensor(list(context.active), device=gate.device)
        gate = torch.where(active[:, None, None], gate, 0.0)
    return gate


def checked_gates(value: object, contexts: Sequence[GateContext]) -> list[Gate | None]:
    """The joint gates: one for each adapter."""
    if not isinstance(value, (list, tuple)) or len(value) != len(contexts):
        count = f" of {len(value)}" if isinstance(value, (list, tuple)) else ""
        raise ResultError(f"it returned a {type(value).__name__}{count}, not a list of {len(contexts)} gates")
    return [
        None if gate is None else checked_gate(gate, context) for gate, context in zip(value, contexts, strict=True)
    ]


def checked_mixture(value: object, context: MixtureContext) -> Mixture:
    """Finite tensors by name, a card that is JSON, and a depth that the base has."""
    if not isinstance(value, Mixture):
        raise ResultError(f"it returned a {type(value).__name__}, not a Mixture")
    for name, tensor in value.state.items():
        if not isinstance(name, str) or type(tensor) not in (Tensor, nn.Parameter):
            raise ResultError(f"the state {name!r} is a {type(tensor).__name__}, not a tensor")
        if not bool(tensor.isfinite().all()):
            raise ResultError(f"the state {name!r} holds numbers that are not finite")
    _check_depth(value, context)
    try:
        json.dumps(dict(value.card), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ResultError(f"Mixture.card is not JSON: {error}") from error
    return value


def not_finite(gates: Sequence[Gate | None]) -> tuple[int, str] | None:
    """(index, part) of the first gate with a number that is none. A GPU is waited for once, whatever there is."""
    parts = [
        (index, name, tensor)
        for index, gate in enumerate(gates)
        if gate is not None
        for name, tensor in (("ranks", gate.ranks), ("heads", gate.heads))
        if tensor is not None
    ]
    if not parts:
        return None
    fine: list[bool] = torch.stack([torch.isfinite(tensor).all() for _, _, tensor in parts]).tolist()
    return None if all(fine) else parts[fine.index(False)][:2]


def _oddity(tensor: Tensor) -> str:
    """What makes a tensor one that can't multiply a layer, if anything does."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.is_nested:
        return "nested"
    if tensor.layout is not torch.strided:
        return f"sparse ({str(tensor.layout).removeprefix('torch.')})"
    if tensor.is_quantized:
        return "quantized"
    return "complex" if tensor.is_complex() else ""


def checked_prediction(value: object, context: SceneContext) -> ScenePrediction:
    """One distribution over the named types per row, on the device of the hidden states."""
    if not isinstance(value, ScenePrediction):
        raise ResultError(f"it returned a {type(value).__name__}, not a ScenePrediction")
    types = list(value.types)
    if not types or not all(isinstance(name, str) and name for name in types) or len(set(types)) < len(types):
        raise ResultError(f"ScenePrediction.types is {value.types!r:.80}, not a list of different names")
    shares, wanted = value.probabilities, (len(context.hidden), len(types))
    if not isinstance(shares, Tensor) or tuple(shares.shape) != wanted:
        shape = tuple(shares.shape) if isinstance(shares, Tensor) else type(shares).__name__
        raise ResultError(f"probabilities is {shape}, not a tensor of shape {wanted}")
    sums = shares.float().sum(1)
    if bool((shares < 0).any()) or not torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        raise ResultError("the probabilities of a row are negative or do not add up to 1")
    return value


def checked_objective(value: object, context: ObjectiveContext, blame: Blame) -> Objective:
    """The objective, whose own methods from now on name the plugin when they fail."""
    if not isinstance(value, Objective):
        raise ResultError(f"it returned a {type(value).__name__}, not an Objective")
    fields = value.fields
    if not isinstance(fields, tuple) or not all(isinstance(name, str) and name for name in fields):
        raise ResultError(f"Objective.fields is {fields!r}, not a tuple of names")
    _check_depth(value, context)
    if not isinstance(value.state, nn.Module | None):
        raise ResultError(f"Objective.state is a {type(value.state).__name__}, not a torch.nn.Module")
    vocabulary = context.base.vocab_size
    _guard(value, "check", lambda result, _example: _checked_findings(result), blame)
    _guard(value, "encode", lambda result, _example: _checked_sequences(result, vocabulary), blame)
    _guard(value, "loss", _checked_loss, blame)
    _guard(value, "ranks", _checked_ranks, blame)
    return value


def _check_depth(value: Mixture | Objective, context: MixtureContext | ObjectiveContext) -> None:
    depth, layers = value.hidden_layers, context.base.layers
    if depth is not None and (type(depth) is not int or not 0 <= depth <= layers):
        kind = "Mixture" if isinstance(value, Mixture) else "Objective"
        raise ResultError(f"{kind}.hidden_layers is {depth!r}, not a number of blocks from 0 to {layers}")


def _guard(objective: Objective, name: str, check: Callable[..., Any], blame: Blame) -> None:
    """Put a method in front of the class's own. On the instance: `type(objective)` stays what the author wrote."""
    own = getattr(objective, name)

    def guarded(*arguments: Any) -> Any:
        try:
            return check(own(*arguments), *arguments)
        except LoraRtError:
            raise
        except ResultError as error:
            raise blame(f"Objective.{name}", str(error)) from error
        except (Exception, SystemExit) as error:
            raise blame(f"Objective.{name}", error) from error

    object.__setattr__(objective, name, guarded)  # a frozen dataclass is an objective, too


def _checked_findings(value: object) -> list[str]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise ResultError(f"it returned {value!r:.80}, not a list of texts")
    return list(value)


def _checked_sequences(value: object, vocabulary: int) -> list[Encoded]:
    if not isinstance(value, Sequence) or not all(isinstance(item, Encoded) for item in value):
        raise ResultError(f"it returned a {type(value).__name__}, not a list of Encoded")
    for item in value:
        if len(item.input_ids) != len(item.labels):
            raise ResultError(f"{len(item.input_ids)} tokens but {len(item.labels)} labels")
        if not all(isinstance(number, (int, float)) for number in item.extra.values()):
            raise ResultError(f"extra is {dict(item.extra)!r:.80}, not numbers by name")
        if not all(isinstance(token, int) and 0 <= token < vocabulary for token in item.input_ids):
            raise ResultError(f"input_ids are not all token ids from 0 to {vocabulary - 1}")
        if any(label not in (IGNORE, token) for token, label in zip(item.input_ids, item.labels, strict=True)):
            raise ResultError("a label is neither its own position's token nor IGNORE")
    return list(value)


def _checked_loss(value: object, logits: Tensor, _labels: object, _extra: object) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.dim() != 0:
        raise ResultError(f"it returned a {_told(value)}, not a scalar tensor")
    if not value.is_floating_point():
        raise ResultError(f"it returned a loss of {value.dtype}, not of floating-point numbers")
    if value.device != logits.device:
        raise ResultError(f"it returned a loss on {value.device}, and the logits are on {logits.device}")
    if logits.requires_grad and not value.requires_grad:
        raise ResultError("it returned a loss without a gradient: compute it from the logits, and without item()")
    return value


def _told(value: object) -> str:
    return type(value).__name__ + (f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "")


def _checked_ranks(value: object, extra: Mapping[str, Tensor], rank: int) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.dim() != 2:
        raise ResultError(f"it returned a {_told(value)}, not a tensor (batch, rank)")
    rows = next((len(numbers) for numbers in extra.values()), 1)
    if tuple(value.shape) not in ((rows, rank), (1, rank)) or not value.is_floating_point():
        raise ResultError(
            f"it returned {value.dtype} of shape {tuple(value.shape)}, not floats of shape {(rows, rank)}"
        )
    for numbers in extra.values():
        if value.device != numbers.device:
            raise ResultError(f"it returned a tensor on {value.device}, and this batch is on {numbers.device}")
    if not bool(value.isfinite().all()):
        raise ResultError("it returned numbers that are not finite")
    return value
