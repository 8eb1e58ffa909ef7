"""Are two outputs the same to a reader? How `make test` compares a notebook's stored outputs with fresh ones.

Processors round differently, so that the last digit of a decimal may move; nothing else may. An output is read as a
sequence of words, punctuation and numbers, where white space and line ends only separate:

- Words, punctuation and integers are compared exactly, and so are names made of digits: `2.13.0`, `01.10`, Qwen2.5,
  an arXiv number, the id that begins a row of the ledger, and an anchor.
- Decimals (with a point or an exponent) may differ by one unit of the last printed digit: 0.25 and 0.26, 10.0 and 9.9,
  9.9e-05 and 1.0e-04. Where one is printed with a digit less, half a unit of that digit comes on top: an error of
  0.0949 prints as 0.09, one of 0.0951 as 0.1, and the value beside it follows. Where digits are missing because they
  are zeros (0.02 for 0.0200, 1 for 1.00, numpy's `1.` for 1.0000), they are written out first.
- A cell may state a `Tolerance` for its decimals, where the arithmetic amplifies rounding.
- A sign may change only where one of the two numbers is zero. NaN and infinity are words.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from difflib import SequenceMatcher
from typing import NamedTuple

from deltah import checks

PIECE = re.compile(r"""
    (?P<name>   \d+(?:\.\d+){2,} | 0\d+\.\d+ | (?<=arXiv[ :])\d+\.\d+ | (?<=^\|\ )\d+\.\d+(?=\ \|)
                | (?<="ledger-)\d+\.\w+ | (?<="\#)\d+\.\w+ | (?<=">)\d+\.\w+(?=</a>) )
  | (?P<number> (?P<sign>(?<![\w.)\]])[-−+])?
                (?P<mantissa>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+|\.(?![\w.]))?|(?<![\w)\]])\.\d+)
                (?:[eE](?P<exponent>[-−+]?\d+))? )
  | (?P<word>   [^\W\d]\w* | \S )
""", re.VERBOSE | re.MULTILINE)
TAG = "tolerance="


@dataclass(frozen=True)
class Tolerance:
    """How far a cell's decimals may be apart: `share` of the larger of both, or `units` of their own.

    >>> Tolerance.read(["parameters", "tolerance=0.05"])
    Tolerance(share=0.05, units=0.0)
    >>> Tolerance.read(["tolerance=abs:0.002"])
    Tolerance(share=0.0, units=0.002)
    """

    share: float = 0.0
    units: float = 0.0

    def __post_init__(self) -> None:
        checks.number("share", self.share, minimum=0, below=1)
        checks.number("units", self.units, minimum=0)

    @classmethod
    def read(cls, tags: Sequence[str]) -> Tolerance | None:
        """The tolerance among a cell's tags, or None.

        Raises:
            ValueError: more than one, or one that is not `tolerance=SHARE` or `tolerance=abs:UNITS`.
        """
        checks.instance("tags", tags, (list, tuple), "a list of strings")
        found = [tag for tag in tags if checks.instance("tags", tag, str, "strings").startswith("tolerance")]
        if not found:
            return None
        match = re.fullmatch(rf"{TAG}(abs:)?(\d+(?:\.\d+)?(?:e-?\d+)?)", found[0])
        value = float(match[2]) if match else 0.0
        if len(found) > 1 or not value or not (match[1] or value < 1):
            raise ValueError(f"tags: expected one tolerance=SHARE, with a share between 0 and 1, or "
                             f"tolerance=abs:UNITS, got {', '.join(found)}")
        return cls(units=value) if match[1] else cls(share=value)

    def allows(self, one: Decimal, other: Decimal) -> bool:
        return abs(one - other) <= max(Decimal(str(self.units)), Decimal(str(self.share)) * max(abs(one), abs(other)))


class Piece(NamedTuple):
    """A word, a sign of punctuation, or a number.

    Attributes:
        text, start: as printed, and where.
        value, place: of a number, and the power of ten that its last printed digit stands for.
        integer, whole: no point and no exponent; a point with nothing behind it at most.
        plus: printed with a + in front.
    """

    text: str
    start: int
    value: Decimal | None = None
    place: int = 0
    integer: bool = False
    whole: bool = False
    plus: bool = False


def pieces(text: str) -> Iterator[Piece]:
    """What a reader sees in a text, in order.

    >>> [(piece.text, piece.place) for piece in pieces("x=-0.50 ± 1e-03")]
    [('x', 0), ('=', 0), ('-0.50', -2), ('±', 0), ('1e-03', -3)]
    """
    for match in PIECE.finditer(text):
        if match["number"] is None:
            yield Piece(match[0], match.start())
            continue
        mantissa, exponent = match["mantissa"].replace(",", ""), (match["exponent"] or "0").replace("−", "-")
        value = Decimal(mantissa).scaleb(int(exponent))
        decimals = len(mantissa.partition(".")[2])
        whole = decimals == 0 and match["exponent"] is None
        yield Piece(match[0], match.start(), -value if match["sign"] in ("-", "−") else value,
                    int(exponent) - decimals, whole and "." not in mantissa, whole, match["sign"] == "+")


def differences(stored: str, fresh: str, tolerance: Tolerance | None = None) -> list[str]:
    """What a reader would find changed from `stored` to `fresh`, one line each; nothing where they say the same.

    >>> differences("slope 1.00 ± 0.03, holds", "slope 1.01 ± 0.03,  holds")
    []
    >>> differences("slope 1.00, holds", "slope 1.02, refuted")
    ["stored '1.00', now '1.02', after 'slope'", "stored 'holds', now 'refuted', after 'slope 1.00,'"]
    """
    for name, text in (("stored", stored), ("fresh", fresh)):
        checks.instance(name, text, str, "a string")
    if tolerance is not None:
        checks.instance("tolerance", tolerance, Tolerance)
    if stored == fresh:
        return []
    old, new = list(pieces(stored)), list(pieces(fresh))
    found = []
    for i, j, k, m in _aligned(old, new):
        estimate = any(piece.text == "±" for piece in old[max(i - 1, 0):i] + old[j:j + 1])
        if j - i != 1 or m - k != 1 or not _same(old[i], new[k], tolerance, estimate):
            where = old[i].start if i < len(old) else len(stored)
            before = " ".join(stored[:where].split())[-40:]
            found.append(f"stored {_shown(old[i:j])}, now {_shown(new[k:m])}, "
                         + (f"after {before!r}" if before else "at the start"))
    return found


def _aligned(old: list[Piece], new: list[Piece]) -> Iterator[tuple[int, int, int, int]]:
    """Ranges (i, j, k, m), so that old[i:j] and new[k:m] are to be compared: one piece with one, where it can be."""
    if len(old) == len(new):
        yield from ((i, i + 1, i, i + 1) for i in range(len(old)))
        return
    # Decimals are aligned by their places among the words, whatever they are.
    skeletons = [[piece.text if piece.value is None or piece.whole else "#" for piece in side] for side in (old, new)]
    for kind, i, j, k, m in SequenceMatcher(None, *skeletons, autojunk=False).get_opcodes():
        if kind == "equal":
            yield from ((i + n, i + n + 1, k + n, k + n + 1) for n in range(j - i))
        else:
            yield i, j, k, m


def _same(old: Piece, new: Piece, tolerance: Tolerance | None, estimate: bool) -> bool:
    """Whether one piece says the same as another; `estimate`: it stands beside ±."""
    if old.value is None or new.value is None:
        return old.text == new.text
    product = old.value * new.value
    if product < 0 or (old.plus != new.plus and product > 0):
        return False
    if old.whole and new.whole:
        return old.value == new.value
    mixed = old.whole or new.whole
    if not estimate and any(piece.integer and piece.value == 0 for piece in (old, new)):
        # A decimal close to 0 never loses its digits to become the integer 0.
        return old.value == new.value
    if tolerance and not mixed and tolerance.allows(old.value, new.value):
        return True
    finer, coarser = sorted((old.place, new.place))
    allowed = Decimal(1).scaleb(finer)
    if coarser - finer == 1 and (estimate or not mixed):
        allowed += Decimal(1).scaleb(coarser) / 2
    return abs(old.value - new.value) <= allowed


def _shown(side: list[Piece]) -> str:
    return repr(" ".join(piece.text for piece in side)[:80]) if side else "nothing"
