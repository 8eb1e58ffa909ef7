import json

import numpy as np
import pytest
import torch

import deltah as dh
from deltah import Ledger, ledger
from deltah.book.ledger import LedgerError

COMMON = dict(section="2.1", statement="x = y")


def test_a_claim_that_holds_and_one_that_does_not():
    book = Ledger("01", "notes")
    book.holds("01.1", **COMMON, measured=1.0, expected=1.05, tolerance=0.1)
    with pytest.raises(LedgerError, match="01.2 .* entered as 'holds', but measured 1.0 against 1.3"):
        book.holds("01.2", **COMMON, measured=1.0, expected=1.3, tolerance=0.1)
    assert list(book.claims) == ["01.1"]


NUMBERS = dict(measured=1.0, expected=1.0, tolerance=0.1)
CHECKS = {"holds": NUMBERS, "corrected": NUMBERS | dict(correction="x = −y", as_printed=-1.0),
          "refuted": NUMBERS | dict(counterexample="two tokens", measured=2.0)}


@pytest.mark.parametrize("value, shown", [
    (float("nan"), "nan"), (float("inf"), "inf"), (torch.tensor(float("nan")), "nan"), (np.float64("-inf"), "-inf"),
    (None, "None"), ("1.0", "'1.0'"), ([1.0], "list"), (True, "True"), (1j, "1j"),
    (dh.Estimate(1.0, 0.1, 10), "Estimate"), (torch.ones(1), r"a float32 tensor of shape \[1\]"),
], ids=repr)
@pytest.mark.parametrize("check, name", [(check, name) for check in CHECKS for name in CHECKS[check]
                                         if name not in ("correction", "counterexample")])
def test_what_is_no_number_neither_holds_nor_refutes(check, name, value, shown):
    book = Ledger("01", "notes")
    expected = "a number ≥ 0" if name == "tolerance" else "a number"
    with pytest.raises(LedgerError, match=f"01.1: {name}: expected {expected}, got {shown}"):
        getattr(book, check)("01.1", **COMMON, **CHECKS[check] | {name: value})
    assert not book.claims


@pytest.mark.parametrize("check", CHECKS)
def test_an_entry_that_says_nothing_is_refused(check):
    book = Ledger("01", "notes")
    enter, numbers = getattr(book, check), CHECKS[check]
    with pytest.raises(LedgerError, match="01.1: tolerance: expected a number ≥ 0, got -0.1"):
        enter("01.1", **COMMON, **numbers | dict(tolerance=-0.1))
    for name, value in [("statement", ""), ("statement", " "), ("statement", None), ("section", ""), ("section", 2.1),
                        ("source", ""), *((name, "") for name in numbers if name in ("correction", "counterexample"))]:
        with pytest.raises(LedgerError, match=f"01.1: {name}: expected some text"):
            enter("01.1", **COMMON | numbers | {name: value})
    for id in ("02.1", "1.1", "011", "01.", "01.1 ", "01"):
        with pytest.raises(LedgerError, match="id: expected 01. and a number"):
            enter(id, **COMMON, **numbers)
    for id in ("", None, 1.1):
        with pytest.raises(LedgerError, match="id: expected some text"):
            enter(id, **COMMON, **numbers)
    assert not book.claims
    enter("01.1", **COMMON, **{k: np.float32(v) if isinstance(v, float) else v for k, v in numbers.items()})
    enter("01.2b", **COMMON, **{k: torch.tensor(v) if isinstance(v, float) else v for k, v in numbers.items()})
    assert list(book.claims) == ["01.1", "01.2b"]
    assert {type(claim.measured) for claim in book.claims.values()} == {float}


def test_a_ledger_has_a_chapter_and_a_source():
    with pytest.raises(TypeError, match="chapter: expected a string, got 1"):
        Ledger(1, "notes")
    with pytest.raises(ValueError, match="source: expected some text"):
        Ledger("01", "")
    with pytest.raises(TypeError, match="results: expected a folder, got None"):
        Ledger("01", "notes").save(None)
    with pytest.raises(TypeError, match="results: expected a folder, got None"):
        ledger.write_summary(None)
    for function in (ledger.summarise, ledger.markdown):
        with pytest.raises(TypeError, match="claims: expected claims, got 3"):
            function(3)
        with pytest.raises(TypeError, match=r"claims\[0\]: expected a Claim, got 'x'"):
            function(["x"])


def test_an_id_is_one_statement():
    """A cell that is executed again enters its statement again; two statements cannot share an id."""
    book = Ledger("01", "notes")
    book.holds("01.1", **COMMON, **NUMBERS)
    book.holds("01.1", **COMMON, **NUMBERS | dict(measured=1.05))
    assert book.claims["01.1"].measured == 1.05
    with pytest.raises(LedgerError, match=r"01.1 \(y = z\): the id is taken by 'x = y'"):
        book.refuted("01.1", "2.1", "y = z", counterexample="none", measured=2.0, expected=1.0, tolerance=0.1)
    assert book.claims["01.1"].statement == "x = y"


def test_a_correction_must_be_right_and_needed():
    book = Ledger("01", "notes")
    book.corrected("01.1", **COMMON, correction="x = −y", measured=1.0, expected=1.0, as_printed=-1.0, tolerance=0.1)
    assert book.claims["01.1"].verdict == "holds with a correction"
    assert book.claims["01.1"].correction == "x = −y (as printed: -1)"
    with pytest.raises(LedgerError, match="needs no correction"):
        book.corrected("01.2", **COMMON, correction="x = −y", measured=1.0, expected=1.0, as_printed=1.0, tolerance=0.1)
    with pytest.raises(LedgerError, match="entered as 'holds with a correction'"):
        book.corrected("01.3", **COMMON, correction="x = −y", measured=1.0, expected=2.0, as_printed=3.0, tolerance=0.1)


def test_a_refutation_must_differ():
    book = Ledger("01", "notes")
    book.refuted("01.1", **COMMON, counterexample="two tokens", measured=2.0, expected=1.0, tolerance=0.1)
    with pytest.raises(LedgerError, match="entered as 'refuted'"):
        book.refuted("01.2", **COMMON, counterexample="none", measured=1.0, expected=1.0, tolerance=0.1)


def test_summary_collects_every_chapter(tmp_path):
    for chapter in ("02", "01"):
        book = Ledger(chapter, "notes")
        book.holds(f"{chapter}.1", section="2", statement="a | b", measured=0.0, expected=0.0, tolerance=1e-9)
        book.save(tmp_path)
    claims = ledger.write_summary(tmp_path)
    assert [claim.id for claim in claims] == ["01.1", "02.1"]
    entries = json.loads((tmp_path / "ledger.json").read_text())
    assert list(entries[0]) == ["id", "chapter", "source", "section", "statement", "measured", "expected", "tolerance",
                                "verdict", "correction"]
    text = (tmp_path / "ledger.md").read_text()
    assert "2 claims: 2 holds" in text and "a \\| b" in text
    (tmp_path / "ledger" / "03.json").write_text((tmp_path / "ledger" / "02.json").read_text())
    with pytest.raises(ValueError, match="these claims occur twice: 02.1"):
        ledger.collect(tmp_path)


def test_the_table_rounds_to_the_tolerance():
    book = Ledger("01", "notes")
    book.holds("01.1", **COMMON, measured=3.2e-16, expected=0.0, tolerance=1e-12)
    book.holds("01.2", **COMMON, measured=0.98765, expected=1.0, tolerance=0.03)
    book.holds("01.3", **COMMON, measured=123.456, expected=123.456, tolerance=0.0)
    assert [claim.shown for claim in book.claims.values()] == ["0 = 0", "0.99 = 1", "123.5 = 123.5"]
    assert repr(book) == "Ledger of chapter 01: 3 claims: 3 holds, 0 holds with a correction, 0 refuted"
    assert "| 01.2 | notes | 2.1 | x = y | 0.99 = 1 | holds |  |" in book._repr_markdown_()
