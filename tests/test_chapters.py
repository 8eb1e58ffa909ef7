"""The chapters as texts: what their ledgers say, where the prose says it, and that the two agree."""

import json
import re

import nbformat
import pytest

from conftest import ROOT
from deltah.book.claims import VERDICTS
from deltah.book.equations import FORMULAS

CHAPTERS = sorted(ROOT.glob("notebooks/[0-9][0-9]_*.ipynb"))
ROW = re.compile(r"""
    ^\|\ <a\ id="ledger-(?P<id>[\w.]+)"\ href="\#(?P=id)">(?P=id)</a>
    \ \|\ (?P<source>.*?)\ \|\ (?P<statement>.*)\ \|\ (?P<measured>[^|]*)\ \|\ (?P<expected>[^|]*)
    \ \|\ (?P<verdict>[^|]*)\ \|\ (?P<note>.*)\ \|$""", re.MULTILINE | re.VERBOSE)
ANCHOR = re.compile(r'<a id="([\w.]+)" href="#ledger-\1">\[\1\]</a>')
LINKS = r"(?:\[[\w.]+\]\(#ledger-[\w.]+\)(?:,| to| and)?\s*)+"
SAID = re.compile(rf"({'|'.join(sorted(VERDICTS, key=len, reverse=True))})[^|\[]*({LINKS})")


def prose(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def rows(notebook):
    """The rows of the ledger that ends a chapter, by id."""
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    table = next(text for text in (output.get("data", {}).get("text/markdown", "") for output in outputs)
                 if text.startswith("| entry |"))
    return {match["id"]: match.groupdict() for match in ROW.finditer(table)}


@pytest.fixture(params=CHAPTERS, ids=lambda path: path.stem)
def chapter(request):
    return nbformat.read(request.param, 4)


def test_every_entry_is_spoken_of_in_one_place(chapter):
    anchors = ANCHOR.findall("\n".join(prose(chapter)))
    assert sorted(anchors) == sorted(rows(chapter)), "an entry without an anchor, or an anchor without an entry"


def test_every_link_leads_to_an_entry(chapter):
    links = re.findall(r"#ledger-([\w.]+)", "\n".join(prose(chapter)))
    assert links and set(links) <= set(rows(chapter))


def test_a_chapter_opens_with_what_it_found_and_with_its_verdicts(chapter):
    opening, entries = prose(chapter)[0], rows(chapter)
    found = opening.split("## In short")[1].split("What is checked")[0]
    assert 3 <= len(re.findall(r"^- ", found, re.M)) <= 7 and "**What to do" in found
    said = [verdict for line in opening.splitlines() if line.startswith("|") for verdict in SAID.findall(line)]
    assert said
    for verdict, ids in said:
        for entry in re.findall(r"#ledger-([\w.]+)", ids):
            # Of seeds and samples the opening says nothing.
            assert entries[entry]["verdict"].split(" (")[0] == verdict, entry


def test_what_was_tried_on_other_seeds_is_what_the_chapter_says(chapter):
    entries = rows(chapter)
    stored = ROOT / "data" / "seeds" / f"{next(iter(entries)).split('.')[0]}.json"
    tried = json.loads(stored.read_text())["verdicts"] if stored.is_file() else {}
    for id, row in entries.items():
        if "±" in row["measured"]:
            statement = row["statement"].replace("\\|", "|")
            there = id in tried and tried[id]["statement"] == statement
            assert ("not tried on other seeds" in row["verdict"]) != there, f"{id}: run make sync"
            assert not there or len(tried[id]["on_seeds"]) == 10
    assert set(tried) <= {id for id, row in entries.items() if "±" in row["measured"]}, "run make run PROFILE=full"


def test_every_displayed_formula_of_the_notes_has_an_entry():
    settled = {int(number) for path in CHAPTERS for row in rows(nbformat.read(path, 4)).values()
               for number in re.findall(r"\[(\d+)\]", row["source"])}
    assert sorted(settled) == list(FORMULAS)
