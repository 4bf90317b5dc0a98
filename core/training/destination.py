"""Where a trained adapter goes, and whether it can go there. Knows no torch: it is asked before torch is imported."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from lora_rt.registry.durable import check_new_folder, new_folder
from lora_rt.registry.registry import Registry


@dataclass(frozen=True, slots=True)
class Destination:
    """The registry's store under a name, or a folder that is new or empty."""

    registry: Registry
    name: str
    out: Path | None = None
    source: str = "trained here"

    @property
    def place(self) -> Path:
        """The folder whose disk takes the adapter."""
        return self.registry.store.root if self.out is None else self.out

    def check(self) -> None:
        """Raise what publishing would raise of the place.

        Raises:
            StoreError: the name is none, a composition's, differs only by case from another, or the store can't be
                written.
            OccupiedFolderError: the folder is there and holds something, or can't be made.
        """
        if self.out is None:
            self.registry.store.check_free(self.name, self.source)
            self.registry.check_adapter_name(self.name)
        else:
            check_new_folder(self.out)

    def publish(self, finished: Path) -> tuple[Path, str]:
        """Copy a finished adapter to its place; where its files are then, and the place as the user calls it."""
        if self.out is not None:
            with new_folder(self.out) as scratch:
                shutil.copytree(finished, scratch, dirs_exist_ok=True)
            return self.out, str(self.out)
        store = self.registry.store
        with store.staging() as staged:
            shutil.copytree(finished, staged, dirs_exist_ok=True)
            found = store.publish(staged, self.name, source=self.source, revision=None)
        return found.folder, found.name
