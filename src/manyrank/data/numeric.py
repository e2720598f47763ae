"""The number that a text ends in, as `data prepare` filters by it and `evaluate` scores it. No torch."""

from __future__ import annotations

import re
from decimal import Decimal

NUMBER = re.compile(
    r"(?:(?<![\w.)])[-\u2212])?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?"
)
CURRENCY = re.compile(r"(?<=[-\u2212])[$€£¥]")  # between a number and its sign
FINAL = "####"  # in front of the result, in GSM8K


def number(text: str) -> Decimal | None:
    """The first number after the last "####", else the last number; None where there is none.

    Commas between thousands, currency and percent signs do not count: "$1,218.00" is 1218.
    """
    _, marked, result = text.rpartition(FINAL)
    numbers = NUMBER.findall(CURRENCY.sub("", result if marked else text))
    if not numbers:
        return None
    return Decimal(numbers[0 if marked else -1].replace(",", "").replace("\u2212", "-"))
