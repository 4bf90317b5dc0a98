"""Named compositions: `mixes/<name>.json` in the store. Each resolves, in a composition, like an adapter.

A mix pins the adapters that its weights were found for by their digests: weights for other bytes mean nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_rt.registry import durable, strict_json
from lora_rt.registry.card import Digest, Finite, Text
from lora_rt.registry.errors import StoreError
from lora_rt.registry.files import MEGABYTE, UnusableFileError, open_plain, sha256_bytes
from lora_rt.registry.reference import is_name


class NamedTerm(BaseModel):
    """One adapter of a mix. Where `layers` is given, its weight is `weight` times that of each layer."""

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

    def __str__(self) -> str:
        """Its terms as people write them; of weights per layer the mean."""
        return " ".join(f"{term.reference}:{term.mean_weight:.4g}" for term in self.terms)


class NamedCompositions:
    """The named compositions of one store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, name: str) -> NamedComposition | None:
        """The mix of a name, or None.

        Raises:
            StoreError: its file is damaged.
        """
        if not is_name(name):
            return None
        try:
            with open_plain(self.folder / f"{name}.json", MEGABYTE) as (file, _):
                # A file that was copied by hand is a composition of its new name.
                return NamedComposition.model_validate(strict_json.loads(file.read())).model_copy(update={"name": name})
        except FileNotFoundError:
            return None
        except (UnusableFileError, strict_json.InvalidJsonError, ValidationError) as error:
            text = f"the composition {name!r} in the store is damaged"
            raise StoreError(text, next_step=f"lora-rt rm {name}, and tune it again") from error

    def names(self) -> list[str]:
        """The names of all mixes, readable or not, sorted."""
        return sorted(path.stem for path in self.folder.glob("*.json") if is_name(path.stem))

    def save(self, mix: NamedComposition) -> None:
        """Write a mix, whole or not at all; one of the same name is replaced.

        Raises:
            StoreError: the name is none.
        """
        if not is_name(mix.name):
            text = f"{mix.name!r} is not a name that a composition can have"
            raise StoreError(text, next_step="Use letters, digits, '.', '_' and '-'")
        self.folder.mkdir(parents=True, exist_ok=True)
        durable.write_text(self.folder / f"{mix.name}.json", json.dumps(mix.model_dump(), indent=2) + "\n")

    def remove(self, name: str) -> bool:
        """Remove a mix; whether there was one."""
        path = self.folder / f"{name}.json"
        found = is_name(name) and path.exists()
        if found:
            path.unlink()
        return found
