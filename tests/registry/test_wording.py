"""What pydantic finds in a document is said in a newcomer's words."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError

from lora_rt.registry.models import Finite, Sha256, Text, problems_of


class Document(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    text: Text = ""
    whole: Annotated[StrictInt, Field(gt=0, le=9)] = 1
    real: Finite = 1.0
    flag: StrictBool = True
    many: Annotated[list[int], Field(min_length=1, max_length=2)] = [1]
    table: dict[str, int] = {}
    digest: Sha256 = "0" * 64
    word: Literal["a", "b"] = "a"


FINDINGS: list[tuple[dict[str, Any], str]] = [
    ({"text": 3}, "text: it is not a text"),
    ({"text": "a\nb"}, "text: it holds a line break or another character that can't be printed"),
    ({"text": "a" * 400}, "text: it has more than 300 characters"),
    ({"whole": "x"}, "whole: it is not a whole number"),
    ({"whole": 0}, "whole: it must be above 0"),
    ({"whole": 10}, "whole: it must be at most 9"),
    ({"real": "x"}, "real: it is not a number"),
    ({"real": float("nan")}, "real: it is not a finite number"),
    ({"flag": "x"}, "flag: it is neither true nor false"),
    ({"many": 1}, "many: it is not a list"),
    ({"many": []}, "many: it has fewer than 1 entries"),
    ({"many": [1, 2, 3]}, "many: it has more than 2 entries"),
    ({"table": []}, "table: it is not an object"),
    ({"digest": "abc"}, "digest: 'abc' is not 64 hexadecimal digits"),
    ({"word": "c"}, "word: it must be 'a' or 'b'"),
    ({"other": 1}, "other: there is nothing of this name"),
]


@pytest.mark.parametrize(("document", "said"), FINDINGS, ids=[said for _, said in FINDINGS])
def test_a_finding_is_said_without_the_librarys_words(document: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Document.model_validate(document)
    assert problems_of(caught.value) == [said]
