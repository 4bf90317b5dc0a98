"""What the Hub's client raises about a base, in our words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lora_rt.core.base.reading import first_line
from lora_rt.core.base.source import BaseError, BaseSource


def hub_name(source: BaseSource) -> str:
    """The repository as the user wrote it, with its revision where one was given."""
    return f"{source.text}@{source.revision}" if source.revision else source.text


@contextmanager
def explained(source: BaseSource) -> Iterator[None]:
    """Turn whatever goes wrong on the Hub within the block into a BaseError with a next step."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = hub_name(source)
    try:
        yield
    except GatedRepoError as error:
        raise BaseError(f"{name} is gated", next_step="Accept its terms on the Hub, then: hf auth login") from error
    except RevisionNotFoundError as error:
        text = f"{source.text} has no revision {source.revision!r}"
        raise BaseError(text, next_step="Leave the revision out, or look it up on the Hub") from error
    except RepositoryNotFoundError as error:
        text = f"there is no model {name} on the Hub, or it is private"
        raise BaseError(text, next_step="Check the spelling, or: hf auth login") from error
    except LocalEntryNotFoundError as error:
        text = f"{name} is not cached and the Hub can't be reached"
        raise BaseError(text, next_step="Check the network, or give --base a folder") from error
    except EntryNotFoundError as error:
        raise no_model(source) from error
    except (HfHubHTTPError, OSError) as error:
        raise BaseError(f"{name} can't be downloaded: {first_line(error)}", next_step="Try again") from error


def no_model(source: BaseSource) -> BaseError:
    """The error for a repository without a configuration."""
    text = f"{hub_name(source)} holds no transformers model (no config.json)"
    return BaseError(text, next_step="Give the id of a causal language model")
