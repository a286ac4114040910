"""Initializers are found by name, with their options."""

import pytest

from nemo_upcycle.errors import UpcyclingError
from nemo_upcycle.initializers import make_initializer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dropp", "no initializer 'dropp'; expected one of: activation_sorted, cluster_svd, copy"),
        ("drop(rate=0.5)", r"unexpected keyword argument 'rate'; expected drop\(ratio"),
        ("drop(ratio=1.5)", "ratio is 1.5; expected a number from 0 to 1"),
        ("drop(ratio='half')", "ratio is 'half'"),
        ("drop(ratio=nan)", "drop: ratio is nan; expected a number from 0 to 1"),
        ("drop(ratio=True)", "drop: ratio is True"),
        ("noise(std=inf)", "noise: std is inf; expected a number of 0 or more"),
        ("noise(std=-Inf)", "noise: std is -inf"),
        (
            "noise(std=1e300)",
            r"noise: std is 1e\+300; expected a number of 0 or more, up to 1e\+30",
        ),
        ("hybrid(copy, random(std=1e39))", r"random: std is 1e\+39"),
        ("noise(fraction=NaN)", "noise: fraction is nan"),
        (f"random(std={10**400})", "random: std is 1000"),
        ("hybrid(copy, random(std=nan))", "random: std is nan"),
        ("hybrid(nan)", "expects initializers"),
        ("noise(std=-1)", "std is -1"),
        ("hybrid", "expects initializers"),
        ("hybrid(0.5)", "expects initializers"),
        ("hybrid(copy, nope)", "no initializer 'nope'"),
        ("drop(", "expected a name"),
        ("__import__('os').system('true')", "expected a name"),
        ("drop(ratio=open('/etc/passwd'))", "no initializer 'open'"),
        ("", "expected a name"),
    ],
)
def test_bad_initializers_are_refused(text: str, message: str) -> None:
    with pytest.raises(UpcyclingError, match=message):
        make_initializer(text)


def test_semicolons_are_commas() -> None:
    make_initializer("hybrid(copy; noise(std=0.01; fraction=0.5))")
