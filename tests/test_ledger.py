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
    (torch.ones(1), r"a float32 tensor of shape \[1\]"),
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
    assert book.claims["01.1"].correction == "x = −y"
    assert book.claims["01.1"].shown_expected == "1 ± 0.1; rules out -1 (as printed)"
    with pytest.raises(LedgerError, match="it needs no correction"):
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
    assert list(entries[0])[:10] == ["id", "chapter", "source", "section", "statement", "measured", "expected",
                                     "tolerance", "verdict", "correction"]
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
    book.holds("01.4", **COMMON, measured=0.0312, expected=0.0, tolerance=0.1)
    book.refuted("01.5", **COMMON, counterexample="two", measured=0.9031, expected=0.9, tolerance=1e-3)
    claims = book.claims.values()
    assert [claim.shown for claim in claims] == ["≤ 1e-12", "0.99", "123.5", "0.031", "0.903"]
    assert [claim.shown_expected for claim in claims] == ["0", "1 ± 0.03", "123.5", "0 ± 0.1", "not 0.9 ± 0.001"]
    assert repr(book) == ("Ledger of chapter 01: 5 claims: 4 holds, 0 holds with a correction, 1 refuted, "
                          "0 not decided by these data")
    assert ('| <a id="ledger-01.2" href="#01.2">01.2</a> | notes 2.1 | x = y | 0.99 | 1 ± 0.03 | holds |  |'
            in book._repr_markdown_())


def estimate(value, error=0.1, count=101):
    return dh.Estimate(value, error, count)


@pytest.mark.parametrize("value, verdict", [(1.0, ledger.HOLDS), (1.19, ledger.HOLDS), (0.85, ledger.HOLDS)])
def test_an_estimate_holds_where_its_interval_leaves_the_rival_out(value, verdict):
    book = Ledger("01", "notes")
    book.holds("01.1", **COMMON, measured=estimate(value), expected=1.0, rules_out={"zero": 0.0, "the other sign": -1})
    assert book.claims["01.1"].verdict == verdict
    assert book.claims["01.1"].rules_out == {"zero": 0.0, "the other sign": -1.0}


@pytest.mark.parametrize("factor", [0.0, 0.5, -1.0])
def test_a_prediction_of_zero_half_or_the_other_sign_does_not_hold(factor):
    book = Ledger("01", "notes")
    with pytest.raises(LedgerError, match=r"entered as 'holds', but measured 1.00 ± 0.10, 95% interval 0.8\d+ to"):
        book.holds("01.1", **COMMON, measured=estimate(1.0), expected=factor, rules_out=1.0)
    assert not book.claims


def test_an_estimate_that_leaves_its_rival_in_decides_nothing():
    """Its entry says with how many samples one would: on so many, nine estimates of ten do."""
    book = Ledger("01", "notes")
    book.holds("01.1", **COMMON, measured=estimate(0.5, 0.4), expected=1.0, rules_out=0.0)
    claim = book.claims["01.1"]
    assert claim.verdict == ledger.UNDECIDED
    assert claim.shown_verdict == "not decided by these data (about 680 samples would, 101 are here)"
    spread, generator = 0.4 * 101 ** 0.5, torch.Generator().manual_seed(0)
    means = 1.0 + spread / claim.samples_needed ** 0.5 * torch.randn(4000, generator=generator)
    decided = 0
    for value in means.tolist():
        low, high = estimate(value, spread / claim.samples_needed ** 0.5, claim.samples_needed).interval()
        # Half of what is expected is the nearest rival.
        decided += low > 0.5
    assert 0.88 < decided / 4000 < 0.92


def test_a_distance_below_the_error_is_noise_and_needs_ten_times_the_samples_at_least():
    book = Ledger("01", "notes")
    for id, value in (("01.1", 0.001), ("01.2", -0.05), ("01.3", 0.1)):
        book.holds(id, **COMMON, measured=estimate(value), expected=(0.0, float("inf")), rules_out=0.0)
    assert [claim.samples_needed for claim in book.claims.values()] == [1062] * 3


def test_an_inequality_holds_where_the_whole_interval_lies_within():
    book = Ledger("01", "notes")
    positive = (0.0, float("inf"))
    book.holds("01.1", **COMMON, measured=estimate(1.0), expected=positive, rules_out=0.0)
    book.holds("01.2", **COMMON, measured=estimate(0.1), expected=positive, rules_out=0.0)
    assert [claim.verdict for claim in book.claims.values()] == [ledger.HOLDS, ledger.UNDECIDED]
    assert book.claims["01.1"].shown_expected == "≥ 0; rules out 0"
    with pytest.raises(LedgerError, match="entered as 'holds'"):
        book.holds("01.3", **COMMON, measured=estimate(-1.0), expected=positive, rules_out=0.0)
    for wrong in ((1.0, 0.0), (0.0, 1.0, 2.0), (-float("inf"), float("inf")), ()):
        with pytest.raises(LedgerError, match="expected: expected a number, or a range"):
            book.holds("01.3", **COMMON, measured=estimate(1.0), expected=wrong, rules_out=0.0)
    with pytest.raises(LedgerError, match="expected: expected a number, got nan"):
        book.holds("01.3", **COMMON, measured=estimate(1.0), expected=(float("nan"), 1.0), rules_out=0.0)
    with pytest.raises(LedgerError, match="rules_out: half, 0.5, is what is expected"):
        book.holds("01.3", **COMMON, measured=estimate(1.0), expected=positive, rules_out={"half": 0.5})


def test_a_number_holds_in_a_range_and_is_refuted_outside():
    """What is said to be at most 0 is refuted by more, not by less."""
    book = Ledger("01", "notes")
    at_most = (-float("inf"), 0.0)
    book.holds("01.1", **COMMON, measured=-0.1, expected=at_most, tolerance=1e-9)
    book.holds("01.2", **COMMON, measured=1e-10, expected=at_most, tolerance=1e-9)
    book.refuted("01.3", **COMMON, counterexample="three responses", measured=0.1, expected=at_most, tolerance=1e-9)
    assert book.claims["01.3"].shown_expected == "not ≤ 0"
    for method, measured in (("holds", 0.1), ("refuted", -0.1), ("refuted", 1e-10)):
        note = {} if method == "holds" else {"counterexample": "three responses"}
        with pytest.raises(LedgerError, match=f"entered as '{method}'"):
            getattr(book, method)("01.4", **COMMON, **note, measured=measured, expected=at_most, tolerance=1e-9)


@pytest.mark.parametrize("error, verdict", [(0.2, ledger.HOLDS), (0.3, ledger.UNDECIDED)])
def test_half_and_twice_are_rivals_of_every_expected_value(error, verdict):
    book = Ledger("01", "notes")
    book.holds("01.1", **COMMON, measured=estimate(1.0, error), expected=1.0, rules_out={"zero": 0.0})
    assert book.claims["01.1"].verdict == verdict
    # In place of what is true, half of it holds with no error at all.
    half = Ledger("01", "notes", stated=False)
    half.holds("01.1", **COMMON, measured=estimate(1.0, error), expected=0.5, rules_out={"zero": 0.0})
    assert half.claims["01.1"].verdict != ledger.HOLDS


def test_a_correction_by_an_estimate_leaves_the_printed_value_out():
    book = Ledger("01", "notes")
    note = dict(correction="x = −y", expected=1.0, as_printed=-1.0)
    book.corrected("01.1", **COMMON, **note, measured=estimate(1.1))
    book.corrected("01.2", **COMMON, **note, measured=estimate(0.1, 1.0))
    assert [claim.verdict for claim in book.claims.values()] == [ledger.CORRECTED, ledger.UNDECIDED]
    with pytest.raises(LedgerError, match="entered as 'holds with a correction'"):
        book.corrected("01.3", **COMMON, **note, measured=estimate(-1.0))


def test_a_refutation_by_an_estimate_leaves_what_is_said_out():
    book = Ledger("01", "notes")
    note = dict(counterexample="two tokens", expected=1.0)
    book.refuted("01.1", **COMMON, **note, measured=estimate(0.0))
    book.refuted("01.2", **COMMON, **note, measured=estimate(0.9))
    assert [claim.verdict for claim in book.claims.values()] == [ledger.REFUTED, ledger.UNDECIDED]
    with pytest.raises(LedgerError, match="entered as 'refuted'"):
        book.refuted("01.3", **COMMON, **note, measured=estimate(0.9), rules_out=0.0)


def test_an_estimate_needs_a_rival_and_no_tolerance():
    book = Ledger("01", "notes")
    with pytest.raises(LedgerError, match="01.1: rules_out: an Estimate needs the value that it rules out, got None"):
        book.holds("01.1", **COMMON, measured=estimate(1.0), expected=1.0)
    with pytest.raises(LedgerError, match="01.1: tolerance: an Estimate brings its own, got 0.5"):
        book.holds("01.1", **COMMON, measured=estimate(1.0), expected=1.0, rules_out=0.0, tolerance=0.5)
    with pytest.raises(LedgerError, match="01.1: rules_out: zero, 1, is what is expected"):
        book.holds("01.1", **COMMON, measured=estimate(1.0), expected=1.0, rules_out={"zero": 1.0})
    with pytest.raises(LedgerError, match="01.1: measured.standard_error: expected a number, got nan"):
        book.holds("01.1", **COMMON, measured=estimate(1.0, float("nan")), expected=1.0, rules_out=0.0)
    with pytest.raises(LedgerError, match="01.1: rules_out: expected a number, got None"):
        book.holds("01.1", **COMMON, measured=estimate(1.0), expected=1.0, rules_out={"zero": None})
    with pytest.raises(LedgerError, match="1.0 is within 0.1 of 1.05, which it should rule out"):
        book.holds("01.1", **COMMON, measured=1.0, expected=1.0, tolerance=0.1, rules_out=1.05)
    assert not book.claims


def test_our_own_claims_are_not_refuted_but_counted_apart(tmp_path):
    book = Ledger("01", "notes")
    with pytest.raises(LedgerError, match="source: what is refuted needs someone else who said it"):
        book.refuted("01.1", **COMMON, counterexample="two", measured=2.0, expected=1.0, tolerance=0.1, source="deltah")
    book.holds("01.1", **COMMON, **NUMBERS, source="deltah")
    book.holds("01.2", "2.1", "of two formulas", **NUMBERS, formulas=(5, 6))
    book.corrected("01.3", "2.1", "one of them again", **CHECKS["corrected"], formulas=[6])
    book.holds("01.4", "abstract", "s", **NUMBERS, source="arXiv 2510.23142")
    assert ledger.by_source(book.claims.values()).splitlines() == [
        "- notes, of its 97 displayed formulas 2 have entries: 1 holds, 1 holds with a correction, 0 refuted, "
        "0 not decided by these data",
        "- arXiv 2510.23142, in its text: 1 entries: 1 holds, 0 holds with a correction, 0 refuted, "
        "0 not decided by these data",
        "- our own: 1 entries: 1 holds, 0 holds with a correction, 0 refuted, 0 not decided by these data"]
    book.save(tmp_path)
    (tmp_path / "01_first.html").write_text("")
    ledger.write_summary(tmp_path)
    text = (tmp_path / "ledger.md").read_text()
    assert "| [01.1](01_first.html#01.1) | own 2.1 |" in text
    assert ("| 6 | 2.1 | (2) = −Σ δθ ∂ Σ π log π | [01.2](01_first.html#01.2) [01.3](01_first.html#01.3) | "
            "holds with a correction |") in text
    assert "| 7 | 2.1 | (3) = −Σ δθ Σ ∂π log π |  | no entry |" in text
    book.holds("01.6", "2.1", "the same twice", **NUMBERS, formulas=(np.int64(5), 5))
    assert book.claims["01.6"].formulas == (5,) and type(book.claims["01.6"].formulas[0]) is int
    with pytest.raises(LedgerError, match="source: expected 'deltah' for our own, got 'Deltah '"):
        book.refuted("01.7", **COMMON, counterexample="two", **NUMBERS | dict(measured=2.0), source="Deltah ")
    for formulas, source in ((98, "notes"), ([0], "notes"), (["6"], "notes"), ([[5]], "notes"), (True, "notes"),
                             (6, "arXiv 2510.23142")):
        with pytest.raises(LedgerError, match="formulas: the notes have 1 to 97, other sources none"):
            book.holds("01.5", **COMMON, **NUMBERS, formulas=formulas, source=source)


def test_other_data_get_their_own_verdict():
    """On another policy or seed, what contradicts an entry is a finding and no error; exact checks still are."""
    book = Ledger("01", "notes", stated=False)
    book.holds("01.1", **COMMON, measured=estimate(0.0), expected=1.0, rules_out=0.0)
    book.refuted("01.2", **COMMON, counterexample="two", measured=estimate(1.0), expected=1.0, rules_out=0.0)
    book.corrected("01.3", **COMMON, correction="x = −y", measured=estimate(-1.0), expected=1.0, as_printed=-1.0)
    assert [claim.verdict for claim in book.claims.values()] == [ledger.REFUTED, ledger.HOLDS, ledger.HOLDS]
    assert [claim.correction for claim in book.claims.values()] == [None] * 3
    with pytest.raises(LedgerError, match="entered as 'holds'"):
        book.holds("01.4", **COMMON, **NUMBERS | dict(measured=2.0))


@pytest.mark.parametrize("same, verdict", [(10, ledger.HOLDS), (9, ledger.HOLDS), (8, ledger.UNDECIDED)])
def test_a_verdict_is_the_same_on_nine_of_ten_seeds_or_not_decided(tmp_path, same, verdict):
    verdicts = ["holds"] * same + [ledger.UNDECIDED] * (10 - same)
    (tmp_path / "01.json").write_text(json.dumps({"verdicts": {"01.1": {"statement": "x = y", "on_seeds": verdicts}}}))
    book = Ledger("01", "notes", seeds=tmp_path)
    book.holds("01.1", **COMMON, measured=estimate(1.0), expected=1.0, rules_out=0.0)
    book.holds("01.2", **COMMON, measured=estimate(1.0), expected=1.0, rules_out=0.0)
    assert [claim.verdict for claim in book.claims.values()] == [verdict, ledger.HOLDS]
    where = "holds on 8 of 10 seeds" if same == 8 else f"on {same} of 10 seeds"
    assert where in book.claims["01.1"].shown_verdict
    assert book.claims["01.2"].shown_verdict == "holds (not tried on other seeds)"
    reworded = Ledger("01", "notes", seeds=tmp_path)
    reworded.holds("01.1", "2.1", "x = z", measured=estimate(1.0), expected=1.0, rules_out=0.0)
    assert reworded.claims["01.1"].shown_verdict == "holds (not tried on other seeds)"
    other = Ledger("01", "notes", stated=False, seeds=tmp_path)
    other.holds("01.1", **COMMON, measured=estimate(1.0), expected=1.0, rules_out=0.0)
    assert other.claims["01.1"].seeds == ()
    with pytest.raises(TypeError, match="seeds: expected a folder, got 3"):
        Ledger("01", "notes", seeds=3)
    with pytest.raises(TypeError, match="stated: expected True or False, got None"):
        Ledger("01", "notes", stated=None)
    for broken in ("", "[]", "{}", '{"verdicts": null}', '{"verdicts": {"01.1": ["holds"]}}'):
        (tmp_path / "01.json").write_text(broken)
        with pytest.raises(LedgerError, match="seeds: .*01.json is not what `make run PROFILE=full` writes"):
            Ledger("01", "notes", seeds=tmp_path)


@pytest.mark.parametrize("value, error, shown", [
    (-3.8123, 0.9234, "-3.81 ± 0.92"), (-3.8123, 0.0996, "-3.81 ± 0.10"), (26.56, 12.3, "27 ± 12"),
    (-0.00001, 0.31, "0.00 ± 0.31"), (1.234e-8, 5.1e-10, "(1.234 ± 0.051) × 1e-8"),
    (1234567.0, 4321.0, "1234600 ± 4300"), (1234567890.0, 4321.0, "(1.2345679 ± 0.0000043) × 1e9")])
def test_an_estimate_is_shown_with_two_digits_of_its_error(value, error, shown):
    book = Ledger("01", "notes", stated=False)
    book.holds("01.1", **COMMON, measured=estimate(value, error), expected=value + 1, rules_out=value - 1e9)
    assert book.claims["01.1"].shown == shown


def test_a_small_expected_value_is_not_shown_as_zero():
    book = Ledger("01", "notes")
    book.refuted("01.1", **COMMON, counterexample="blocks", measured=estimate(0.017, 0.0032), expected=1.18e-6)
    assert book.claims["01.1"].shown_expected == "not 1.2e-06"


def test_claims_are_stored_whole(tmp_path):
    book = Ledger("01", "notes")
    book.holds("01.1", **COMMON, measured=estimate(1.0), expected=(0, float("inf")), rules_out={"zero": 0.0},
               formulas=[5])
    book.holds("01.2", **COMMON, measured=dh.Estimate(1.0, 0.1, 1), expected=1.0, rules_out=0.0)
    book.holds("01.3", **COMMON, **NUMBERS)
    book.save(tmp_path)
    json.loads((tmp_path / "ledger" / "01.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert ledger.collect(tmp_path) == list(book.claims.values())
