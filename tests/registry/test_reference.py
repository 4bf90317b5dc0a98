"""What a user may type to point at an adapter."""

from __future__ import annotations

import pytest

from lora_rt.registry.errors import InvalidReferenceError
from lora_rt.registry.reference import Reference


@pytest.mark.parametrize(
    ("text", "kind", "target", "revision"),
    [
        ("emotion", "name", "emotion", None),
        ("emotion@3f2a91c", "name", "emotion", "3f2a91c"),
        ("org/repo", "hub", "org/repo", None),
        ("org/repo@v1", "hub", "org/repo", "v1"),
        ("org/repo@refs/pr/4", "hub", "org/repo", "refs/pr/4"),
        ("./mine", "path", "./mine", None),
        ("../mine", "path", "../mine", None),
        ("/data/mine@home", "path", "/data/mine@home", None),
        ("~/mine", "path", "~/mine", None),
    ],
)
def test_the_five_forms(text: str, kind: str, target: str, revision: str | None) -> None:
    found = Reference.parse(text)
    assert (found.kind, found.target, found.revision, found.text) == (kind, target, revision, text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("@v1", "nothing before the @"),
        ("emotion@", "nothing follows"),
        ("a/b/c", "not of the form org/repo"),
        ("org/", "not of the form org/repo"),
        ("..\\x", "backslash"),
        ("a..b", "not a name"),
        ("org/..", "not of the form"),
        ("emo tion", "not a name"),
        ("emotion:0.7", "not a name"),
        ("org/repo@../../x", "not a revision"),
        ("org/repo@-x", "not a revision"),
        ("./a\0b", "null character"),
    ],
)
def test_what_is_wrong_with_others_is_said_with_the_forms_that_are_right(text: str, says: str) -> None:
    with pytest.raises(InvalidReferenceError, match=says) as error:
        Reference.parse(text)
    assert "org/repo@revision" in error.value.next_step
    assert error.value.message.count(repr(text)) == 1, "it is quoted once"
