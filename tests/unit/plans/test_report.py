"""How numbers are shown."""

from nemo_upcycle.plans.report import number, spans_of
from nemo_upcycle.progress import size


def test_numbers_are_short() -> None:
    assert [number(n) for n in (999, 1500, 8.03e9, 47.491e9)] == ["999", "1.50K", "8.03B", "47.49B"]
    assert [size(n) for n in (1023, 1024, 15 * 2**30, 2**50)] == [
        "1023 B",
        "1.00 KiB",
        "15.0 GiB",
        "1024 TiB",
    ]
    assert [spans_of(n) for n in ([3], [0, 1, 2, 5], range(0, 32, 4), [])] == [
        "3",
        "0–2, 5",
        "0, 4 … 28",
        "none",
    ]
