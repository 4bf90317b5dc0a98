"""Where private parts of other libraries are touched: in modules named for it, or in a place of the list below.

What is looked for are names with one leading underscore that the module itself does not define: `module._parameters`,
`getattr(tensor, "_base")`, `from library._inner import part`.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from torch import nn

ROOT = Path(__file__).parents[2]
FOLDERS = ("core", "plugins", "registry")
NAMED_FOR_IT = ("upstream.py", "internals.py")

# Touched where they are used, since a function of ours in between costs a step of one row a good part of its time, or
# hides what a kernel does. name -> the file of the test which says that the library still has it
IN_PLACE = {
    # torch: what a module keeps, asked of hundreds of them before each step
    "_modules": "engine/test_upstream.py",
    "_parameters": "engine/test_upstream.py",
    "_forward_hooks": "engine/test_upstream.py",
    "_forward_pre_hooks": "engine/test_upstream.py",
    "_has_any_global_hook": "engine/test_upstream.py",
    # torch: what a tensor is, and operations without a public name
    "_version": "multiply/test_upstream.py",
    "_C": "multiply/test_upstream.py",
    "_is_view": "engine/test_upstream.py",
    "_unsafe_view": "engine/test_upstream.py",
    "_foreach_copy_": "engine/test_upstream.py",
    "_foreach_zero_": "engine/test_upstream.py",
    "_reorder_linear_weight": "multiply/test_upstream.py",
    "_linear_pointwise": "multiply/test_upstream.py",
    # others, where a module is about that very thing
    "_lib": "multiply/test_upstream.py",  # bitsandbytes' CPU library
    "_cache": "native/test_upstream.py",  # numba's, of a function
    "_attn_implementation": "base/test_upstream.py",  # transformers' name of what a model attends with
    "_apply_gate": "base/test_upstream.py",  # by which transformers' experts are told from other modules
}

PUBLIC = {"_fields", "_replace", "_asdict", "_make", "_Hash"}
"""Of named tuples, documented; and what type checkers call that which hashlib makes."""
BOUNDED = (
    "accelerate",
    "bitsandbytes",
    "huggingface_hub",
    "llvmlite",
    "numba",
    "peft",
    "torch",
    "transformers",
    "typer",
)


def _is_private(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"_[A-Za-z]\w*", name) is not None


@cache
def _of_torch() -> frozenset[str]:
    """Names that are torch's, whoever else has them."""
    return frozenset((*dir(torch.Tensor), *dir(nn.Module), *vars(nn.Module())))


def _defined(tree: ast.Module) -> set[str]:
    """The names that a module gives to what is its own: functions, classes, fields, and attributes of `self`."""
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Attribute(attr=name, value=ast.Name(id="self"), ctx=ast.Store()):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
            case ast.Assign(targets=[ast.Name(id="__slots__")], value=value):
                found |= {one.value for one in ast.walk(value) if isinstance(one, ast.Constant)}
    return found - _of_torch()


@cache
def touched(source: str) -> list[tuple[int, str]]:
    """(line, name) of every private name of another module."""
    return list(_touched(source))


def _touched(source: str) -> Iterator[tuple[int, str]]:
    tree = ast.parse(source)
    own = _defined(tree)
    for node in ast.walk(tree):
        names: list[object] = []
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                pass
            case ast.Attribute(attr=name):
                names = [name]
            case ast.Call(func=ast.Name(id="getattr" | "hasattr" | "setattr"), args=[_, ast.Constant(value=name), *_]):
                names = [name]
            case ast.ImportFrom(module=str(module), names=parts) if not module.startswith("lora_rt"):
                names = [*module.split("."), *(part.name for part in parts)]
            case ast.Import(names=parts):
                names = [name for part in parts for name in part.name.split(".")]
        for name in names:
            if _is_private(name) and name not in own | PUBLIC:
                yield node.lineno, str(name)


@cache
def _sources() -> dict[Path, str]:
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in files}


def test_private_parts_of_others_are_touched_in_modules_named_for_it_or_in_listed_places() -> None:
    strange = [
        f"{path}:{line}: {name}"
        for path, source in _sources().items()
        if path.name not in NAMED_FOR_IT
        for line, name in touched(source)
        if name not in IN_PLACE
    ]
    assert strange == [], "move it into the upstream.py of its floor, with a test beside the others, or list it above"


@pytest.mark.parametrize("name", IN_PLACE)
def test_what_is_listed_is_touched_and_has_its_test(name: str) -> None:
    assert any(name in (found for _, found in touched(source)) for source in _sources().values())
    assert re.search(rf"\b{name}\b", (ROOT / "tests" / IN_PLACE[name]).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("x._parameters", ["_parameters"]),
        ("getattr(x, '_base', None)", ["_base"]),
        ("from a._b import c", ["_b"]),
        ("import a._b", ["_b"]),
        ("class A:\n def f(self, other):\n  self._x = other._x", []),
        ("class A:\n def f(self, other):\n  self._version = other._version", ["_version"]),  # which is torch's
        ("a.__dict__, one._replace(x=1)", []),
    ],
)
def test_a_private_name_is_anothers_unless_the_module_defines_it(source: str, names: list[str]) -> None:
    assert [name for _, name in touched(source)] == names


@pytest.mark.parametrize("library", BOUNDED)
def test_a_library_whose_private_parts_are_touched_has_an_upper_bound_that_the_tested_version_keeps(
    library: str,
) -> None:
    document = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (bound,) = (one for one in map(Requirement, document["project"]["dependencies"]) if one.name == library)
    assert any(part.operator == "<" for part in bound.specifier)
    (tested,) = re.findall(rf"^{library}==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert bound.specifier.contains(tested)
