"""One session with the Hub: guarded against answers that can not be trusted, with errors made for people."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, cast

from lora_rt.registry.errors import HubError
from lora_rt.registry.files import LIMITS, MEGABYTE
from lora_rt.registry.strict_json import shown

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub import HfApi

MAX_BODY = max(LIMITS.values())
MAX_ANSWER = 64 * MEGABYTE
MAX_ANSWERS = 50

_ANSWERS: ContextVar[list[int] | None] = ContextVar("answers", default=None)

_HEX = re.compile(r'(W/)?"?[0-9a-fA-F]{40,64}"?')
_COMMIT = re.compile(r"[0-9a-f]{40}")


def api() -> HfApi:
    """The Hub's client, with the token of its usual places, over the guarded session."""
    from huggingface_hub import HfApi

    from lora_rt.version import __version__

    _guard()
    return HfApi(library_name="lora-rt", library_version=__version__)


def asks_nobody() -> bool:
    """Whether the environment forbids requests (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.is_offline_mode())


def _guard() -> None:
    """Make every session that the client opens check what comes back. A factory that an application set is kept.

    There is no public way to read the factory in use, and wrapping single sessions is not enough: the client opens a
    new one after a lost connection.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    factory = _http._GLOBAL_CLIENT_FACTORY
    if getattr(factory, "func", None) is not _guarded_client:
        set_client_factory(functools.partial(_guarded_client, factory))


def _guarded_client(factory: Callable[[], httpx2.Client]) -> httpx2.Client:
    client = factory()
    hooks = client.event_hooks
    hooks["response"] = [_check_answer, *hooks.get("response", [])]
    client.event_hooks = hooks
    return client


def _check_answer(response: httpx2.Response) -> None:
    """Refuse headers that would become paths in the client's cache, and bound the body."""
    asked = _ANSWERS.get()
    if asked is not None:
        asked.append(response.status_code)
        if len(asked) > MAX_ANSWERS:
            raise _untrusted(response, f"more than {MAX_ANSWERS} pages and redirects")
    headers = response.headers
    commit = headers.get("x-repo-commit")
    if commit is not None:
        if not _COMMIT.fullmatch(commit):
            raise _untrusted(response, f"the commit {shown(commit)}, which is not 40 hexadecimal digits")
        tag = headers.get("x-linked-etag") or headers.get("etag")
        if tag is not None and not _HEX.fullmatch(tag):
            raise _untrusted(response, f"the ETag {shown(tag)}, which is not hexadecimal")
    target = headers.get("location", "")
    if response.url.scheme == "https" and target.startswith("http:"):
        raise _untrusted(response, f"a redirect to {shown(target)}, which is not encrypted")
    limit = MAX_ANSWER if response.url.path.startswith("/api/") else MAX_BODY
    response.stream = _bounded(response, limit)


def _bounded(response: httpx2.Response, limit: int) -> httpx2.SyncByteStream:
    import httpx2

    inner = cast("httpx2.SyncByteStream", response.stream)

    class Bounded(httpx2.SyncByteStream):
        """The same body, given up once it is longer than anything that is read."""

        def __iter__(self) -> Iterator[bytes]:
            seen = 0
            for chunk in inner:
                seen += len(chunk)
                if seen > limit:
                    raise _untrusted(response, f"more than {limit:,} bytes")
                yield chunk

        def close(self) -> None:
            inner.close()

    return Bounded()


def _untrusted(response: httpx2.Response, what: str) -> HubError:
    return HubError(
        f"{response.url.host} answered with {what}",
        next_step="Nothing was installed; check HF_ENDPOINT and the network",
    )


@contextmanager
def explained(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turn what the client raises into one line and the next step."""
    import httpx2
    from huggingface_hub import errors

    at = f"{repo}@{revision}" if revision else repo
    answers = _ANSWERS.set([])
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(
            f"{repo} is gated: its owner has to let you in", next_step=f"Ask at {_page(repo)}, then hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"{repo} has no revision {revision!r}", next_step=f"See {_page(repo)}/tree/main") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"the Hub has no {repo}, or it is private and you are not logged in",
            next_step="Check the name, or log in with: hf auth login",
        ) from error
    except errors.LocalTokenNotFoundError as error:
        raise HubError("this needs a Hub token, and there is none", next_step="hf auth login") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise HubError(
            f"{at} is not on this machine, and the Hub is not asked or can not be reached",
            next_step=f"Go online (unset HF_HUB_OFFLINE, leave out --offline) and type: lora-rt pull {at}",
        ) from error
    except errors.HfHubHTTPError as error:
        raise _http_error(repo, error.response.status_code if error.response is not None else 0, str(error)) from error
    except errors.HFValidationError as error:
        raise HubError(f"{at} is not a repository: {str(error)[:200]}", next_step="Write org/repo") from error
    except (httpx2.HTTPError, errors.FileMetadataError) as error:
        raise HubError(
            f"the Hub could not be reached for {at}: {str(error)[:200] or type(error).__name__}",
            next_step="Check the network and HF_ENDPOINT, then try again",
        ) from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        # The client takes the shape of an answer for granted; a body that is no JSON or lacks a field ends here.
        raise HubError(
            f"the Hub's answer about {at} can not be understood: {type(error).__name__} {str(error)[:120]}",
            next_step="Check HF_ENDPOINT, then try again",
        ) from error
    finally:
        _ANSWERS.reset(answers)


def _http_error(repo: str, status: int, text: str) -> HubError:
    if status in (401, 403):
        return HubError(f"the Hub does not let you do that with {repo} ({status})", next_step="hf auth login")
    detail = " ".join(text.split())[:200]
    return HubError(f"the Hub failed on {repo}: {detail}", next_step="Try again later")


def _page(repo: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}"
