"""Execute the chapters: what `make run` and `make sync` do.

    python notebooks/run.py run [--profile quick] [--chapter 01] [--set model=... problems=... device=...]
    python notebooks/run.py sync [--chapter 01]

`run` executes, two at a time, the chapters whose code, parameters, library or data changed since their last
executed notebook in results/<profile>/. `sync` pairs every percent script with its notebook, and executes with
default parameters those that changed in this sense since their outputs were stored, or the one named.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import multiprocessing
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
WORKERS = 2
# What a kernel says of itself while starting is nobody's business here.
QUIET_KERNEL = ["--log-level=ERROR"]
# Heavy imports wait for the functions that need them: an answer of "up to date" should come at once.


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "sync"])
    parser.add_argument("--profile", default="quick", help="a file of notebooks/profiles, without its ending")
    parser.add_argument("--chapter", help="a chapter's number; all of them when left out")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", dest="changes",
                        help="parameters that override the profile's")
    arguments = parser.parse_args()
    chapters = find_chapters(arguments.chapter)
    if arguments.action == "sync":
        return sync(chapters, force=arguments.chapter is not None)
    return run(chapters, arguments.profile, read_changes(arguments.changes))


def find_chapters(number: str | None) -> list[Path]:
    chapters = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.py"))
    if number is None:
        return chapters
    chosen = [chapter for chapter in chapters if chapter.name.split("_")[0] == number.zfill(2)]
    if not chosen:
        existing = ", ".join(chapter.name.split("_")[0] for chapter in chapters)
        sys.exit(f"CHAPTER: there is no chapter {number!r}; there are {existing}")
    return chosen


def read_changes(changes: list[str]) -> dict[str, str]:
    """NAME=VALUE pairs; a value that names an existing path is made absolute, as notebooks run elsewhere."""
    parameters = dict(change.split("=", 1) for change in changes)
    for name, value in parameters.items():
        if Path(value).exists():
            parameters[name] = str(Path(value).resolve())
    return parameters


def read_parameters(profile: str, chapter: Path, changes: dict[str, str]) -> dict[str, Any]:
    """A profile's parameters for a chapter: those of its section `all`, then those of the chapter's own."""
    import yaml

    path = NOTEBOOKS / "profiles" / f"{profile}.yaml"
    if not path.is_file():
        existing = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        sys.exit(f"PROFILE: there is no profile {profile!r}; there are {existing}")
    sections = yaml.safe_load(path.read_text()) or {}
    own = sections.get(chapter.name.split("_")[0]) or {}
    return {**(sections.get("all") or {}), **own, **changes, "results": str(ROOT / "results" / profile)}


def fingerprint(chapter: Path, parameters: dict[str, Any]) -> str:
    """Changes whenever the chapter, its parameters, the library or the shipped data do."""
    digest = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode())
    files = [chapter, *ROOT.glob("lib/deltah/**/*.py"), *(p for p in ROOT.glob("data/**/*") if p.is_file())]
    for path in sorted(files):
        if "__pycache__" not in path.parts:
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def run(chapters: list[Path], profile: str, changes: dict[str, str]) -> int:
    results = ROOT / "results" / profile
    jobs = []
    for chapter in chapters:
        parameters = read_parameters(profile, chapter, changes)
        mark = fingerprint(chapter, parameters)
        if stored_fingerprint(results / f"{chapter.stem}.ipynb") == mark:
            print(f"{chapter.stem}: up to date")
        else:
            jobs.append((chapter, parameters, mark))
    failures = execute_all(jobs, results) if jobs else 0
    if (results / "ledger").is_dir():
        report(results)
    return 1 if failures else 0


def stored_fingerprint(notebook: Path) -> str | None:
    try:
        return json.loads(notebook.read_text())["metadata"]["deltah"]["fingerprint"]
    except (OSError, ValueError, KeyError):
        return None


def execute_all(jobs: list[tuple[Path, dict[str, Any], str]], results: Path) -> int:
    """Execute chapters, two at a time; returns how many failed."""
    results.mkdir(parents=True, exist_ok=True)
    workers = min(WORKERS, len(jobs))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    started, failures = time.monotonic(), 0
    # Fresh interpreters: a forked one would inherit the parent's event loop.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = {}
        for position, (chapter, parameters, mark) in enumerate(jobs):
            print(f"{chapter.stem}: executing", flush=True)
            pending[pool.submit(execute, chapter, parameters, mark, results, position)] = chapter
        for done in as_completed(pending):
            problem = done.result()
            failures += problem is not None
            outcome = "done" if problem is None else "FAILED"
            print(f"{pending[done].stem}: {outcome}, {time.monotonic() - started:.0f} s into the run", flush=True)
            if problem:
                print(problem, flush=True)
    return failures


def execute(chapter: Path, parameters: dict[str, Any], mark: str, results: Path, position: int) -> str | None:
    """Execute one chapter into `results`; returns None, or a text that shows the cell that failed."""
    import nbformat
    import papermill

    target, partial = results / f"{chapter.stem}.ipynb", results / f"{chapter.stem}.partial.ipynb"
    bar = {"desc": chapter.stem, "position": position, "disable": not sys.stderr.isatty()}
    try:
        papermill.execute_notebook(chapter.with_suffix(".ipynb"), partial, parameters, kernel_name="python3",
                                   cwd=NOTEBOOKS, progress_bar=bar, extra_arguments=QUIET_KERNEL)
    except papermill.PapermillExecutionError as error:
        trace = error.traceback[-1] if error.traceback else ""
        return (f"\n{error.source}\n\n{trace}\n{error.ename}: {error.evalue}\n"
                f"The notebook up to this cell is {partial.relative_to(ROOT)}; once mended, run again.\n")
    notebook = nbformat.read(partial, as_version=4)
    notebook.metadata["deltah"] = {"fingerprint": mark}
    write_html(notebook, results / f"{chapter.stem}.html")
    nbformat.write(notebook, partial)
    os.replace(partial, target)
    return None


def write_html(notebook: Any, path: Path) -> None:
    from nbconvert import HTMLExporter

    body, _ = HTMLExporter().from_notebook_node(notebook)
    write_text(path, body)


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name that then takes the file's place."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def report(results: Path) -> None:
    """Write the ledger and the index page, and print where they are."""
    from deltah.book import ledger

    claims = ledger.write_summary(results)
    rows = []
    for page in sorted(results.glob("[0-9][0-9]_*.html")):
        number = page.name.split("_")[0]
        own = ledger.summarise(claim for claim in claims if claim.chapter == number)
        rows.append(f'<li><a href="{page.name}">{html.escape(title(page))}</a><br><small>{own}</small></li>')
    write_text(
        results / "index.html",
        "<!doctype html><html lang=en><meta charset=utf-8><title>deltah</title>"
        "<style>body{font:16px/1.5 system-ui;max-width:44rem;margin:3rem auto;padding:0 1rem}li{margin:.6rem 0}</style>"
        f"<h1>deltah</h1><p>{ledger.summarise(claims)}. <a href=ledger.md>The ledger</a>, "
        f"<a href=ledger.json>as JSON</a>.</p><ul>{''.join(rows)}</ul></html>")
    print(f"ledger: {ledger.summarise(claims)}")
    for claim in claims:
        print(f"  {claim.id:8} {claim.verdict:24} {claim.statement}")
    print(f"open {(results / 'index.html').relative_to(ROOT)}")


def title(page: Path) -> str:
    """The chapter's heading, the first line of prose in its script."""
    for line in (NOTEBOOKS / page.with_suffix(".py").name).read_text().splitlines():
        if line.startswith("# # "):
            return line[4:]
    return page.stem


def sync(chapters: list[Path], force: bool) -> int:
    import jupytext
    import nbformat
    from jupytext.cli import jupytext as jupytext_command
    from nbclient import NotebookClient

    for chapter in chapters:
        jupytext_command(["--quiet", "--set-formats", "ipynb,py:percent", "--sync", str(chapter)])
        mark = fingerprint(chapter, parameters={})
        if not force and stored_fingerprint(chapter.with_suffix(".ipynb")) == mark:
            print(f"{chapter.stem}: paired, outputs up to date")
            continue
        print(f"{chapter.stem}: executing with default parameters", flush=True)
        notebook = jupytext.read(chapter.with_suffix(".ipynb"))
        NotebookClient(notebook, kernel_name="python3", coalesce_streams=True, timeout=None, record_timing=False,
                       extra_arguments=QUIET_KERNEL, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
        notebook.metadata["deltah"] = {"fingerprint": mark}
        partial = chapter.with_suffix(".partial.ipynb")
        nbformat.write(notebook, partial)
        os.replace(partial, chapter.with_suffix(".ipynb"))
    refresh_figures()
    return 0


def refresh_figures() -> None:
    """Renew the figures that the README shows, which are kept in notebooks/figures/."""
    for kept in (NOTEBOOKS / "figures").glob("*.png"):
        drawn = ROOT / "results" / "default" / "figures" / kept.name
        if drawn.is_file():
            shutil.copy(drawn, kept)


if __name__ == "__main__":
    sys.exit(main())
