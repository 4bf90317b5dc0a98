"""Functions in LLVM's terms: what they are given, outputs that threads share, and how a module is compiled."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llvmlite import binding, ir

from lora_rt.core.native.registers import I64
from lora_rt.errors import LoraRtError
from lora_rt.registry import durable, home

_DIGEST = hashlib.sha256().digest_size


def taking(module: Any, name: str, arguments: int = 9) -> tuple[Any, Any, list[Any]]:
    """A function that is given the address of so many int64: itself, its builder, and what stands there."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64.as_pointer()]), name)
    b = ir.IRBuilder(function.append_basic_block())
    return function, b, [b.load(b.gep(function.args[0], [I64(place)])) for place in range(arguments)]


def internal(module: Any, name: str, arguments: int) -> tuple[Any, Any, Sequence[Any]]:
    """A function of so many int64 that only this module calls: itself, its builder, and what it is given."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * arguments), name)
    function.linkage = "internal"
    return function, ir.IRBuilder(function.append_basic_block()), function.args


def shared_by_threads(module: Any, part_of: Any, unit: int, name: str = "run", *, arguments: int = 9) -> None:
    """Add a function to a module: each thread that runs it takes parts of the outputs until there are none.

    It takes so many int64: 0, how many parts, three numbers of which the last one is that of outputs, and addresses.

    Args:
        part_of: makes a part: the first output and the one behind the last, and then the same numbers and addresses.
        unit: so many outputs belong together, but for those behind the last whole ones.
    """
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64.as_pointer()]), name)
    b = ir.IRBuilder(function.append_basic_block())
    own = b.alloca(I64, arguments)  # what a part is given
    counter = function.args[0]
    parts, *others = (b.load(b.gep(counter, [I64(place)])) for place in range(1, arguments))
    for place, other in enumerate(others, start=2):
        b.store(other, b.gep(own, [I64(place)]))
    out, least = others[2], I64(unit)
    units = b.sdiv(b.add(out, b.sub(least, I64(1))), least)
    step = b.mul(b.sdiv(b.add(units, b.sub(parts, I64(1))), parts), least)
    take, taken, end = (b.append_basic_block() for _ in range(3))
    b.branch(take)
    b.position_at_end(take)
    part = b.atomic_rmw("add", counter, I64(1), "monotonic")
    start = b.mul(part, step)
    # Behind the last output there may be parts as well, of fewer than none.
    some = b.and_(b.icmp_signed("<", part, parts), b.icmp_signed("<", start, out))
    b.cbranch(some, taken, end)
    b.position_at_end(taken)
    stop = b.add(start, step)
    b.store(start, own)
    b.store(b.select(b.icmp_signed("<", stop, out), stop, out), b.gep(own, [I64(1)]))
    b.call(part_of, [own])
    b.branch(take)
    b.position_at_end(end)
    b.ret_void()


def shared_kernels(
    name: str,
    parts: Mapping[str, Callable[[Any], Any]],
    unit: int,
    *others: str,
    uses: Sequence[str],
    told: object,
    arguments: int = 9,
) -> tuple[int, ...]:
    """Where functions that threads share lie, and others of the same module; see `shared_by_threads`, `addresses_of`.

    Args:
        name: of the module.
        parts: the name of such a function -> what adds the function that makes a part to the module.
    """

    def build() -> Any:
        module = ir.Module(name)
        for shared, part in parts.items():
            shared_by_threads(module, part(module), unit, shared, arguments=arguments)
        return module

    return addresses_of(build, *parts, *others, uses=uses, told=told)


def addresses_of(build: Callable[[], Any], *names: str, uses: Sequence[str], told: object) -> tuple[int, ...]:
    """Where functions of a module lie, compiled for this processor; they stay until the process ends.

    To compile one takes up to a second, so it is kept in the home for every later process.

    Args:
        build: makes the module.
        uses: the files that decide what it makes.
        told: what else does.
    """
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    cpu, features = binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten() + ",-prefer-256-bit"
    machine = binding.Target.from_default_triple().create_target_machine(cpu=cpu, features=features, opt=3)
    sources = [Path(__file__), *map(Path, uses)]
    facts = f"{cpu} {features} {binding.llvm_version_info} {told}".encode()
    name = hashlib.sha256(b"".join([facts, *(path.read_bytes() for path in sources)])).hexdigest()
    place = home.kernels() / f"{name[:24]}.o"
    code = _kept(place)
    if code is None:
        code = _compiled(build(), machine)
        with suppress(LoraRtError, OSError):  # a home that can't be written costs time alone
            place.parent.mkdir(parents=True, exist_ok=True)
            durable.write_bytes(place, hashlib.sha256(code).digest() + code)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return tuple(int(engine.get_function_address(name)) for name in names)


def _kept(place: Path) -> bytes | None:
    """The code in a file, where it is whole: what is damaged would be run as it is."""
    try:
        digest, code = (found := place.read_bytes())[:_DIGEST], found[_DIGEST:]
    except OSError:
        return None
    return code if hashlib.sha256(code).digest() == digest else None


def _compiled(module: Any, machine: Any) -> bytes:
    module.triple = machine.triple
    built = binding.parse_assembly(str(module))
    built.verify()
    passes = binding.create_pass_builder(machine, binding.PipelineTuningOptions(speed_level=3))
    passes.getModulePassManager().run(built, passes)
    code: bytes = machine.emit_object(built)
    return code


_engines: list[Any] = []
