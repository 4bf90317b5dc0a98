"""What the Hub's client raises about a base, in our words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

from lora_rt.core.base.source import BaseError, BaseSource
from lora_rt.registry.errors import HubError
from lora_rt.registry.hub.client import cause_of, in_words, session


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
        raise no_model(source)
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
        cause = cause_of(error)
        if isinstance(cause, LocalEntryNotFoundError):
            text = f"{name} is not cached and the Hub can't be reached"
            raise BaseError(text, next_step="Check the network, or give --base a folder") from error
        if isinstance(cause, EntryNotFoundError):
            raise no_model(source) from error
        found = in_words(error, source.text, source.revision)
        if found is None:
            raise
        text = found.message
        if type(error) is RepositoryNotFoundError:
            text = f"there is no model {name} on the Hub, or it is private"
        raise BaseError(text, next_step=found.next_step) from error


def no_model(source: BaseSource) -> BaseError:
    """The error for a repository without a configuration."""
    text = f"{hub_name(source)} holds no transformers model (no config.json)"
    return BaseError(text, next_step="Give the id of a causal language model")
