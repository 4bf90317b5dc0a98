"""Named compositions: `mixes/<name>.json` in the store. Each resolves, in a composition, like an adapter.

A composition pins the adapters that its weights were found for by their digests: weights for other bytes mean nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_rt.registry import durable, strict_json
from lora_rt.registry.errors import StoreError
from lora_rt.registry.files import MEGABYTE, UnusableFileError, open_plain, sha256_bytes
from lora_rt.registry.models import Digest, Finite, Text, problems_of
from lora_rt.registry.reference import check_name, is_name


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

    @property
    def sha256(self) -> str:
        """The digest of what it does: its base, and its terms in their order with their weights."""
        facts = {"base": self.base, "terms": [term.model_dump(mode="json") for term in self.terms]}
        return sha256_bytes(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode())

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        return self.model_dump(mode="json")

    def __str__(self) -> str:
        """Its terms as people write them; of weights per layer the mean."""
        return " ".join(f"{term.reference}:{term.mean_weight:.4g}" for term in self.terms)


class NamedCompositions:
    """The named compositions of one store, and those that the lock of a project brings for its own folder."""

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
        return self.own(name) or next((item for item in self._locked() if item.name == name), None)

    def own(self, name: str) -> NamedComposition | None:
        """The store's composition of this name, or None.

        Raises:
            StoreError: its file is damaged.
        """
        path = self.folder / f"{name}.json"
        try:
            with open_plain(path, MEGABYTE) as (file, _):
                # A file that was copied by hand is a composition of its new name.
                return NamedComposition.model_validate(strict_json.loads(file.read())).model_copy(update={"name": name})
        except FileNotFoundError:
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

    def names(self) -> list[str]:
        """The names of all compositions, readable or not, sorted."""
        return sorted({*self.own_names(), *(item.name for item in self._locked())})

    def own_names(self) -> list[str]:
        """Those of the store."""
        return sorted(path.stem for path in self.folder.glob("*.json") if is_name(path.stem))

    def save(self, composition: NamedComposition) -> None:
        """Write a composition into the store, whole or not at all; one of the same name is replaced.

        Raises:
            InvalidReferenceError: that is not a name.
        """
        check_name(composition.name, "a composition")
        self.folder.mkdir(parents=True, exist_ok=True)
        document = json.dumps(composition.model_dump(), indent=2)
        durable.write_text(self.folder / f"{composition.name}.json", document + "\n")

    def remove(self, name: str) -> bool:
        """Remove a composition from the store; whether there was one."""
        path = self.folder / f"{name}.json"
        found = is_name(name) and os.path.lexists(path)
        if found:
            path.unlink()
        return found
