"""huggingface_hub, with the httpx2 and tqdm that it stands on, imported when one of these names is asked for.

That takes half a second, which help, lists, refusals and what is installed already do not need. So write
`library.HfApi` where it is used: `from ...library import HfApi` at the top of a module would import it there.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lora_rt.registry.errors import HubError

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub import (
        CommitOperationAdd,
        EvalResult,
        HfApi,
        ModelCardData,
        constants,
        errors,
        get_token,
        hf_hub_download,
        try_to_load_from_cache,
        utils,
    )
    from huggingface_hub.hf_api import RepoFile
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

__all__ = [
    "CommitOperationAdd",
    "EvalResult",
    "HfApi",
    "ModelCardData",
    "RepoFile",
    "check_settings",
    "constants",
    "errors",
    "get_token",
    "hf_hub_download",
    "httpx2",
    "seconds",
    "tqdm",
    "try_to_load_from_cache",
    "utils",
]

_PLACES = {
    "RepoFile": "huggingface_hub.hf_api:RepoFile",
    "constants": "huggingface_hub.constants",
    "errors": "huggingface_hub.errors",
    "httpx2": "httpx2",
    "tqdm": "tqdm.auto:tqdm",
    "utils": "huggingface_hub.utils",
}
SETTINGS = ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT")
"""Whole numbers of seconds, which huggingface_hub reads when it is imported."""


def seconds(name: str) -> int | None:
    """A setting of the environment; None where it is not a whole number of seconds."""
    try:
        found = int(os.environ.get(name, "0"))
    except ValueError:
        return None
    return found if found >= 0 else None


def check_settings() -> None:
    """Before huggingface_hub is imported, which no setting that it can't read lets happen.

    Raises:
        HubError: naming all that can't be read.
    """
    wrong = [name for name in SETTINGS if seconds(name) is None]
    if wrong:
        told = " and ".join(f"{name} is {os.environ[name][:40]!r}" for name in wrong)
        text = f"{told}; it must be a whole number of seconds"
        raise HubError(text, next_step=f"Correct it, or: unset {' '.join(wrong)}")


if not TYPE_CHECKING:  # with which any name would be there for a type checker

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        check_settings()
        module, _, part = _PLACES.get(name, f"huggingface_hub:{name}").partition(":")
        found = import_module(module)
        return getattr(found, part) if part else found
