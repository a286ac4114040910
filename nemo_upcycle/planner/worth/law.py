"""The scaling laws of arXiv 2502.03009 (ICML 2025): loss over tokens and parameters.

    dense, or an MoE from scratch:  L = A·D^-α + B·N1^-β + E
    upcycled:                       L = A·D1^-α1 · D2^(-α2 + α3·ln D1) + B·N1^-β + E

Printed in the paper: the numbers of `TABLE_2`, that N1 and not N2 is the variable of all three
laws, and 368B tokens of SlimPajama as the training data. The product of D1 and D2 with its
interaction is also in the authors' next paper, arXiv 2510.06548.

Inferred here, because neither the paper's text around the equations nor the authors' measurements
could be read:

- D1, D2 and N1 are counts, not millions or billions, and the terms add. Losses are then 1.8 to 3.4
  nats per token, as of language models.
- The logarithm is natural. With log10, an MoE from scratch would never catch up inside the range,
  which contradicts the paper.
- N1 counts the dense model's parameters without embeddings and output layer.

The laws are used as printed; they were not fitted again. Losses depend on tokenizer and data, so
only differences between losses mean something for other data.
"""

from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from math import exp, inf, log
from typing import NamedTuple

TABLE_2 = {
    "dense": {"a": "8.83", "b": "12.3", "alpha_1": "0.088", "beta": "0.116"},
    "scratch": {"a": "32.0", "b": "7.05", "alpha_1": "0.161", "beta": "0.080"},
    "upcycled": {
        "a": "16.3",
        "b": "8.53",
        "alpha_1": "0.043",
        "beta": "0.112",
        "alpha_2": "0.085",
        "alpha_3": "7.98e-4",
    },
}
"""The fitted parameters as printed (arXiv 2502.03009, Table 2)."""

IRREDUCIBLE = 0.165
"""E of all three laws (arXiv 2502.03009, Table 2). Differences of losses do not contain it."""

_RAISE = ("a", "b", "alpha_3")
"""Parameters that raise the loss; the others lower the loss."""

LEAST_TOKENS = 1e9
"""The fewest tokens for which the laws are used. Chosen: the paper's smallest run is not known."""

MOST_TOKENS = 368e9
"""The tokens of the paper's training data."""

PARAMETERS = (15e6, 1e9)
"""N1 of the paper's dense models, about: from 15M to the 1B of its Table 7."""

FARTHEST_TOKENS = 1e14
"""Where the search for the break-even ends if the law is extrapolated."""


class Interval(NamedTuple):
    """A number, and the smallest and largest that the printed digits allow."""

    low: float
    value: float
    high: float

    @property
    def is_exact(self) -> bool:
        """Whether rounding does not matter."""
        return self.low == self.high

    def times(self, factor: float) -> "Interval":
        """Return the interval times a positive number."""
        return Interval(*(factor * value for value in self))


def exactly(value: float) -> Interval:
    """Return a number that does not depend on printed digits."""
    return Interval(value, value, value)


@dataclass(frozen=True)
class Law:
    """One of the laws, without the irreducible loss."""

    a: float
    b: float
    alpha_1: float
    beta: float
    alpha_2: float = 0.0
    alpha_3: float = 0.0

    def floor(self, parameters: float) -> float:
        """Return what no number of tokens removes.

        Args:
            parameters: N1.
        """
        return self.b * parameters**-self.beta

    def loss(self, parameters: float, tokens: float, upcycling_tokens: float = 1.0) -> float:
        """Return the loss above the irreducible, in nats per token.

        Args:
            parameters: N1.
            tokens: D, or D1.
            upcycling_tokens: D2.
        """
        second = -self.alpha_2 + self.alpha_3 * log(tokens)
        reducible = self.a * tokens**-self.alpha_1 * upcycling_tokens**second
        return reducible + self.floor(parameters)


@cache
def law(name: str, shift: int = 0) -> Law:
    """Return a law: `dense`, `scratch` or `upcycled`.

    Args:
        name: The law.
        shift: 0 takes the numbers as printed, -1 and 1 the lowest and highest loss of all numbers
            that are printed alike.
    """
    return Law(**{key: _number(key, text, shift) for key, text in TABLE_2[name].items()})


def _number(key: str, text: str, shift: int) -> float:
    printed = Decimal(text)
    half = Decimal(5).scaleb(int(printed.as_tuple().exponent) - 1)
    return float(printed + (shift if key in _RAISE else -shift) * half)


def dense_loss(parameters: float, tokens: float) -> Interval:
    """Return the dense model's loss.

    Args:
        parameters: N1.
        tokens: All tokens since the start.
    """
    return _loss("dense", parameters, tokens)


def scratch_loss(parameters: float, tokens: float) -> Interval:
    """Return the loss of the MoE trained from scratch.

    Args:
        parameters: N1.
        tokens: All tokens.
    """
    return _loss("scratch", parameters, tokens)


def upcycled_loss(parameters: float, dense_tokens: float, tokens: float) -> Interval:
    """Return the loss of the upcycled MoE.

    Args:
        parameters: N1.
        dense_tokens: D1.
        tokens: D2.
    """
    return _loss("upcycled", parameters, dense_tokens, tokens)


def _loss(name: str, *quantities: float) -> Interval:
    low, value, high = (law(name, shift).loss(*quantities) for shift in (-1, 0, 1))
    return Interval(low + IRREDUCIBLE, value + IRREDUCIBLE, high + IRREDUCIBLE)


def scratch_tokens(parameters: float, dense_tokens: float, tokens: float) -> Interval:
    """Return the tokens with which the MoE from scratch reaches the upcycled model's loss.

    Args:
        parameters: N1.
        dense_tokens: D1.
        tokens: D2.

    Returns:
        Tokens; infinite where no number suffices.
    """
    return Interval(*(_reaching(parameters, dense_tokens, tokens, shift) for shift in (-1, 0, 1)))


def _reaching(parameters: float, dense_tokens: float, tokens: float, shift: int) -> float:
    """Solve scratch(D) = upcycled(D1, D2); a shift of -1 gives the fewest tokens."""
    scratch = law("scratch", shift)
    rest = law("upcycled", -shift).loss(parameters, dense_tokens, tokens)
    rest -= scratch.floor(parameters)
    if rest <= 0:
        return inf
    exponent = log(scratch.a / rest) / scratch.alpha_1
    return exp(exponent) if exponent < log(FARTHEST_TOKENS) else inf


def break_even(parameters: float, dense_tokens: float, most: float = MOST_TOKENS) -> Interval:
    """Return the upcycling tokens beyond which training from scratch has the lower loss.

    Both ways cost the same per token, so beyond the break-even training from scratch is also the
    cheaper way to the same loss. The laws may cross again; the first crossing is returned.

    Args:
        parameters: N1.
        dense_tokens: D1.
        most: The largest number of tokens to look at.

    Returns:
        Tokens; infinite where the laws do not cross, and LEAST_TOKENS where training from scratch
        is ahead from there on.
    """
    return Interval(*(_crossing(parameters, dense_tokens, most, shift) for shift in (-1, 0, 1)))


def _crossing(parameters: float, dense_tokens: float, most: float, shift: int) -> float:
    """Scan in steps of 2%, then bisect; a shift of -1 favors the MoE from scratch."""
    scratch, upcycled = law("scratch", shift), law("upcycled", -shift)

    def ahead(tokens: float) -> bool:
        theirs = scratch.loss(parameters, tokens)
        return theirs <= upcycled.loss(parameters, dense_tokens, tokens)

    before, after = LEAST_TOKENS, LEAST_TOKENS
    while not ahead(after):
        if after >= most:
            return inf
        before, after = after, min(1.02 * after, most)
    while after - before > 1e-6 * after:
        middle = (before + after) / 2
        before, after = (before, middle) if ahead(middle) else (middle, after)
    return after
