"""The page of the benchmarks: what is measured, what was wanted, and what people wrote below."""

from __future__ import annotations

from bench.report import BY_HAND, Measured, by_hand, page


def test_a_missed_goal_is_said() -> None:
    assert Measured("start", (1.0, 2.0, 9.0), "s", 2.0, 2.5).cells()[-2:] == ("2 / 2.5", "MISSED")
    assert Measured("start", (1.0, 2.0, 9.0), "s", 2.0).cells()[-2:] == ("2 / -", "met")


def test_what_was_written_by_hand_stays_when_the_page_is_written_again() -> None:
    row = Measured("start", (1.0,), "s")
    first = page([row], ["a note"], (0, 0, 0))
    assert by_hand(first) == ""
    mine = f"{first}\n{BY_HAND}\n\nMeasured by a test.\n"
    again = page([row, row], ["a note"], (0, 0, 0)) + by_hand(mine)
    assert again.endswith(f"* a note\n\n{BY_HAND}\n\nMeasured by a test.\n")
    assert by_hand(again) == by_hand(mine)
