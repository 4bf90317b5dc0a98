"""Several processes for one run, as `accelerate launch -m lora_rt train ...` and torchrun start them.

Each process holds the whole base and the same adapter, reads the same batches in the same order and takes its part of
the rows; the gradients are added up, weighted by labels, so that a step is the step of one process. What is written,
published and said is the first process's business. Where the launcher asks for FSDP, each process keeps its part of the
base's blocks alone, once they are loaded; the adapter is whole in all of them.

To the Trainer, and to accelerate below it, each process is alone: the variables by which they would know are taken
from the environment here. Knows no torch until there is something to exchange.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from lora_rt.core.step.settings import SettingsError
from lora_rt.errors import LoraRtError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
_GONE = ("closed by peer", "reset by peer", "Broken pipe", "Timed out", "timed out")
"""What gloo and NCCL say of a process that is not there any more."""
_SHARDING = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "accelerate's parallelism config",
}


@dataclass(frozen=True, slots=True)
class Processes:
    """This process's number, from 0, how many there are, and whether they keep the base in parts."""

    rank: int = 0
    count: int = 1
    sharded: bool = False

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def mine(self, parts: Sequence[T], idle: T) -> Sequence[T]:
        """Those of the parts that this process takes.

        Args:
            idle: a part that counts nothing. All that keep a base in parts have to pass through it equally often, and
                those who would have nothing to do take it.
        """
        missing = -len(parts) % self.count if self.sharded else 0
        return [*parts, *[idle] * missing][self.rank :: self.count]

    def summed(self, values: Tensor) -> Tensor:
        """The sum over all processes of a tensor of one shape; the same bits in all of them."""
        if self.count > 1:
            with _all_there() as exchange:
                exchange.all_reduce(values)
        return values

    def shared(self, value: T | None) -> T:
        """What the first process has, in all of them."""
        if self.count == 1:
            assert value is not None
            return value
        box = [value]
        with _all_there() as exchange:
            exchange.broadcast_object_list(box)
        return box[0]  # type: ignore[return-value]

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Within the block the first process is alone; the others follow when it is through."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def wait(self) -> None:
        """Until all processes have come here."""
        if self.count > 1:
            with _all_there() as exchange:
                exchange.barrier()


@contextmanager
def _all_there() -> Iterator[Any]:
    """Within the block, processes exchange something, by torch.distributed.

    Raises:
        LoraRtError: one of them has ended, which the others notice by its silence.
    """
    import torch.distributed

    try:
        yield torch.distributed
    except RuntimeError as error:
        if not any(word in str(error) for word in _GONE):
            raise
        step = "See what it said; with --resume the run goes on from its newest checkpoint"
        raise LoraRtError("another process of this run has ended, and so it stops", next_step=step) from error


@cache
def told() -> Processes:
    """What the launcher told this process; asked before torch and transformers are imported.

    Raises:
        SettingsError: it asks for what can't be had: a model in shards of another kind than FSDP's.
    """
    count = int(os.environ.get("WORLD_SIZE") or 1)
    if count > 1 and (asked := [name for key, name in _SHARDING.items() if os.environ.get(key) == "true"]):
        text = f"{asked[0]} cuts the base in a way that this training knows nothing of"
        raise SettingsError(
            text, next_step="Launch without it, or with FSDP: accelerate launch --multi_gpu, or --use_fsdp"
        )
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    return Processes(int(os.environ.get("RANK") or 0), count, sharded) if count > 1 else Processes()


@cache
def joined() -> Processes:
    """The same, when the processes have found each other."""
    found = told()
    if found.count == 1:
        return found
    local = os.environ.get("LOCAL_RANK", "0")
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")
    if not on_cpu and "CUDA_VISIBLE_DEVICES" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = local  # before torch looks for devices: each process then has one
    import torch.distributed

    torch.distributed.init_process_group("gloo" if on_cpu or not torch.cuda.is_available() else "nccl")
    for name in [n for n in os.environ if n in ("RANK", "LOCAL_RANK", "WORLD_SIZE") or n.startswith("ACCELERATE_")]:
        del os.environ[name]
    return found


def here(tensor: Any) -> Tensor:
    """What this process keeps of a tensor, which may have been cut."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[no-any-return]


@contextmanager
def speaking_once() -> Iterator[Processes]:
    """Within the block, only the first process says something; a failure that is nobody's fault but ours is heard.

    Raises:
        SettingsError: see `told`.
    """
    try:
        found = told()
    except SettingsError:
        if os.environ.get("RANK", "0") == "0":
            raise
        sys.exit(1)
    if found.first:
        yield found
        return
    heard = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout = sys.stderr = nowhere
        try:
            yield found
        except (LoraRtError, KeyboardInterrupt):
            sys.exit(1)  # the first process met the same, and says it
        finally:
            sys.stdout, sys.stderr = heard
