"""The ledger: what a source states, what was measured, and the verdict."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deltah import checks
from deltah.book.claims import (
    CORRECTED,
    HOLDS,
    OWN,
    REFUTED,
    UNDECIDED,
    VERDICTS,
    Claim,
    Expected,
    samples_needed,
    verdict_of,
)
from deltah.book.equations import FORMULAS, section_of
from deltah.estimates import Estimate

# The share of seeds on which a verdict must be the same for it to be one.
STABLE = 0.9
NOTES = "notes"


class LedgerError(AssertionError):
    """A check that did not come out as its entry says, or an entry that checks nothing."""


@dataclass(repr=False)
class Ledger:
    """The claims of one chapter. Each check raises `LedgerError` when it does not come out as it says.

    So does one that could not fail: numbers that are no finite numbers, a negative tolerance, no statement, an id that
    does not begin with the chapter's number, an `Estimate` without a rival that its interval could leave out. The same
    statement may be entered again, as when a cell is executed twice; another may not take its id.

    An exact number comes with a `tolerance`. An `Estimate` comes with the rival that it rules out instead, a number or
    several by name, and decides by its 95% interval: data that leave a rival in do not decide, which is no error.

    Args:
        chapter: its number, such as "01".
        source: the source that its claims come from, unless a check names another; "deltah" for our own.
        stated: whether what the chapter states of its estimates is about these data. False on another policy, other
            problems or another seed: there an estimate that contradicts its entry is entered with the verdict that it
            gives, not refused.
        seeds: a folder with the verdicts of estimates on other seeds, `<chapter>.json`, as `make run PROFILE=full`
            leaves them. A stated verdict that is not the same on nine of ten is not decided; one whose statement was
            not tried, or has been reworded since, says so.

    >>> ledger = Ledger("01", "arXiv 2510.23142")
    >>> ledger.holds("01.1", "abstract", "s = exp(ΔH)", measured=1.0000001, expected=1.0, tolerance=1e-5)
    >>> ledger.claims["01.1"].verdict
    'holds'
    >>> ledger.holds("01.2", "abstract", "Var(log s) = σ²/L: the slope", measured=Estimate(-1.1, 0.1, 64), expected=-1,
    ...              rules_out={"no law": 0.0})
    >>> ledger.claims["01.2"].shown
    '-1.10 ± 0.10'
    """

    chapter: str
    source: str
    stated: bool = True
    seeds: str | Path | None = None
    claims: dict[str, Claim] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("chapter", self.chapter), ("source", self.source)):
            if not checks.instance(name, value, str, "a string").strip():
                raise ValueError(f"{name}: expected some text, got {value!r}")
        checks.boolean("stated", self.stated)
        self._on_seeds = _read_seeds(self.seeds, self.chapter) if self.seeds is not None and self.stated else None

    def holds(self, id: str, section: str, statement: str, *, measured: float | Estimate, expected: Expected,
              tolerance: float | None = None, rules_out: float | Mapping[str, float] | None = None,
              source: str | None = None, formulas: Iterable[int] = ()) -> None:
        """Enter a statement that is true: `measured` is what is expected, and is not its rival.

        Args:
            id: the chapter's number, a point and a name, such as "04.12".
            section: where the source says it.
            statement: what it says.
            measured: a number, or an `Estimate`.
            expected: a number; of an `Estimate` also a pair (low, high), for an inequality.
            tolerance: of a number; an `Estimate` brings its own.
            rules_out: what `measured` must differ from: a number, or several by name. An `Estimate` needs one.
            source: the ledger's, unless named.
            formulas: the source's displayed formulas that this settles, by their numbers (`book.equations`).
        """
        self._enter(HOLDS, id, section, statement, source, measured, expected, tolerance, rules_out, formulas)

    def corrected(self, id: str, section: str, statement: str, *, correction: str, measured: float | Estimate,
                  expected: float, as_printed: float, tolerance: float | None = None,
                  rules_out: float | Mapping[str, float] | None = None, source: str | None = None,
                  formulas: Iterable[int] = ()) -> None:
        """Enter a statement that needs `correction`: `expected`, with it, is met, and `as_printed` is not."""
        self._enter(CORRECTED, id, section, statement, source, measured, expected, tolerance, rules_out, formulas,
                    as_printed=as_printed, correction=correction)

    def refuted(self, id: str, section: str, statement: str, *, counterexample: str, measured: float | Estimate,
                expected: Expected, tolerance: float | None = None,
                rules_out: float | Mapping[str, float] | None = None, source: str | None = None,
                formulas: Iterable[int] = ()) -> None:
        """Enter a source's statement that is false: `measured` is not `expected`, the value that it says."""
        self._enter(REFUTED, id, section, statement, source, measured, expected, tolerance, rules_out, formulas,
                    counterexample=counterexample)

    def _enter(self, kind: str, id: str, section: str, statement: str, source: str | None, measured: Any, expected: Any,
               tolerance: Any, rules_out: Any, formulas: Any, as_printed: Any = None, **note: str) -> None:
        source = self.source if source is None else source
        for name, value in {"id": id, "section": section, "statement": statement, "source": source, **note}.items():
            if not isinstance(value, str) or not value.strip():
                raise LedgerError(f"{id}: {name}: expected some text, got {checks.shown(value)}")
        if not re.fullmatch(rf"{re.escape(self.chapter)}\.\w+", id):
            raise LedgerError(f"{id}: id: expected {self.chapter}. and a number, got {id!r}")
        if source != OWN and source.strip().lower() == OWN:
            raise LedgerError(f"{id}: source: expected {OWN!r} for our own, got {source!r}")
        if kind != HOLDS and source == OWN:
            raise LedgerError(f"{id}: source: what is {kind} needs someone else who said it")
        expected, rivals = _expected(id, expected), _rivals(id, rules_out)
        correction = next(iter(note.values()), None)
        if kind == CORRECTED:
            rivals |= {"as printed": _number(id, "as_printed", as_printed)}
        claim = Claim(id, self.chapter, source, section, statement, 0.0, expected, 0.0, kind, correction,
                      _formulas(id, formulas, source), rules_out=rivals or None)
        if isinstance(measured, Estimate):
            claim = self._judged(claim, measured, tolerance)
        else:
            claim = _compared(claim, _number(id, "measured", measured), _number(id, "tolerance", tolerance, minimum=0))
        known = self.claims.get(id, claim)
        if known.statement != statement:
            raise LedgerError(f"{id} ({statement}): the id is taken by {known.statement!r}; where that has only been "
                              f"reworded, del ledger.claims[{id!r}]")
        self.claims[id] = claim

    def _judged(self, claim: Claim, estimate: Estimate, tolerance: Any) -> Claim:
        """The claim with the verdict of an estimate."""
        rivals, expected, kind = claim.rules_out or {}, claim.expected, claim.verdict
        if tolerance is not None:
            raise LedgerError(f"{claim.id}: tolerance: an Estimate brings its own, got {checks.shown(tolerance)}")
        if kind == HOLDS and not rivals:
            raise LedgerError(f"{claim.id}: rules_out: an Estimate needs the value that it rules out, got None")
        least, most = expected if isinstance(expected, tuple) else (expected, expected)
        for name, rival in rivals.items():
            # A bound of a range may be its rival: "more than 0" rules 0 out.
            if rival == least == most or least < rival < most:
                raise LedgerError(f"{claim.id}: rules_out: {name or 'the rival'}, {rival:.6g}, is what is expected")
        value, error = (_number(claim.id, f"measured.{name}", getattr(estimate, name))
                        for name in ("value", "standard_error"))
        low, high = estimate.interval()
        verdict = verdict_of(kind, estimate, expected, rivals)
        claim = replace(claim, measured=value, standard_error=error, low=low, high=high, count=estimate.count,
                        tolerance=(high - low) / 2)
        if verdict not in (kind, UNDECIDED) and self.stated:
            raise LedgerError(f"{claim.id} ({claim.statement}): entered as '{kind}', but measured "
                              f"{claim.shown}, 95% interval {low:.4g} to {high:.4g}, against {claim.shown_expected}")
        seeds = () if self._on_seeds is None else self._on_seeds.get((claim.id, claim.statement))
        if seeds and seeds.count(verdict) < STABLE * len(seeds):
            verdict = UNDECIDED
        needed = samples_needed(estimate, expected, rivals) if verdict == UNDECIDED else None
        # A correction or a counterexample says nothing where data do not bear it out.
        return replace(claim, verdict=verdict, seeds=seeds, samples_needed=needed,
                       correction=claim.correction if verdict == kind else None)

    def __repr__(self) -> str:
        return f"Ledger of chapter {self.chapter}: {summarise(self.claims.values())}"

    def _repr_markdown_(self) -> str:
        return markdown(self.claims.values())

    def save(self, results: str | Path) -> None:
        """Write the claims to `<results>/ledger/<chapter>.json`, where `collect` finds them."""
        folder = Path(checks.instance("results", results, (str, Path), "a folder")) / "ledger"
        folder.mkdir(parents=True, exist_ok=True)
        claims = [claim.as_json() for claim in self.claims.values()]
        _write(folder / f"{self.chapter}.json", json.dumps(claims, indent=1, ensure_ascii=False))


def _compared(claim: Claim, measured: float, tolerance: float) -> Claim:
    """The claim with an exact number, which is what the entry says, or LedgerError."""
    claim = replace(claim, measured=measured, tolerance=tolerance)
    least, most = claim.expected if isinstance(claim.expected, tuple) else (claim.expected, claim.expected)
    agrees = least - tolerance <= measured <= most + tolerance
    if agrees == (claim.verdict == REFUTED):
        raise LedgerError(f"{claim.id} ({claim.statement}): entered as '{claim.verdict}', but measured {measured} "
                          f"against {claim.expected}, tolerance {tolerance}")
    for name, rival in (claim.rules_out or {}).items():
        if abs(measured - rival) <= tolerance:
            end = (": it needs no correction, as far as this check can tell" if name == "as printed"
                   else ", which it should rule out")
            raise LedgerError(f"{claim.id}: {measured} is within {tolerance} of {rival}{end}")
    return claim


def _number(id: str, name: str, value: Any, minimum: float | None = None) -> float:
    try:
        return checks.number(name, value, minimum=minimum)
    except (TypeError, ValueError) as error:
        raise LedgerError(f"{id}: {error}") from None


def _read_seeds(folder: str | Path, chapter: str) -> dict[tuple[str, str], tuple[str, ...]]:
    """The verdicts on other seeds, by id and statement."""
    stored = Path(checks.instance("seeds", folder, (str, Path), "a folder")) / f"{chapter}.json"
    if not stored.is_file():
        return {}
    try:
        return {(id, entry["statement"]): tuple(entry["on_seeds"])
                for id, entry in json.loads(stored.read_text())["verdicts"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LedgerError(f"seeds: {stored} is not what `make run PROFILE=full` writes: {error!r}") from None


def _expected(id: str, expected: Any) -> Expected:
    if not isinstance(expected, tuple):
        return _number(id, "expected", expected)
    ends = [end if end in (-math.inf, math.inf) else _number(id, "expected", end) for end in expected]
    if len(ends) != 2 or not ends[0] < ends[1] or ends == [-math.inf, math.inf]:
        raise LedgerError(f"{id}: expected: expected a number, or a range (low, high), got {expected!r}")
    return float(ends[0]), float(ends[1])


def _rivals(id: str, rules_out: Any) -> dict[str, float]:
    if rules_out is None:
        return {}
    if not isinstance(rules_out, Mapping):
        rules_out = {"": rules_out}
    if "as printed" in rules_out:
        raise LedgerError(f"{id}: rules_out: what is printed is a correction's as_printed")
    return {str(name): _number(id, "rules_out", value) for name, value in rules_out.items()}


def _formulas(id: str, formulas: Any, source: str) -> tuple[int, ...]:
    numbers = list(formulas) if isinstance(formulas, Iterable) else [formulas]
    for i, number in enumerate(numbers):
        try:
            numbers[i] = checks.integer("formulas", number, 1, len(FORMULAS) if source == NOTES else 0)
        except (TypeError, ValueError):
            raise LedgerError(f"{id}: formulas: the notes have 1 to {len(FORMULAS)}, other sources none; got "
                              f"{checks.shown(number)} of {source}") from None
    return tuple(dict.fromkeys(numbers))


def collect(results: str | Path) -> list[Claim]:
    """All claims that chapters saved under `results`, in the order of chapters.

    Raises:
        ValueError: an id that occurs twice.
    """
    folder = Path(checks.instance("results", results, (str, Path), "a folder")) / "ledger"
    claims = [Claim.from_json(claim) for path in sorted(folder.glob("*.json"))
              for claim in json.loads(path.read_text())]
    twice = [id for id, count in Counter(claim.id for claim in claims).items() if count > 1]
    if twice:
        raise ValueError(f"results: these claims occur twice: {', '.join(twice)}")
    return claims


def summarise(claims: Iterable[Claim]) -> str:
    """One line: how many claims there are, and how many have each verdict.

    >>> summarise([])
    '0 claims: 0 holds, 0 holds with a correction, 0 refuted, 0 not decided by these data'
    """
    return _counts(Counter(claim.verdict for claim in _claims(claims)), "claims")


def by_source(claims: Iterable[Claim]) -> str:
    """Who says what, source by source, as Markdown: displayed formulas, what stands in the text, and our own entries.

    A formula counts once, whatever the number of its entries, with the verdict that its reader must know of first:
    refuted, then holds with a correction, then not decided.
    """
    claims = _claims(claims)
    by_formula, texts = formula_verdicts(claims), defaultdict(list)
    for claim in claims:
        if not claim.formulas:
            texts[claim.source].append(claim.verdict)
    lines = []
    if by_formula:
        lines.append(f"- {NOTES}, of its {len(FORMULAS)} displayed formulas "
                     + _counts(Counter(by_formula.values()), "have entries"))
    for source, verdicts in sorted(texts.items(), key=lambda item: (item[0] == OWN, item[0] != NOTES, item[0])):
        lines.append("- " + ("our own" if source == OWN else f"{source}, in its text") + ": "
                     + _counts(Counter(verdicts), "entries"))
    return "\n".join(lines)


def formula_verdicts(claims: Iterable[Claim]) -> dict[int, str]:
    """The verdict on each displayed formula of the notes that has an entry, by number."""
    found: dict[int, str] = {}
    for claim in claims:
        for number in claim.formulas:
            found[number] = max(found.get(number, HOLDS), claim.verdict,
                                key=(HOLDS, UNDECIDED, CORRECTED, REFUTED).index)
    return dict(sorted(found.items()))


def _counts(counts: Counter[str], noun: str) -> str:
    return f"{counts.total()} {noun}: " + ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)


def write_summary(results: str | Path) -> list[Claim]:
    """Write every chapter's claims to `<results>/ledger.json` and `<results>/ledger.md`, and return them."""
    claims, results = collect(results), Path(results)
    pages = {path.name.split("_")[0]: path.name for path in results.glob("[0-9][0-9]_*.html")}
    _write(results / "ledger.json", json.dumps([claim.as_json() for claim in claims], indent=1, ensure_ascii=False))
    _write(results / "ledger.md", f"# Ledger\n\n{summarise(claims)}.\n\n{by_source(claims)}\n\n"
                                  f"{markdown(claims, pages)}\n\n{_formula_table(claims, pages)}\n")
    return claims


def markdown(claims: Iterable[Claim], pages: Mapping[str, str] | None = None) -> str:
    """The claims as a Markdown table; its ids lead to the place in the chapter that speaks of them, and back.

    Args:
        claims: the claims.
        pages: of each chapter, the page that it stands on; None inside a chapter, whose page is this one.
    """
    lines = ["| entry | source | statement | measured | expected | verdict | correction or counterexample |",
             "|---|---|---|---|---|---|---|"]
    for c in _claims(claims):
        where = f"{'own' if c.source == OWN else c.source} {c.section}" + "".join(f" [{n}]" for n in c.formulas)
        cells = (_link(c, pages), where, c.statement, c.shown, c.shown_expected, c.shown_verdict, c.correction or "")
        lines.append("| " + " | ".join(re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _formula_table(claims: list[Claim], pages: Mapping[str, str]) -> str:
    verdicts = formula_verdicts(claims)
    lines = ["## Displayed formulas of the notes", "",
             "| | section | formula | entries | verdict |", "|---|---|---|---|---|"]
    for number, formula in FORMULAS.items():
        entries = " ".join(_link(c, pages) for c in claims if number in c.formulas)
        lines.append(f"| {number} | {section_of(number)} | " + formula.replace("|", "\\|")
                     + f" | {entries} | {verdicts.get(number, 'no entry')} |")
    return "\n".join(lines)


def _link(claim: Claim, pages: Mapping[str, str] | None) -> str:
    """In a chapter, an anchor of its own that leads up to the chapter's; elsewhere, a link to that."""
    if pages is None:
        return f'<a id="ledger-{claim.id}" href="#{claim.id}">{claim.id}</a>'
    return f"[{claim.id}]({pages[claim.chapter]}#{claim.id})" if claim.chapter in pages else claim.id


def _claims(claims: Iterable[Claim]) -> list[Claim]:
    if not isinstance(claims, Iterable):
        raise TypeError(f"claims: expected claims, got {checks.shown(claims)}")
    return [checks.instance(f"claims[{i}]", claim, Claim) for i, claim in enumerate(claims)]


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)
