"""What the registry refuses, by kind. All of them are explained: see `lora_rt.errors.LoraRtError`."""

from __future__ import annotations

from lora_rt.errors import LoraRtError, UsageError


class InvalidReferenceError(UsageError):
    """A text that is neither a name, nor a repository, nor a path."""


class UnknownAdapterError(LoraRtError):
    """A reference that leads nowhere: no such name, folder, repository or revision."""


class WrongBaseError(LoraRtError):
    """The name exists, but not for the base in use."""


class RejectedAdapterError(LoraRtError):
    """The files are not an adapter that may be loaded; `problems` names everything that is wrong."""


class ChangedAdapterError(LoraRtError):
    """Files are not what was pinned: a byte, a file or a tag changed."""


class StoreError(LoraRtError):
    """The store can not do what was asked."""


class ProjectError(LoraRtError):
    """`lora-rt.toml` or `lora-rt.lock` can not be used as it is."""


class HubError(LoraRtError):
    """The Hub did not give what was asked: not found, no access, no network, or an answer that can not be trusted."""


class OccupiedFolderError(LoraRtError):
    """A folder that is to be made anew is there and holds something."""


class StorageError(LoraRtError):
    """A file could not be written: no room, no right, a disk that failed."""
