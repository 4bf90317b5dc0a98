"""Functions in LLVM's terms: loops around what is built, outputs that threads share, and how a module is compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import binding, ir

from lora_rt.core.base.registers import I64


@contextmanager
def counting(b: Any, start: Any, stop: Any, step: int) -> Iterator[Any]:
    """A loop around what is built in the block, whose number is given; not run at all where start is not below stop."""
    test, inside, after = (b.append_basic_block() for _ in range(3))
    before = b.block
    b.branch(test)
    b.position_at_end(test)
    number = b.phi(I64)
    number.add_incoming(start, before)
    b.cbranch(b.icmp_signed("<", number, stop), inside, after)
    b.position_at_end(inside)
    yield number
    number.add_incoming(b.add(number, I64(step)), b.block)
    b.branch(test)
    b.position_at_end(after)


def shared_by_threads(module: Any, part_of: Any, unit: int) -> None:
    """Add a function `run` to a module: each thread that runs it takes parts of the outputs until there are none.

    It takes nine int64: 0, how many parts, three numbers of which the last one is that of outputs, and four addresses.

    Args:
        part_of: makes a part: the first output and the one behind the last, and then the same numbers and addresses.
        unit: so many outputs belong together, but for those behind the last whole ones.
    """
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64.as_pointer()]), "run")
    b = ir.IRBuilder(function.append_basic_block())
    own = b.alloca(I64, 9)  # what a part is given
    counter = function.args[0]
    parts, *others = (b.load(b.gep(counter, [I64(place)])) for place in range(1, 9))
    for place, other in enumerate(others, start=2):
        b.store(other, b.gep(own, [I64(place)]))
    out, least = others[2], I64(unit)
    units = b.sdiv(b.add(out, b.sub(least, I64(1))), least)
    step = b.mul(b.sdiv(b.add(units, b.sub(parts, I64(1))), parts), least)
    take, taken, end = (b.append_basic_block() for _ in range(3))
    b.branch(take)
    b.position_at_end(take)
    part = b.atomic_rmw("add", counter, I64(1), "monotonic")
    b.cbranch(b.icmp_signed("<", part, parts), taken, end)
    b.position_at_end(taken)
    start = b.mul(part, step)
    stop = b.add(start, step)
    b.store(start, own)
    b.store(b.select(b.icmp_signed("<", stop, out), stop, out), b.gep(own, [I64(1)]))
    b.call(part_of, [own])
    b.branch(take)
    b.position_at_end(end)
    b.ret_void()


def addresses_of(module: Any, *names: str) -> tuple[int, ...]:
    """Where functions of a module lie, which is compiled for this processor and stays until the process ends.

    To compile one takes some tenths of a second.
    """
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    module.triple = binding.get_process_triple()
    features = binding.get_host_cpu_features().flatten() + ",-prefer-256-bit"
    machine = binding.Target.from_triple(module.triple).create_target_machine(
        cpu=binding.get_host_cpu_name(), features=features, opt=3
    )
    built = binding.parse_assembly(str(module))
    built.verify()
    passes = binding.create_pass_builder(machine, binding.PipelineTuningOptions(speed_level=3))
    passes.getModulePassManager().run(built, passes)
    engine = binding.create_mcjit_compiler(built, machine)
    engine.finalize_object()
    _engines.append(engine)
    return tuple(int(engine.get_function_address(name)) for name in names)


_engines: list[Any] = []
