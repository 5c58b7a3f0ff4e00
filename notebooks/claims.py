"""Sentences of a page, held against the numbers that they speak of."""

from __future__ import annotations

import re
from decimal import Decimal

import numpy as np

from helpers import Corpus

# A number as prose has it: 0.43, -0.22, 1,003,854, 10^{-3}, 3\cdot10^{-5}; not 1/4, H100 or x_1.
NUMBER = re.compile(
    r"(?<![\w.^/])(?<!\d,)-?(?:[\d.]+\\cdot)?"  # a sign and a factor, not within a word
    r"(?:10\^\{?-?\d+\}?|\d+(?:,\d{3})*(?:\.\d+)?)"  # a power of ten, or digits
    r"(?![\w/]|\.\d)")


def claim(sentence: str, *values: float | bool, within: float | None = None,
          corpus: Corpus | None = None) -> None:
    """Hold a sentence of the text against what was computed; AssertionError says what is not so.

    The numbers in ``sentence``, in order, must be the ``values``: to the digits printed, or to
    ``within`` where trained runs differ from machine to machine. True or False stands for what the
    words say. With a ``corpus`` that is not Tiny Shakespeare nothing is claimed.

    >>> claim("harm stays below 0.25: 0.05 [0.04, 0.06]", 0.25, 0.0512, 0.0433, 0.0589)
    >>> claim("harm is 0.07 on 656 runs", 0.0512, 656)
    Traceback (most recent call last):
        ...
    AssertionError: 0.07 should be 0.0512 in: harm is 0.07 on 656 runs
    """
    if corpus is not None and not corpus.is_shakespeare:
        return

    def hold(so: bool, otherwise: str) -> None:
        if not so:
            raise AssertionError(f"{otherwise} in: {sentence}")

    written = []
    for number in NUMBER.findall(sentence):
        number = re.sub(r"[,{}]", "", number).replace(r"\cdot10^", "e").replace("10^", "1e")
        written.append(Decimal(number))
    truths = [value for value in values if isinstance(value, (bool, np.bool_))]
    values = [value for value in values if not isinstance(value, (bool, np.bool_))]
    hold(len(written) == len(values), f"{len(values)} numbers given, and {len(written)}")
    hold(truths or values, "nothing given that could support what is said")
    hold(all(truths), "what is said does not hold")
    for number, value in zip(written, values, strict=True):
        reach = 0.5 * 10.0 ** number.as_tuple().exponent if within is None else within
        hold(abs(value - float(number)) <= reach * (1 + 1e-9), f"{number:f} should be {value:.6g}")
