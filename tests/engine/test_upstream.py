"""What the engine, the forward pass and a training step take of torch beyond its documented face."""

from __future__ import annotations

import torch
from torch import nn


def test_torch_copies_and_clears_lists_of_tensors_in_one_call() -> None:
    """A recorded step is refilled that way, in one launch."""
    places = [torch.ones(2), torch.ones(3, 2)]
    torch._foreach_copy_(places, [torch.full((2,), 5.0), torch.full((3, 2), 7.0)])
    assert [float(place.mean()) for place in places] == [5.0, 7.0]
    torch._foreach_zero_(places)
    assert [float(place.abs().sum()) for place in places] == [0.0, 0.0]


def test_a_module_says_whether_somebody_watches_its_passes() -> None:
    """A recorded step runs no hooks, so that it is not taken where there are some."""
    module = nn.Linear(2, 2)
    assert not module._forward_pre_hooks
    assert not module._forward_hooks
    handles = [module.register_forward_pre_hook(lambda *_: None), module.register_forward_hook(lambda *_: None)]
    assert module._forward_pre_hooks
    assert module._forward_hooks
    for handle in handles:
        handle.remove()
    assert not module._forward_pre_hooks


def test_a_product_s_result_takes_another_shape_without_a_copy_and_is_no_view_to_autograd() -> None:
    """A view could not be written to in place where a later layer does that."""
    given = torch.randn(6, 2, requires_grad=True)
    found = torch.ops.aten._unsafe_view(given * 2, [2, 3, 2])
    assert found.shape == (2, 3, 2)
    assert not found._is_view()
    found.add_(1).sum().backward()
    assert torch.equal(given.grad, torch.full((6, 2), 2.0))


def test_a_module_keeps_its_modules_and_parameters_in_dictionaries_that_stay_the_same() -> None:
    """They are asked in every step, by functions of Python's own, whether anything was replaced."""
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for one, names in ((module, ["_modules"]), (module[0], ["_parameters", "_modules", "_forward_hooks"])):
        assert all(type(vars(one)[name]) is dict or name.endswith("hooks") for name in names), vars(one)
    modules, parameters = module._modules, module[0]._parameters
    module[1] = other = nn.Linear(2, 3)
    module[0].bias = None
    assert modules["1"] is other
    assert parameters == {"weight": module[0].weight, "bias": None}
    assert module._modules is modules


def test_a_copy_of_a_module_may_be_given_parameters_of_its_own() -> None:
    import copy

    module = nn.Linear(2, 2)
    made = copy.copy(module)
    made._parameters = {**module._parameters, "bias": nn.Parameter(torch.ones(2))}
    assert made.weight is module.weight
    assert made.bias is not module.bias


def test_torch_says_whether_somebody_watches_the_passes_of_all_modules() -> None:
    from torch.nn.modules.module import _has_any_global_hook, register_module_forward_hook

    assert not _has_any_global_hook()  # type: ignore[no-untyped-call]
    handle = register_module_forward_hook(lambda *_: None)
    assert _has_any_global_hook()  # type: ignore[no-untyped-call]
    handle.remove()
