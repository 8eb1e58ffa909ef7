"""The ledger: what a source states, what was measured, and the verdict."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from deltah import checks

HOLDS, CORRECTED, REFUTED = "holds", "holds with a correction", "refuted"


class LedgerError(AssertionError):
    """A check that did not come out as its entry says, or an entry that checks nothing."""


@dataclass(frozen=True)
class Claim:
    """One entry; `expected` is the corrected value for a correction, the source's value for a refutation."""

    id: str
    chapter: str
    source: str
    section: str
    statement: str
    measured: float
    expected: float
    tolerance: float
    verdict: str
    correction: str | None = None

    @property
    def shown(self) -> str:
        """`measured` beside `expected`, rounded to the tolerance, so that it reads the same on every machine."""
        sign = "≠" if self.verdict == REFUTED else "="
        return f"{_rounded(self.measured, self.tolerance)} {sign} {_rounded(self.expected, self.tolerance)}"


def _rounded(value: float, tolerance: float) -> str:
    if value == 0 or abs(value) < tolerance:
        return "0"
    # More than 9,999 tolerances, or a tolerance of 0, are shown with four digits.
    digits = len(str(int(abs(value) / tolerance))) if abs(value) < 1e4 * tolerance else 4
    return f"{value:.{max(digits, 1)}g}"


@dataclass(repr=False)
class Ledger:
    """The claims of one chapter. Each check raises `LedgerError` when it does not come out as it says.

    So does one that could not fail: numbers that are no finite numbers, a negative tolerance, no statement, an id that
    does not begin with the chapter's number. The same statement may be entered again, as when a cell is executed twice;
    another may not take its id.

    Args:
        chapter: its number, such as "01".
        source: the source that its claims come from, unless a check names another.

    >>> ledger = Ledger("01", "arXiv 2510.23142")
    >>> ledger.holds("01.1", "abstract", "s = exp(ΔH)", measured=1.0000001, expected=1.0, tolerance=1e-5)
    >>> ledger.claims["01.1"].verdict
    'holds'
    """

    chapter: str
    source: str
    claims: dict[str, Claim] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("chapter", self.chapter), ("source", self.source)):
            if not checks.instance(name, value, str, "a string").strip():
                raise ValueError(f"{name}: expected some text, got {value!r}")

    def holds(self, id: str, section: str, statement: str, *, measured: float, expected: float, tolerance: float,
              source: str | None = None) -> None:
        """Enter a statement that is true: `measured` is within `tolerance` of `expected`."""
        self._enter(self._claim(HOLDS, id, section, statement, source, measured, expected, tolerance))

    def corrected(self, id: str, section: str, statement: str, *, correction: str, measured: float, expected: float,
                  as_printed: float, tolerance: float, source: str | None = None) -> None:
        """Enter a statement that needs `correction`: `expected`, with it, is met, and `as_printed` is not."""
        claim = self._claim(CORRECTED, id, section, statement, source, measured, expected, tolerance,
                            correction=correction)
        printed = _number(id, "as_printed", as_printed)
        if abs(claim.measured - printed) <= claim.tolerance:
            raise LedgerError(f"{id}: {claim.measured} is within {claim.tolerance} of {printed}: it needs no "
                              "correction, as far as this check can tell")
        self._enter(replace(claim, correction=f"{correction} (as printed: {printed:.3g})"))

    def refuted(self, id: str, section: str, statement: str, *, counterexample: str, measured: float, expected: float,
                tolerance: float, source: str | None = None) -> None:
        """Enter a statement that is false: `measured` is further than `tolerance` from `expected`, its value."""
        self._enter(self._claim(REFUTED, id, section, statement, source, measured, expected, tolerance,
                                counterexample=counterexample))

    def _claim(self, verdict: str, id: str, section: str, statement: str, source: str | None, measured: Any,
               expected: Any, tolerance: Any, **note: str) -> Claim:
        """An entry whose parts are what they should be, whether or not its check comes out."""
        source = self.source if source is None else source
        for name, value in {"id": id, "section": section, "statement": statement, "source": source, **note}.items():
            if not isinstance(value, str) or not value.strip():
                raise LedgerError(f"{id}: {name}: expected some text, got {checks.shown(value)}")
        if not re.fullmatch(rf"{re.escape(self.chapter)}\.\w+", id):
            raise LedgerError(f"{id}: id: expected {self.chapter}. and a number, got {id!r}")
        return Claim(id, self.chapter, source, section, statement, _number(id, "measured", measured),
                     _number(id, "expected", expected), _number(id, "tolerance", tolerance, minimum=0), verdict,
                     *note.values())

    def _enter(self, claim: Claim) -> None:
        agrees = abs(claim.measured - claim.expected) <= claim.tolerance
        if agrees == (claim.verdict == REFUTED):
            raise LedgerError(f"{claim.id} ({claim.statement}): entered as '{claim.verdict}', but measured "
                              f"{claim.measured} against {claim.expected}, tolerance {claim.tolerance}")
        known = self.claims.get(claim.id, claim)
        if known.statement != claim.statement:
            raise LedgerError(f"{claim.id} ({claim.statement}): the id is taken by {known.statement!r}; where that has "
                              f"only been reworded, del ledger.claims[{claim.id!r}]")
        self.claims[claim.id] = claim

    def __repr__(self) -> str:
        return f"Ledger of chapter {self.chapter}: {summarise(self.claims.values())}"

    def _repr_markdown_(self) -> str:
        return markdown(self.claims.values())

    def save(self, results: str | Path) -> None:
        """Write the claims to `<results>/ledger/<chapter>.json`, where `collect` finds them."""
        folder = Path(checks.instance("results", results, (str, Path), "a folder")) / "ledger"
        folder.mkdir(parents=True, exist_ok=True)
        claims = [asdict(claim) for claim in self.claims.values()]
        _write(folder / f"{self.chapter}.json", json.dumps(claims, indent=1, ensure_ascii=False))


def _number(id: str, name: str, value: Any, minimum: float | None = None) -> float:
    try:
        return checks.number(name, value, minimum=minimum)
    except (TypeError, ValueError) as error:
        raise LedgerError(f"{id}: {error}") from None


def collect(results: str | Path) -> list[Claim]:
    """All claims that chapters saved under `results`, in the order of chapters.

    Raises:
        ValueError: an id that occurs twice.
    """
    folder = Path(checks.instance("results", results, (str, Path), "a folder")) / "ledger"
    claims = [Claim(**claim) for path in sorted(folder.glob("*.json"))
              for claim in json.loads(path.read_text())]
    twice = [id for id, count in Counter(claim.id for claim in claims).items() if count > 1]
    if twice:
        raise ValueError(f"results: these claims occur twice: {', '.join(twice)}")
    return claims


def summarise(claims: Iterable[Claim]) -> str:
    """One line: how many claims hold, hold with a correction, or are refuted.

    >>> summarise([])
    '0 claims: 0 holds, 0 holds with a correction, 0 refuted'
    """
    counts = Counter(claim.verdict for claim in _claims(claims))
    return f"{counts.total()} claims: " + ", ".join(f"{counts[v]} {v}" for v in (HOLDS, CORRECTED, REFUTED))


def write_summary(results: str | Path) -> list[Claim]:
    """Write every chapter's claims to `<results>/ledger.json` and `<results>/ledger.md`, and return them."""
    claims, results = collect(results), Path(results)
    _write(results / "ledger.json", json.dumps([asdict(claim) for claim in claims], indent=1, ensure_ascii=False))
    _write(results / "ledger.md", f"# Ledger\n\n{summarise(claims)}.\n\n{markdown(claims)}\n")
    return claims


def markdown(claims: Iterable[Claim]) -> str:
    """The claims as a Markdown table."""
    lines = ["| id | source | section | statement | measured | verdict | correction or counterexample |",
             "|---|---|---|---|---|---|---|"]
    for c in _claims(claims):
        cells = (c.id, c.source, c.section, c.statement, c.shown, c.verdict, c.correction or "")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _claims(claims: Iterable[Claim]) -> list[Claim]:
    if not isinstance(claims, Iterable):
        raise TypeError(f"claims: expected claims, got {checks.shown(claims)}")
    return [checks.instance(f"claims[{i}]", claim, Claim) for i, claim in enumerate(claims)]


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)
