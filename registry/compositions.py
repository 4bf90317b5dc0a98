"""Named compositions: `mixes/<name>.json` in the store. Each resolves, in a composition, like an adapter.

A composition pins the adapters that its weights were found for by their digests: weights for other bytes mean nothing.
Where it has a mode, which decides for its adapters at inference, the mode's tensors lie beside it in
`mixes/<name>.safetensors`, pinned by their digest (or in `<name>.new.safetensors`, where a save was cut off). A package
ships one as a folder of `composition.json` and `mode.safetensors` (entry-point group `lora_rt.compositions`). The lock
of a project has the tensors in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, ValidationError

from lora_rt.registry import durable, strict_json
from lora_rt.registry.errors import StoreError
from lora_rt.registry.files import LIMITS, MEGABYTE, STATE, UnusableFileError, open_plain, sha256_bytes
from lora_rt.registry.models import Digest, Finite, Text, problems_of
from lora_rt.registry.reference import check_name, is_name
from lora_rt.registry.shipped import COMPOSITION, Shipped, shipped_compositions


class NamedTerm(BaseModel):
    """One adapter of a composition. Where `layers` is given, its weight is `weight` times that of each layer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    reference: Text
    sha256: Digest = ""
    weight: Finite = 1.0
    layers: tuple[Finite, ...] = ()

    @property
    def mean_weight(self) -> float:
        """Its weight, averaged over the layers where it differs between them."""
        return self.weight * (sum(self.layers) / len(self.layers) if self.layers else 1.0)


class NamedComposition(BaseModel):
    """A named composition and what it was tuned on."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: Text
    base: Text
    terms: tuple[NamedTerm, ...] = Field(min_length=1)
    data_sha256: Digest = ""
    seed: int | None = None
    metrics: dict[Text, Finite] = Field(default_factory=dict)
    mode: str = Field(default="", max_length=64)
    hidden_layers: int | None = Field(default=None, ge=0)
    scene_types: tuple[Text, ...] = ()
    card: dict[Text, Any] = Field(default_factory=dict)
    state: Digest = ""
    tensors: Base64Bytes = Field(default=b"", exclude=True, repr=False)  # of its mode, where a lock brought it

    @property
    def sha256(self) -> str:
        """The digest of what it does: base, terms in their order with their weights, and its mode with its state."""
        facts: dict[str, Any] = {"base": self.base, "terms": [term.model_dump(mode="json") for term in self.terms]}
        if self.mode:
            facts |= self.model_dump(mode="json", include=set(OF_A_MODE))
        return sha256_bytes(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode())

    @property
    def layered(self) -> bool:
        """Whether a term has a weight per layer."""
        return any(term.layers for term in self.terms)

    def document(self) -> dict[str, Any]:
        """The JSON form; without a mode, without what a mode would have."""
        return self.model_dump(mode="json", exclude=set() if self.mode else set(OF_A_MODE))

    @property
    def mode_card(self) -> dict[str, Any]:
        """What the hooks of its mode see as its card."""
        weights = [term.weight for term in self.terms]
        return {**self.card, "weights": weights, "scene_types": self.scene_types, "hidden_layers": self.hidden_layers}

    def __str__(self) -> str:
        """Its terms as people write them; of weights per layer the mean."""
        return " ".join(f"{term.reference}:{term.mean_weight:.4g}" for term in self.terms)


_TENSORS, _NEW = ".safetensors", ".new.safetensors"
OF_A_MODE = ("mode", "hidden_layers", "scene_types", "card", "state")
"""Fields that mean nothing without a mode."""


class NamedCompositions:
    """The named compositions of one store, those that the lock of a project brings, and those that packages ship."""

    def __init__(
        self,
        folder: Path,
        locked: Callable[[], Sequence[NamedComposition]] = tuple,
        used: Callable[[NamedComposition], None] = lambda composition: None,
    ) -> None:
        """
        Args:
            folder: where the store keeps them.
            locked: those of the project; asked for at every question.
            used: called with the one that is used where the project has one of its name.
        """
        self.folder = folder
        self._locked = locked
        self._used = used

    def get(self, name: str) -> NamedComposition | None:
        """The composition that a name means here, for whoever uses it; or None.

        Raises:
            StoreError: its file is damaged.
        """
        found = self.look_up(name)
        if found is not None and any(item.name == name for item in self._locked()):
            self._used(found)
        return found

    def look_up(self, name: str) -> NamedComposition | None:
        """The same for whoever lists what there is."""
        if not is_name(name):
            return None
        found = self.own(name) or next((item for item in self._locked() if item.name == name), None)
        return found or next((_read(folder / COMPOSITION, name) for folder in self._shipped(name)), None)

    def source(self, name: str) -> str:
        """Where the composition of a name comes from, for people."""
        if name in self.own_names() or any(item.name == name for item in self._locked()):
            return "tuned here"
        return next((f"shipped with {item.package}" for item in self._packaged if item.name == name), "")

    def state(self, composition: NamedComposition) -> bytes:
        """The file of the tensors of its mode, a safetensors file.

        Raises:
            StoreError: it is not there, or it is not the one that was fitted.
        """
        if composition.tensors and sha256_bytes(composition.tensors) == composition.state:
            return composition.tensors
        places = [self.folder / f"{composition.name}{end}" for end in (_TENSORS, _NEW)]
        places += [folder / STATE for folder in self._shipped(composition.name)]
        problems = []
        for path in places:
            try:
                with open_plain(path, LIMITS[STATE]) as (file, _):
                    content = file.read()
            except (FileNotFoundError, NotADirectoryError):
                problems.append(f"{path} is not there")
            except UnusableFileError as error:
                problems.append(f"{path} {error}")
            else:
                if sha256_bytes(content) == composition.state:
                    return content
                problems.append(f"{path} has other bytes")
        raise StoreError(
            f"the composition {composition.name!r} lacks the tensors of its mode {composition.mode!r}",
            next_step="Tune it again with: lora-rt tune",
            problems=problems,
        )

    def own(self, name: str) -> NamedComposition | None:
        """The store's composition of this name, or None.

        Raises:
            StoreError: its file is damaged.
        """
        return _read(self.folder / f"{name}.json", name)

    def names(self) -> list[str]:
        """The names of all compositions, readable or not, sorted."""
        packaged = (item.name for item in self._packaged)
        return sorted({*self.own_names(), *(item.name for item in self._locked()), *packaged})

    def own_names(self) -> list[str]:
        """Those of the store."""
        return sorted(path.stem for path in self.folder.glob("*.json") if is_name(path.stem))

    def with_adapter(self, name: str) -> list[str]:
        """The store's compositions that an adapter's name is a term of; damaged ones are left out."""
        found = []
        for own in self.own_names():
            with suppress(StoreError):
                composition = self.own(own)
                if composition is not None and any(t.reference.partition("@")[0] == name for t in composition.terms):
                    found.append(own)
        return found

    def save(self, composition: NamedComposition, state: bytes = b"") -> None:
        """Write a composition into the store, whole or not at all; one of the same name is replaced.

        Args:
            composition: what is kept.
            state: the file of its mode's tensors, where it has a mode; `composition.state` is its digest.

        Raises:
            InvalidReferenceError: that is not a name.
        """
        check_name(composition.name, "a composition")
        self.folder.mkdir(parents=True, exist_ok=True)
        new = self.folder / f"{composition.name}{_NEW}"
        if state:
            # Beside those of the one that is there: until the document is replaced, that one is whole.
            durable.write_bytes(new, state)
        document = json.dumps(composition.document(), indent=2)
        durable.write_text(self.folder / f"{composition.name}.json", document + "\n")
        if state:
            new.replace(self.folder / f"{composition.name}{_TENSORS}")

    def remove(self, name: str) -> bool:
        """Remove a composition from the store; whether there was one."""
        path = self.folder / f"{name}.json"
        found = is_name(name) and os.path.lexists(path)
        if found:
            path.unlink()
            for end in (_TENSORS, _NEW):
                (self.folder / f"{name}{end}").unlink(missing_ok=True)
        return found

    @cached_property
    def _packaged(self) -> list[Shipped]:
        return [item for item in shipped_compositions() if item.folder is not None]

    def _shipped(self, name: str) -> list[Path]:
        return [item.folder for item in self._packaged if item.name == name and item.folder is not None]


def _read(path: Path, name: str) -> NamedComposition | None:
    """The composition of a file, or None where there is none.

    Raises:
        StoreError: it is damaged.
    """
    try:
        with open_plain(path, MEGABYTE) as (file, _):
            # A file that was copied by hand is a composition of its new name.
            return NamedComposition.model_validate(strict_json.loads(file.read())).model_copy(update={"name": name})
    except (FileNotFoundError, NotADirectoryError):  # the latter where the home is a file, which others say
        return None
    except (UnusableFileError, strict_json.InvalidJsonError) as error:
        problem = str(error)
    except ValidationError as error:
        problem = f"is not a composition: {problems_of(error)[0]}"
    raise StoreError(
        f"the composition {name!r} in the store is damaged",
        next_step=f"Run lora-rt rm {name}, and tune it again",
        problems=[f"{path} {problem}"],
    )
