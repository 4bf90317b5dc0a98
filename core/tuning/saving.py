"""What a fit leaves behind: a named composition in the store, or adapters whose mode has learned."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save, save_file
from torch import Tensor

from lora_rt.core.requests.composition import Composition, Term
from lora_rt.core.step.adapter import described_state
from lora_rt.core.tuning.frozen import Frozen
from lora_rt.core.tuning.mixes import MixFit
from lora_rt.core.tuning.settings import TuneError
from lora_rt.core.tuning.weights import Tuned
from lora_rt.errors import LoraRtError
from lora_rt.registry import home
from lora_rt.registry.card import read_card, write_card
from lora_rt.registry.compositions import NamedComposition, NamedCompositions, NamedTerm
from lora_rt.registry.durable import storage_errors
from lora_rt.registry.errors import StoreError
from lora_rt.registry.files import STATE, sha256_bytes, weights_in
from lora_rt.registry.reference import Reference
from lora_rt.version import __version__


def composition_of(
    name: str, references: Mapping[str, str], frozen: Frozen, tuned: Tuned, **facts: Any
) -> NamedComposition:
    """A named composition of the tuned weights; `references` are those by which the resident names are found again."""
    terms = [
        NamedTerm(
            reference=references[resident],
            sha256=frozen.residents.infos[resident].sha256,
            weight=1.0 if len(weights) > 1 else weights[0],
            layers=tuple(weights) if len(weights) > 1 else (),
        )
        for resident, weights in tuned.weights.items()
    ]
    metrics = {"nll_before": round(tuned.loss_before, 4), "nll_after": round(tuned.loss_after, 4)}
    return NamedComposition(name=name, base=frozen.base.identity.id, terms=tuple(terms), metrics=metrics, **facts)


def mixture_of(
    name: str, references: Mapping[str, str], frozen: Frozen, start: Mapping[str, float], fit: MixFit, **facts: Any
) -> tuple[NamedComposition, bytes]:
    """A named composition with a mode, and the file of what its mode has learned."""
    content = save({key: value.detach().cpu().contiguous() for key, value in fit.state.items()})
    infos = frozen.residents.infos
    terms = [
        NamedTerm(reference=references[resident], sha256=infos[resident].sha256, weight=weight)
        for resident, weight in start.items()
    ]
    made = NamedComposition(
        name=name,
        base=frozen.base.identity.id,
        terms=tuple(terms),
        hidden_layers=fit.hidden_layers,
        scene_types=fit.scene_types,
        card=fit.card,
        state=sha256_bytes(content),
        **facts,
    )
    return made, content


def save_composition(compositions: NamedCompositions, made: NamedComposition, state: bytes = b"") -> None:
    """Keep a named composition in the store, `state` the file of what its mode has learned.

    Raises:
        StoreError: it can't be written there; the error has it, or says where it lies instead.
    """
    try:
        with storage_errors("the composition"):
            if state:
                compositions.save(made, state)
            else:
                compositions.save(made)
    except LoraRtError as error:
        text = f"the {'gates' if state else 'weights'} are found, but not saved: {error.message}"
        if not state:
            there = f"Put this line into {compositions.folder / f'{made.name}.json'}:"
            raise StoreError(text, next_step=there, problems=[made.model_dump_json()]) from error
        folder = put_aside(lambda folder: NamedCompositions(folder).save(made, state))
        there = f"Nothing is lost: make room, then copy the files in {folder} to {compositions.folder}"
        raise StoreError(text, next_step=there) from error


def put_aside(write: Callable[[Path], None]) -> Path:
    """A new folder in which a fit of hours is written: below the home, else where the system has its temporary files.

    Raises:
        StorageError: there is no room in either.
    """
    try:
        return _new_folder(home.checkpoints(), write)
    except LoraRtError:
        return _new_folder(None, write)


def _new_folder(root: Path | None, write: Callable[[Path], None]) -> Path:
    with storage_errors("what was fitted"):
        if root is not None:
            root.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="fitted-", dir=root))
        try:
            write(folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return folder


def sources_of(frozen: Frozen, references: Mapping[str, str], weights: Mapping[str, float]) -> dict[str, Path]:
    """Where the files of adapters lie that gates are fitted to, by resident name: they are published with the gates.

    Asked before a fit and after it. Files may be replaced while it runs; and the adapter that a named composition was
    tuned for may be behind another one that has its name by now, in whose place the fitted one would go.

    Args:
        frozen: holds them in memory.
        references: those by which the resident names are found again.
        weights: the start, by resident name.

    Raises:
        TuneError: references that lead to other files than those in memory, or to none; all of them are named.
    """
    sources: dict[str, Path] = {}
    problems: list[str] = []
    for name, reference in references.items():
        loaded = frozen.residents.infos[name].sha256
        try:
            found = frozen.registry.resolve(reference, frozen.base.identity)
        except LoraRtError as error:
            problems.append("; ".join([f"{name}: {error.message}", *error.problems]))
            continue
        sources[name] = found.folder
        if found.sha256 != loaded:
            problems.append(f"{name}: {found.sha256[:12]} is there now ({found.source}), and {loaded[:12]} was loaded")
    if problems:
        there = Composition(tuple(Term(Reference.parse(references[name]), weight) for name, weight in weights.items()))
        text = "gates belong to the files that they are fitted to, and the composition leads to other ones now"
        step = f"Bring back what was there, or fit what is there now: lora-rt tune {there} --per scene ..."
        raise TuneError(f"{text}; nothing is published", next_step=step, problems=problems)
    return sources


def write_fitted(source: Path, target: Path, state: Mapping[str, Tensor], metrics: Mapping[str, float]) -> None:
    """Copy an adapter into an empty folder with another state and further metrics in its card."""
    for name in weights_in(source):
        shutil.copyfile(source / name, target / name)
    kept = load_file(source / STATE)
    fitted = {key: value.detach().cpu().to(kept[key].dtype).contiguous() for key, value in state.items()}
    save_file({**kept, **fitted}, target / STATE)
    card = read_card(source)
    assert card is not None  # an adapter without a card has no mode with a state
    changes = {"metrics": {**card.metrics, **metrics}, "state": described_state(target), "lora_rt": __version__}
    write_card(target, card.model_copy(update=changes))
