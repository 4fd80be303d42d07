"""Tables of the command line in narrow terminals."""

from __future__ import annotations

from rich.console import Console

from shared.terminal import table


def test_a_number_is_never_cut_where_room_is_short() -> None:
    """`1234` shown as `12…` would be another number. Texts may be cut (control)."""
    console = Console(width=30, record=True)
    names = ["a_long_name_of_a_text", "a_long_name_of_a_number", "another_number"]
    console.print(table(names, [["word" * 4, 1234567, 12], ["other", 7, 3456]]))
    text = console.export_text()
    assert "1234567" in text
    assert "3456" in text
    assert "a_long_name_of_a_number" not in text
