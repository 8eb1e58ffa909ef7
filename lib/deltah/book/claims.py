"""One entry of the ledger: what a source states, or we do, what was measured, and what follows from that.

An exact number agrees with what is expected within its tolerance. An `Estimate` decides by its 95% interval, and only
against a rival, the value that would be true if the statement were not: the statement holds where the interval has
what is expected in it and every rival outside, is refuted where it has what is expected outside, and is *not decided by
these data* otherwise. Zero, half, twice and the other sign of an expected value are its rivals always. What is expected
may be a range (low, high): then a number, or the whole interval, has to lie in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from scipy.stats import norm

from deltah.estimates import Estimate

HOLDS, CORRECTED, REFUTED = "holds", "holds with a correction", "refuted"
UNDECIDED = "not decided by these data"
VERDICTS = (HOLDS, CORRECTED, REFUTED, UNDECIDED)
OWN = "deltah"
# An estimate with so many samples that its interval leaves a rival out in nine cases of ten decides.
POWER = 0.9
# Below this, a tolerance is rounding's: what was measured says nothing more than that it is smaller.
ROUNDING = 1e-4

Expected = float | tuple[float, float]


@dataclass(frozen=True)
class Claim:
    """One entry; `expected` is the corrected value for a correction, the source's value for a refutation.

    Attributes:
        source: who says it; `OWN` where we do.
        measured, expected, tolerance: numbers; `expected` may be a pair (low, high) for an inequality. Of an estimate,
            the tolerance is half of its interval.
        formulas: the displayed formulas of the source that the entry settles, by number.
        standard_error, low, high, count: of an estimate: its error, 95% interval and independent samples.
        rules_out: the rival values, by name.
        samples_needed: of an undecided estimate, how many would leave the rival out.
        seeds: of an estimate, the verdicts on other seeds; None where those were to be known and are not.
    """

    id: str
    chapter: str
    source: str
    section: str
    statement: str
    measured: float
    expected: Expected
    tolerance: float
    verdict: str
    correction: str | None = None
    formulas: tuple[int, ...] = ()
    standard_error: float | None = None
    low: float | None = None
    high: float | None = None
    count: int | None = None
    rules_out: Mapping[str, float] | None = None
    samples_needed: int | None = None
    seeds: tuple[str, ...] | None = ()

    @property
    def is_estimate(self) -> bool:
        return self.standard_error is not None

    @property
    def shown(self) -> str:
        """What was measured: with its error to two digits, or that it is within a tolerance that is rounding's."""
        if self.is_estimate:
            return _with_error(self.measured, self.standard_error)
        if self.expected == 0 and self.verdict != REFUTED and 0 < self.tolerance <= ROUNDING:
            return f"≤ {10.0 ** math.ceil(math.log10(self.tolerance)):.0e}".replace("e-0", "e-")
        return _plain(self.measured, self._digits)

    @property
    def shown_expected(self) -> str:
        """What is expected, as precisely as it was measured, and what that rules out."""
        places = _places(self.standard_error) if self.is_estimate else None

        def show(value: float) -> str:
            if places is None:
                return _plain(value, self._digits)
            # No more places than it has, 0.95 beside 0.9435 ± 0.0052, and no zero that is none.
            fixed = _fixed(value, places)
            return f"{value:.2g}" if value and not float(fixed) else min(fixed, f"{value + 0.0:g}", key=len)

        if isinstance(self.expected, tuple):
            low, high = self.expected
            text = (f"≥ {show(low)}" if high == math.inf else f"≤ {show(high)}" if low == -math.inf
                    else f"{show(low)} to {show(high)}")
        else:
            text = show(self.expected)
        text = f"not {text}" if self.verdict == REFUTED else text
        if not self.is_estimate and self.tolerance > ROUNDING:
            text += f" ± {self.tolerance:.2g}"
        rivals = ", ".join(f"{show(value)} ({name})" if name else show(value)
                           for name, value in (self.rules_out or {}).items())
        return f"{text}; rules out {rivals}" if rivals else text

    @property
    def shown_verdict(self) -> str:
        """The verdict; where data do not decide, how many would; on how many seeds it is the same."""
        notes = []
        if self.verdict == UNDECIDED and self.samples_needed:
            notes.append(f"about {_rounded_up(self.samples_needed):,} samples would, {self.count:,} are here")
        if self.seeds:
            same = self.verdict if self.verdict != UNDECIDED else max(self.seeds, key=self.seeds.count)
            notes.append(f"{same} on {self.seeds.count(same)} of {len(self.seeds)} seeds" if same != self.verdict
                         else f"on {self.seeds.count(same)} of {len(self.seeds)} seeds")
        elif self.seeds is None:
            notes.append("not tried on other seeds")
        return f"{self.verdict} ({'; '.join(notes)})" if notes else self.verdict

    @property
    def _digits(self) -> int:
        """Enough to tell what was measured from what is expected, and no more than the tolerance makes sense of."""
        size = max(abs(self.measured), abs(self.expected) if not isinstance(self.expected, tuple) else 0)
        digits = 4 if self.tolerance * 1e3 <= size else max(2, len(str(int(size / self.tolerance))))
        apart = [self.expected] if self.verdict == REFUTED and not isinstance(self.expected, tuple) else []
        while digits < 17 and any(_plain(self.measured, digits) == _plain(value, digits) for value in apart):
            digits += 1
        return digits

    def as_json(self) -> dict[str, Any]:
        """The fields, with null for a bound that is infinite, as JSON has no infinity."""
        fields = asdict(self)
        if isinstance(self.expected, tuple):
            fields["expected"] = [_finite(end) for end in self.expected]
        return fields | {name: _finite(fields[name]) for name in ("low", "high", "tolerance")}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Claim:
        """The claim that `as_json` made this of."""
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
        if isinstance(fields["expected"], tuple):
            low, high = fields["expected"]
            fields["expected"] = (-math.inf if low is None else low, math.inf if high is None else high)
        if fields.get("standard_error") is not None:
            unbounded = {"low": -math.inf, "high": math.inf, "tolerance": math.inf}
            fields |= {name: value for name, value in unbounded.items() if fields[name] is None}
        return cls(**fields)


def verdict_of(kind: str, estimate: Estimate, expected: Expected, rivals: Mapping[str, float]) -> str:
    """What an estimate says of a statement that is entered as `kind`, one of the first three verdicts.

    >>> verdict_of(HOLDS, Estimate(1.1, 0.2, 100), 1.0, {"zero": 0.0})
    'holds'
    >>> verdict_of(HOLDS, Estimate(0.3, 0.2, 100), 0.5, {"zero": 0.0})
    'not decided by these data'
    """
    low, high = estimate.interval()
    least, most = expected if isinstance(expected, tuple) else (expected, expected)
    if high < least or low > most:
        # What is expected of a correction is the corrected value: where that fails, the printed one may stand.
        return HOLDS if kind == CORRECTED and low <= rivals["as printed"] <= high else REFUTED
    inside = isinstance(expected, float) or least <= low and high <= most
    excluded = all(not low <= value <= high for value in (*rivals.values(), *_implied(expected)))
    if kind == REFUTED:
        return HOLDS if inside and excluded and rivals else UNDECIDED
    return kind if inside and excluded else UNDECIDED


def _implied(expected: Expected) -> list[float]:
    """The rivals that an expected value always has."""
    return [factor * expected for factor in (0, 0.5, 2, -1)] if isinstance(expected, float) and expected else []


def samples_needed(estimate: Estimate, expected: Expected, rivals: Mapping[str, float]) -> int | None:
    """How many independent samples would decide in nine cases of ten; None where these should have, or no number would.

    The distance to be seen is the one between what is expected and the nearest rival; for a range, between what was
    measured and the nearest bound or rival, and no less than an error, as what is smaller is noise.

    >>> samples_needed(Estimate(0.3, 0.2, 100), 0.5, {"zero": 0.0})
    673
    """
    if isinstance(expected, tuple):
        distances = [max(abs(estimate.value - value), estimate.standard_error)
                     for value in (*rivals.values(), *expected) if math.isfinite(value)]
    elif rivals:
        distances = [abs(expected - value) for value in (*rivals.values(), *_implied(expected))]
    else:
        distances = [abs(estimate.value - expected)]
    distance = min(distances, default=0.0)
    if estimate.count < 2 or not distance:
        return None
    quantiles = float(norm.ppf(0.975) + norm.ppf(POWER))
    try:
        needed = math.ceil(estimate.count * (quantiles * estimate.standard_error / distance) ** 2)
    except OverflowError:
        return None
    return needed if needed > estimate.count else None


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _places(error: float) -> int | None:
    """The decimal places that show an error to two digits; None for an error of 0."""
    if not error or not math.isfinite(error):
        return None
    places = 1 - math.floor(math.log10(error))
    # 0.0996 rounds up to 0.10.
    return 1 - math.floor(math.log10(round(error, places)))


def _with_error(value: float, error: float) -> str:
    places = _places(error)
    if places is None:
        return f"{value:.4g} ± {error:.2g}"
    if places <= 6 and abs(value) < 1e7:
        return f"{_fixed(value, places)} ± {_fixed(error, places)}"
    power = math.floor(math.log10(max(abs(value), error)))
    return (f"({_fixed(value / 10.0**power, places + power)} ± {_fixed(error / 10.0**power, places + power)})"
            f" × 1e{power}")


def _fixed(value: float, places: int) -> str:
    return f"{round(value, places) + 0.0:.{max(places, 0)}f}"


def _plain(value: float, digits: int) -> str:
    return f"{value + 0.0:.{digits}g}" if value else "0"


def _rounded_up(count: int) -> int:
    """A count to two digits, as what it comes from is an estimate too."""
    unit = 10 ** max(len(str(count)) - 2, 0)
    return -(-count // unit) * unit
