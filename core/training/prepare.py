"""From settings to a run that is ready for its first step, with everything refused that would be refused later."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from lora_rt.core.base.load import LoadedBase, load_base
from lora_rt.core.base.reading import UNREADABLE, config_alone
from lora_rt.core.base.shape import blocks_of, context_of
from lora_rt.core.base.source import parse_base
from lora_rt.core.generation.prompts import TextFormat
from lora_rt.core.memory.portions import Portions, pick_portions
from lora_rt.core.memory.skeleton import skeleton
from lora_rt.core.multiply.fastest import Products
from lora_rt.core.step.adapter import checkpointed, fresh_adapter, targets
from lora_rt.core.step.attention import attend_by_rows, attend_in_float32
from lora_rt.core.step.fused import fuse
from lora_rt.core.step.loss import is_plain
from lora_rt.core.step.norms import lean_norms
from lora_rt.core.step.settings import SettingsError, TrainSettings, check_targets
from lora_rt.core.training.data import bad_lines, digest_of, read_pairs
from lora_rt.core.training.processes import joined
from lora_rt.core.training.trainer import RankGates
from lora_rt.plugins.contract import IGNORE, Encoded, Objective, ObjectiveContext
from lora_rt.plugins.manager import ModeHost

T = TypeVar("T")


Example = tuple[dict[str, Any], list[Encoded]]
"""A line of the data and its sequences."""


_LOGGER = logging.getLogger("lora_rt.training")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run before its first step. `model` is the base with a fresh adapter, and the mode's state where it has one.

    `packed`: rows go through it one behind the other (`lora_rt.core.step.packing`). `copies`: bytes of the base's dense
    copies.
    """

    settings: TrainSettings
    base: LoadedBase
    text: TextFormat
    objective: Objective
    training: Sequence[Encoded]
    held_out: Sequence[Encoded]
    examples: int
    data_digest: str
    portions: Portions
    model: Any
    gates: RankGates
    packed: bool = False
    copies: int = 0

    @property
    def resolved(self) -> TrainSettings:
        """The settings with what the run picked where they left it open."""
        picked = self.portions
        return replace(
            self.settings,
            optimizer=picked.optimizer,
            accumulation=picked.accumulation,
            gradient_checkpointing=picked.checkpointing,
        )

    @property
    def fingerprint(self) -> str:
        """What two runs share exactly if one can resume the other."""
        identity = self.base.identity
        base = identity.digest or f"{identity.id}@{identity.revision}"
        return self.settings.fingerprint(self.data_digest, self.portions.optimizer, base_digest=base)


def prepare(settings: TrainSettings, modes: ModeHost) -> Prepared:
    """Load the base, encode the data, and put a fresh adapter into the model.

    Raises:
        LoraRtError: settings, data, base or mode do not work out.
    """
    _check_targets(settings)
    processes = joined()
    if processes.sharded and settings.precision in ("int8", "int4"):
        why = f"FSDP cuts weights of 16 or 32 bits, and those of {settings.precision} are packed"
        raise SettingsError(why, next_step="Use --precision bfloat16, or launch without FSDP")
    with processes.first_before_others():  # it converts and measures what is then there for all
        base = load_base(settings.base, settings.precision, settings.device, for_training=True)
        products = Products(base.model, for_training=True)
        products.keep()  # before it is looked how much memory is free
    text = TextFormat.of_base(base, settings.template_variables, special_tokens=settings.special_tokens)
    objective = objective_of(settings, modes, base, text)
    training, held_out = examples_of(settings, objective, base)
    _warn_of_known(training, held_out)
    encoded = [[item for _, sequences in part for item in sequences] for part in (training, held_out)]
    processes.wait()  # all bases are in memory
    portions = pick_portions(settings, base, objective, [*encoded[0], *encoded[1]], processes.count)
    portions = processes.shared(portions)
    model = fresh_adapter(base, settings)
    if base.device.type == "cpu":
        attend_in_float32(model)
    if portions.checkpointing:
        checkpointed(model)
    if objective.state is not None:
        model.add_module("lora_rt_mode_state", objective.state.to(base.device))
    gates = RankGates(model, objective, settings.r)
    if base.device.type == "cpu":
        fuse(model, gates.acting)
        lean_norms(model)
    longest = max(len(item.input_ids) for item in [*encoded[0], *encoded[1]])
    packed = is_plain(objective) and attend_by_rows(model, longest)
    if processes.sharded:
        _cut(model, base.device.type)
    return Prepared(
        settings=settings,
        base=base,
        text=text,
        objective=objective,
        training=encoded[0],
        held_out=encoded[1],
        examples=len(training),
        data_digest=digest_of([example for example, _ in training]),
        portions=portions,
        model=model,
        gates=gates,
        packed=packed,
        copies=products.nbytes,
    )


def _check_targets(settings: TrainSettings) -> None:
    """Before a base is fetched, converted or loaded: that it has the layers, as far as its configuration tells.

    Raises:
        SettingsError: it does not.
    """
    source = parse_base(settings.base)
    check_targets(settings.target_modules, source)
    if source.kind in ("default", "gguf"):  # known by now; and a GGUF file's configuration takes seconds to read
        return
    with suppress(*UNREADABLE):  # what is wrong with the base itself is said where it is loaded
        targets(skeleton(config_alone(source), "float32"), settings.target_modules)


def objective_of(settings: TrainSettings, modes: ModeHost, base: LoadedBase, text: TextFormat) -> Objective:
    """What the mode optimises in this run.

    Raises:
        LoraRtError: the mode trains nothing, or refuses its options.
    """
    context = ObjectiveContext(
        register=settings.register,
        base=base.facts,
        seed=settings.seed,
        options=settings.options,
        prompt_ids=text.prompt_ids,
        answer_ids=text.answer_ids,
        turn_end=tuple(text.turn_end),
        scene_types=settings.scene_types,
    )
    objective = modes.objective(settings.mode, context)
    if objective is None:
        raise SettingsError(
            f"the mode {settings.mode!r} trains nothing",
            next_step="Use a mode with an objective; see: lora-rt plugins",
        )
    return objective


def examples_of(settings: TrainSettings, objective: Objective, base: LoadedBase) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples; without a held-out file, a tenth is drawn by the run's seed.

    Raises:
        LoraRtError: lines that can't be trained on, too few, or a mode that makes nothing of them.
    """
    examples = _encoded(settings, settings.data, objective, base)
    if settings.held_out is not None:
        return examples, _encoded(settings, settings.held_out, objective, base)
    training, held_out = draw_held_out(examples, settings.seed)
    for part in (training, held_out):
        _refuse_nothing(settings, settings.data, part)
    return training, held_out


def _warn_of_known(training: Sequence[Example], held_out: Sequence[Example]) -> None:
    """A loss of examples that are trained on as well falls whatever is learned."""
    known = {digest_of([example]) for example, _ in training}
    count = sum(digest_of([example]) in known for example, _ in held_out)
    if count:
        share = f"{count} of the {len(held_out)} held-out examples"
        _LOGGER.warning("%s are trained on as well: their loss says little of others", share)


def draw_held_out(examples: Sequence[T], seed: int) -> tuple[list[T], list[T]]:
    """The examples without, and those of, a tenth that is drawn by the seed; at least one is held out.

    Raises:
        SettingsError: there is only one.
    """
    if len(examples) < 2:
        raise SettingsError(
            "one example is too few to train and to hold out", next_step="Give more, or name a --held-out file"
        )
    order = random.Random(seed).sample(range(len(examples)), len(examples))
    aside = set(order[: max(1, round(len(examples) * 0.1))])
    return [e for i, e in enumerate(examples) if i not in aside], [examples[i] for i in sorted(aside)]


def _encoded(settings: TrainSettings, path: Path, objective: Objective, base: LoadedBase) -> list[Example]:
    """The examples of a file with their sequences.

    Raises:
        DataError: lines that can't be trained on, by their numbers in the file.
    """
    limit = context_of(base.model.config)
    examples: list[Example] = []
    problems: list[str] = []
    pairs = read_pairs(path, objective.fields, objective.check, chats=objective.chats)
    for place, example in zip(pairs.places, pairs, strict=True):
        sequences = objective.encode(example)
        examples.append((example, sequences))
        problems += [f"{place}: {problem}" for item in sequences for problem in _unfit(item, limit)]
    if problems:
        raise bad_lines(path, problems, f"Shorten or remove these lines (the mode {settings.mode!r} reads them)")
    _refuse_nothing(settings, path, examples)
    if len(kinds := {frozenset(item.extra) for _, sequences in examples for item in sequences}) > 1:
        text = f"the plugin of the mode {settings.mode!r} gives its sequences different extras: "
        text += " and ".join(sorted(", ".join(sorted(kind)) or "none" for kind in kinds))
        raise SettingsError(text, next_step="Report it to its author")
    return examples


def _unfit(item: Encoded, limit: int) -> list[str]:
    problems = []
    if len(item.input_ids) > limit:
        problems.append(f"{len(item.input_ids)} tokens, and the base reads {limit}")
    # A label stands at its own token, which is predicted from those before it: the first of all can't be.
    if all(label == IGNORE for label in item.labels[1:]):
        problems.append(
            f"no token after the first carries loss, and the first is never predicted ({len(item.input_ids)} in all)"
        )
    return problems


def _refuse_nothing(settings: TrainSettings, path: Path, examples: Sequence[Example]) -> None:
    if any(sequences for _, sequences in examples):
        return
    text = f"the plugin of the mode {settings.mode!r} makes no sequence of {len(examples)} examples of {path}"
    raise SettingsError(text, next_step="Give other data, or report it to its author")


def room_needed(prepared: Prepared) -> int:
    """Bytes of two checkpoints (one is whole before the other is removed) and of the finished adapter.

    A checkpoint holds the trained weights in float32, and the optimizer's two moments of each.
    """
    trained = sum(int(parameter.numel()) for parameter in prepared.model.parameters() if parameter.requires_grad)
    return trained * (2 * 3 * 4 + 2)


def nearest_folder(path: Path) -> Path:
    """The path, or the first folder above it that is there: what says how much room there is."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _cut(model: Any, device: str) -> None:
    """Let each process keep its part of the blocks' frozen weights; they are brought together block by block.

    What is trained stays whole everywhere: its gradients are added up as without (torch's `fully_shard`, FSDP2).
    """
    from torch.distributed import device_mesh, fsdp

    mesh = device_mesh.init_device_mesh(device, (joined().count,))
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for block in blocks_of(model.get_base_model()):
        # Said, since torch leaves the outermost module whole after a pass, and each block is one. An evaluation would
        # leave them whole, a checkpoint cut them again in the first process alone, and all wait for one another.
        fsdp.fully_shard(block, mesh=mesh, ignored_params=trained, reshard_after_forward=True)
