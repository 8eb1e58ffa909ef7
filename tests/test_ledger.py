import json

import pytest

from deltah import Ledger, ledger
from deltah.book.ledger import LedgerError

COMMON = dict(section="2.1", statement="x = y")


def test_a_claim_that_holds_and_one_that_does_not():
    book = Ledger("01", "notes")
    book.holds("01.1", **COMMON, measured=1.0, expected=1.05, tolerance=0.1)
    with pytest.raises(LedgerError, match="01.2 .* entered as 'holds', but measured 1.0 against 1.3"):
        book.holds("01.2", **COMMON, measured=1.0, expected=1.3, tolerance=0.1)
    assert list(book.claims) == ["01.1"]


def test_nan_neither_holds_nor_refutes():
    with pytest.raises(LedgerError, match="measured nan"):
        Ledger("01", "notes").holds("01.1", **COMMON, measured=float("nan"), expected=1.0, tolerance=1.0)
    with pytest.raises(LedgerError, match="measured nan"):
        Ledger("01", "notes").refuted("01.1", **COMMON, counterexample="", measured=float("nan"), expected=1.0,
                                      tolerance=1.0)


def test_a_correction_must_be_right_and_needed():
    book = Ledger("01", "notes")
    book.corrected("01.1", **COMMON, correction="x = −y", measured=1.0, expected=1.0, as_printed=-1.0, tolerance=0.1)
    assert book.claims["01.1"].verdict == "holds with a correction"
    assert book.claims["01.1"].correction == "x = −y (as printed: -1)"
    with pytest.raises(LedgerError, match="needs no correction"):
        book.corrected("01.2", **COMMON, correction="", measured=1.0, expected=1.0, as_printed=1.0, tolerance=0.1)
    with pytest.raises(LedgerError, match="entered as 'holds with a correction'"):
        book.corrected("01.3", **COMMON, correction="", measured=1.0, expected=2.0, as_printed=3.0, tolerance=0.1)


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
    assert [claim.shown for claim in book.claims.values()] == ["0 = 0", "0.99 = 1"]
    assert repr(book) == "Ledger of chapter 01: 2 claims: 2 holds, 0 holds with a correction, 0 refuted"
    assert "| 01.2 | notes | 2.1 | x = y | 0.99 = 1 | holds |  |" in book._repr_markdown_()
