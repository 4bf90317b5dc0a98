"""One session with the Hub: guarded against answers that can not be trusted, with errors made for people."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import cast

from lora_rt.registry.errors import HubError
from lora_rt.registry.files import LIMITS, MEGABYTE
from lora_rt.registry.hub import internals, library, limits
from lora_rt.registry.strict_json import shown
from lora_rt.version import __version__

MAX_BODY = max(LIMITS.values())
MAX_ANSWER = 64 * MEGABYTE
MAX_ANSWERS = 50

_ANSWERS: ContextVar[list[int] | None] = ContextVar("answers", default=None)

_HEX = re.compile(r'(W/)?"?[0-9a-fA-F]{40,64}"?')
_COMMIT = re.compile(r"[0-9a-f]{40}")
Row = tuple[type[BaseException] | tuple[type[BaseException], ...], str, str]
"""Exceptions of the Hub's client, what they mean, and the next step."""


def api() -> library.HfApi:
    """The Hub's client, with the token of its usual places; to be used within `explained` or `session`."""
    return library.HfApi(library_name="lora-rt", library_version=__version__)


def asks_nobody() -> bool:
    """Whether the environment forbids requests (HF_HUB_OFFLINE).

    Raises:
        HubError: the environment has settings of the client that it can't read.
    """
    return bool(library.constants.is_offline_mode())


def _prepare(client: library.httpx2.Client) -> None:
    """Limit what the client waits for, and check what comes back before the Hub's library sees it."""
    hooks = client.event_hooks
    hooks["request"] = [*hooks.get("request", []), limits.on_request]
    hooks["response"] = [limits.on_response, _check_answer, *hooks.get("response", [])]
    client.event_hooks = hooks


@contextmanager
def session() -> Iterator[None]:
    """Within the block, requests of the Hub's library are guarded and limited. What an application set up stays.

    Raises:
        HubError: the environment has settings of the client that it can't read.
    """
    limits.forget()
    with internals.own_client(_prepare):
        yield


def _check_answer(response: library.httpx2.Response) -> None:
    """Refuse headers that would become paths in the client's cache; bound the answers about an adapter."""
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
    if asked is not None:
        limit = MAX_ANSWER if response.url.path.startswith("/api/") else MAX_BODY
        response.stream = _bounded(response, limit)


def _bounded(response: library.httpx2.Response, limit: int) -> library.httpx2.SyncByteStream:
    inner = cast("library.httpx2.SyncByteStream", response.stream)

    class Bounded(library.httpx2.SyncByteStream):
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


def _untrusted(response: library.httpx2.Response, what: str) -> HubError:
    return HubError(
        f"{response.url.host} answered with {what}",
        next_step="Nothing was installed; check HF_ENDPOINT and the network",
    )


@contextmanager
def explained(repo: str, revision: str | None = None) -> Iterator[None]:
    """A `session` in which whatever the client raises becomes one line and the next step.

    Raises:
        HubError: instead of the client's exceptions.
    """
    answers = _ANSWERS.set([])
    try:
        with session():
            yield
    except Exception as error:
        found = in_words(error, repo, revision)
        if found is None:
            raise
        raise found from error
    finally:
        _ANSWERS.reset(answers)


def in_words(error: BaseException, repo: str, revision: str | None = None, own: Sequence[Row] = ()) -> HubError | None:
    """What an exception of the Hub's client means; None where it is none of them. A caller's rows go before ours."""
    errors, httpx2 = library.errors, library.httpx2
    at = f"{repo}@{revision}" if revision else repo
    error = _cause_of(error)
    if isinstance(error, internals.NoClientError) and error.__cause__ is not None:
        return _no_client(error.__cause__)
    if _is_about_the_token(error):
        text = "the Hub token holds a character that none can have"
        return HubError(text, next_step="Correct HF_TOKEN, or: hf auth login")
    status = (
        error.response.status_code if isinstance(error, errors.HfHubHTTPError) and error.response is not None else 0
    )
    detail = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
    # The first row that fits counts: the client's exceptions are each other's subclasses.
    table: list[Row] = [
        (
            errors.GatedRepoError,
            f"{repo} is gated: its owner has to let you in",
            f"Ask at {_page(repo)}, then hf auth login",
        ),
        (errors.RevisionNotFoundError, f"{repo} has no revision {revision!r}", f"See {_page(repo)}/tree/main"),
        *own,
        (
            errors.RepositoryNotFoundError,
            f"the Hub has no {repo}, or it is private and you are not logged in",
            "Check the name, or log in with: hf auth login",
        ),
        (errors.LocalTokenNotFoundError, "this needs a Hub token, and there is none", "hf auth login"),
        (
            (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError),
            f"{at} is not on this machine, and the Hub is not asked or can not be reached",
            f"Go online (unset HF_HUB_OFFLINE, leave out --offline) and type: lora-rt pull {at}",
        ),
        (errors.HFValidationError, f"{at} is not a repository: {detail}", "Write org/repo"),
        (
            errors.HfHubHTTPError,
            f"the Hub does not let you do that with {repo} ({status})"
            if status in (401, 403)
            else f"the Hub failed on {repo}: {detail}",
            "hf auth login" if status in (401, 403) else "Try again later",
        ),
        (
            (httpx2.HTTPError, httpx2.InvalidURL, errors.FileMetadataError, ConnectionError, TimeoutError),
            f"the Hub could not be reached for {at}: {detail}",
            limits.NEXT_STEP,
        ),
        (
            # The client takes the shape of an answer for granted; a body that is not JSON or lacks a field ends here.
            (KeyError, TypeError, AttributeError, ValueError),
            f"the Hub's answer about {at} can not be understood: {type(error).__name__} {detail[:120]}",
            "Check HF_ENDPOINT, then try again",
        ),
        # Xet's transfers raise what Rust gives: no file, no number. A full disk or a missing permission has both.
        (RuntimeError, f"the transfer with {repo} failed: {detail}", "Try again"),
    ]
    if isinstance(error, OSError) and error.errno is None and error.filename is None:
        table.append((OSError, f"the transfer with {repo} failed: {detail}", "Try again"))
    return next((HubError(text, next_step=todo) for kind, text, todo in table if isinstance(error, kind)), None)


def _cause_of(error: BaseException) -> BaseException:
    """What the Hub answered in place of a file's facts; the client then says that the file is not cached."""
    errors = library.errors
    answer = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else None
    return answer if isinstance(answer, errors.HfHubHTTPError | errors.FileMetadataError) else error


def _no_client(error: BaseException) -> HubError:
    """Why no client could be made: what the environment says of proxies and certificates."""
    detail = " ".join(str(error).split())[:200].rstrip(".")
    if isinstance(error, ImportError) and "socks" in detail.lower():
        text = "the environment names a SOCKS proxy, and the package that speaks to one is missing"
        return HubError(text, next_step="pip install socksio, or unset ALL_PROXY, HTTPS_PROXY and HTTP_PROXY")
    if isinstance(error, OSError):  # ssl.SSLError is one, too
        named = next((name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)), "")
        of = f"{named}={os.environ[named]}" if named else "this machine"
        text = f"the certificates of {of} can not be read: {error.strerror or detail}"
        return HubError(text, next_step="Correct or unset SSL_CERT_FILE and SSL_CERT_DIR")
    if isinstance(error, ValueError | library.httpx2.InvalidURL):
        text = f"a proxy that the environment names can not be used: {detail}"
        return HubError(text, next_step="Correct or unset ALL_PROXY, HTTPS_PROXY and HTTP_PROXY")
    text = f"no connection to the Hub can be prepared: {type(error).__name__} {detail}"
    return HubError(text, next_step="Check the proxies and certificates that the environment names")


def _is_about_the_token(error: BaseException) -> bool:
    """Whether the header with the token can't be sent; the client's own words then show the token."""
    if isinstance(error, UnicodeEncodeError):
        return error.object.startswith("Bearer ")
    return isinstance(error, library.httpx2.LocalProtocolError) and "Bearer " in str(error)


def _page(repo: str) -> str:
    return f"{library.constants.ENDPOINT}/{repo}"
