"""What a card is given, it gives back: a dropout of zero is no False."""

from __future__ import annotations

from pathlib import Path

from lora_rt.registry.card import AdapterCard, BaseIdentity, read_card, write_card


def test_numbers_of_a_run_keep_their_kind(tmp_path: Path) -> None:
    settings = {"dropout": 0.0, "r": 8, "resumed": True, "precision": "int4"}
    base = BaseIdentity(id="tiny", revision=None, digest="")
    write_card(tmp_path, AdapterCard(register="body", mode="output-only", base=base, training=settings))
    card = read_card(tmp_path)
    assert card is not None
    assert {key: (type(value), value) for key, value in card.training.items()} == {
        key: (type(value), value) for key, value in settings.items()
    }
