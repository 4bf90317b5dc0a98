"""What the Hub's client raises about a base, in our words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

from lora_rt.core.base.source import BaseError, BaseSource
from lora_rt.registry.errors import HubError
from lora_rt.registry.hub.client import Row, in_words, session


def hub_name(source: BaseSource) -> str:
    """The repository as the user wrote it, with its revision where one was given."""
    return f"{source.text}@{source.revision}" if source.revision else source.text


def fetch_config(source: BaseSource) -> Path:
    """The folder of the Hub's cache that holds the repository's config.json."""
    with explained(source):
        return Path(hf_hub_download(source.text, "config.json", revision=source.revision)).parent


def fetch(source: BaseSource) -> Path:
    """The repository's snapshot in the Hub's own cache; its progress bars and its tokens are the Hub client's.

    Raises:
        BaseError: it can't be fetched, or is no model.
    """
    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    with explained(source):
        folder = Path(snapshot_download(source.text, revision=source.revision, allow_patterns=wanted))
        if not (folder / "config.json").is_file():
            raise EntryNotFoundError("config.json")
    return folder


@contextmanager
def explained(source: BaseSource) -> Iterator[None]:
    """Limit what the Hub may take within the block, and turn whatever goes wrong into a BaseError with a next step."""
    name = hub_name(source)
    try:
        with session():
            yield
    except HubError as error:
        raise BaseError(f"{name} can't be downloaded: {error.message}", next_step=error.next_step) from error
    except Exception as error:
        network, log_in = "Check the network, or give --base a folder", "Check the name, or log in with: hf auth login"
        no_model = f"{name} holds no transformers model (no config.json)"
        own: list[Row] = [
            (LocalEntryNotFoundError, f"{name} is not cached and the Hub can't be reached", network),
            (EntryNotFoundError, no_model, "Give the id of a causal language model"),
            (RepositoryNotFoundError, f"there is no model {name} on the Hub, or it is private", log_in),
        ]
        found = in_words(error, source.text, source.revision, own)
        if found is None:
            raise
        raise BaseError(found.message, next_step=found.next_step) from error
