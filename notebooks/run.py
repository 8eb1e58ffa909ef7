"""Execute the chapters: what `make run` and `make sync` do.

    python notebooks/run.py run [--profile quick] [--chapter 01] [--set model=... problems=... device=...]
    python notebooks/run.py sync [--chapter 01]

`run` executes, two at a time and each in a process of its own, the chapters whose code, parameters, library or data
changed since their last executed notebook in results/<profile>/, and where the profile says so also on other seeds.
`sync` pairs every percent script with its notebook, takes over the verdicts on other seeds that such a run has left,
and executes with default parameters those that changed in this sense since their outputs were stored, or the one named.
"""

from __future__ import annotations

import argparse
import html
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import inputs

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
WORKERS = 2
INTERRUPTED = 130
# What a kernel says of itself while starting is nobody's business here.
QUIET_KERNEL = ["--log-level=ERROR"]
OUT_OF_MEMORY = "most likely out of memory: give it more, a smaller MODEL or PROBLEMS, or one CHAPTER at a time"
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
    return run(chapters, arguments.profile, inputs.read_changes(arguments.changes, chapters))


def find_chapters(number: str | None) -> list[Path]:
    chapters = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.py"))
    if number is None:
        return chapters
    chosen = [chapter for chapter in chapters if chapter.name.split("_")[0] == number.zfill(2)]
    if not chosen:
        existing = ", ".join(chapter.name.split("_")[0] for chapter in chapters)
        sys.exit(f"CHAPTER: there is no chapter {number!r}; there are {existing}")
    return chosen


class Job(NamedTuple):
    """A chapter to execute, its parameters, and the fingerprint that its notebook will carry."""

    chapter: Path
    parameters: dict[str, Any]
    mark: str

    @property
    def results(self) -> Path:
        return Path(self.parameters["results"])

    @property
    def name(self) -> str:
        """The chapter, and where other seeds have their results, which seed."""
        return self.chapter.stem + (f", seed {self.results.name}" if self.results.parent.name == "seeds" else "")


def run(chapters: list[Path], profile: str, changes: dict[str, Any]) -> int:
    results = ROOT / "results" / profile
    status = execute_missing([(chapter, inputs.read_parameters(NOTEBOOKS, profile, chapter, changes))
                              for chapter in chapters])
    seeds = inputs.read_seeds(NOTEBOOKS, profile)
    if seeds and status != INTERRUPTED:
        status = max(status, try_seeds(chapters, results / "seeds", changes, seeds))
    report(results)
    return status


def execute_missing(wanted: list[tuple[Path, dict[str, Any]]], seeds: bool = True) -> int:
    """Execute chapters with parameters, but for those whose results are there; returns the exit status.

    Args:
        seeds: whether they read the verdicts on other seeds, which chapters on such seeds do not.
    """
    jobs = []
    for chapter, parameters in wanted:
        job = Job(chapter, parameters, inputs.fingerprint(ROOT, chapter, parameters, seeds))
        unfinished = note_of(job.results, chapter.stem).is_file()
        if not unfinished and stored_fingerprint(job.results / f"{chapter.stem}.ipynb") == job.mark:
            print(f"{job.name}: up to date")
        else:
            jobs.append(job)
    if not jobs:
        return 0
    inputs.check([job.chapter for job in jobs], [job.parameters for job in jobs])
    for job in jobs:
        set_aside(job.results, job.chapter)
    return execute_all(jobs)


def try_seeds(chapters: list[Path], folder: Path, changes: dict[str, Any], count: int) -> int:
    """Execute chapters on seeds 1 to `count`, at the sizes of their stored outputs; gather what their estimates say.

    <folder>/<chapter's number>.json holds the verdicts of each entry, seed by seed; `sync` ships it in data/seeds/.
    """
    chapters = [chapter for chapter in chapters if "seed" in inputs.parameter_names(chapter)]
    wanted = [(chapter, {**inputs.of_chapter(chapter, changes), "seed": seed, "results": str(folder / str(seed))})
              for chapter in chapters for seed in range(1, count + 1)]
    status = execute_missing(wanted, seeds=False)
    for chapter in chapters:
        number, verdicts = chapter.name.split("_")[0], {}
        ledgers = [folder / str(seed) / "ledger" / f"{number}.json" for seed in range(1, count + 1)]
        if all(path.is_file() for path in ledgers):
            for claim in (claim for path in ledgers for claim in json.loads(path.read_text())):
                if claim.get("standard_error") is not None:
                    entry = verdicts.setdefault(claim["id"], {"statement": claim["statement"], "on_seeds": []})
                    entry["on_seeds"].append(claim["verdict"])
            mark = inputs.fingerprint(ROOT, chapter, inputs.of_chapter(chapter, changes), seeds=False)
            write_text(folder / f"{number}.json", json.dumps({"fingerprint": mark, "verdicts": verdicts}, indent=1))
    return status


def stored_fingerprint(notebook: Path) -> str | None:
    try:
        return json.loads(notebook.read_text())["metadata"]["deltah"]["fingerprint"]
    except (OSError, ValueError, KeyError):
        return None


def note_of(results: Path, stem: str) -> Path:
    """The note that stands beside a chapter's results for as long as they are not those of its present code."""
    return results / f"{stem}.unfinished.json"


def set_aside(results: Path, chapter: Path, error: str = "not finished", message: str = "") -> None:
    """Note why a chapter has no results; claims of an earlier run are no claims of this one."""
    results.mkdir(parents=True, exist_ok=True)
    (results / "ledger" / f"{chapter.name.split('_')[0]}.json").unlink(missing_ok=True)
    write_text(note_of(results, chapter.stem), json.dumps({"error": error, "message": message}))


def execute_all(jobs: list[Job]) -> int:
    """Execute chapters, two at a time; returns the exit status: 0, 1 where one failed, 130 after an interrupt."""
    workers = min(WORKERS, len(jobs))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    # Fresh interpreters: a forked one would inherit the parent's event loop.
    context = multiprocessing.get_context("spawn")
    started, failures, running, waiting = time.monotonic(), 0, {}, list(enumerate(jobs))
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                position, job = waiting.pop(0)
                process = context.Process(target=execute, args=(job, position), daemon=True)
                process.start()
                running[process.sentinel] = process, job
                print(f"{job.name}: executing", flush=True)
                # Should this process be killed, the page says by itself what was not finished.
                write_index(job.results)
            for sentinel in wait(list(running)):
                process, job = running.pop(sentinel)
                process.join()
                problem = outcome(job.results, job.chapter, process.exitcode)
                failures += problem is not None
                print(f"{job.name}: {'done' if problem is None else 'FAILED'}, "
                      f"{time.monotonic() - started:.0f} s into the run", flush=True)
                if problem:
                    print(problem, flush=True)
    except KeyboardInterrupt:
        for process, job in running.values():
            process.terminate()
            process.join()
            set_aside(job.results, job.chapter, "interrupted")
        print("\ninterrupted; run again to go on", flush=True)
        return INTERRUPTED
    return 1 if failures else 0


def outcome(results: Path, chapter: Path, exit_code: int) -> str | None:
    """What to say of a chapter whose process has ended; None where it is done."""
    note = note_of(results, chapter.stem)
    if not note.is_file():
        return None
    if exit_code:
        how = signal.Signals(-exit_code).name if exit_code < 0 else f"exit status {exit_code}"
        set_aside(results, chapter, f"failed: its process died ({how})", f"The process that executed it died ({how}), "
                                                                         f"{OUT_OF_MEMORY}.")
    return json.loads(note.read_text())["message"]


def execute(job: Job, position: int) -> None:
    """Execute one chapter into its results; what went wrong is left in its note, which success takes away."""
    import nbformat
    import papermill

    chapter, results = job.chapter, job.results
    target, partial = results / f"{chapter.stem}.ipynb", results / f"{chapter.stem}.partial.ipynb"
    bar = {"desc": job.name, "position": position, "disable": not sys.stderr.isatty()}
    try:
        papermill.execute_notebook(chapter.with_suffix(".ipynb"), partial, job.parameters, kernel_name="python3",
                                   cwd=chapter.parent, progress_bar=bar, extra_arguments=QUIET_KERNEL)
        notebook = nbformat.read(partial, as_version=4)
        notebook.metadata["deltah"] = {"fingerprint": job.mark}
        write_html(notebook, results / f"{chapter.stem}.html")
        nbformat.write(notebook, partial)
        os.replace(partial, target)
        note_of(results, chapter.stem).unlink(missing_ok=True)
    except Exception as error:  # whatever it is, the other chapters go on
        name, message = describe(error)
        set_aside(results, chapter, f"failed: {name}", f"\n{message}\nThe notebook up to this cell is "
                                                       f"{os.path.relpath(partial)}; once mended, run again.\n")


def describe(error: Exception) -> tuple[str, str]:
    """The name of what ended a chapter, and a text that shows it."""
    from nbclient.exceptions import DeadKernelError
    from papermill import PapermillExecutionError

    if isinstance(error, PapermillExecutionError):
        trace = error.traceback[-1] if error.traceback else ""
        return error.ename, f"{error.source}\n\n{trace}\n{error.ename}: {error.evalue}"
    if isinstance(error, DeadKernelError):
        return "its kernel died", f"Its kernel died, {OUT_OF_MEMORY}."
    return type(error).__name__, f"{type(error).__name__}: {error}"


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
    """Write the index page, and print the ledger and where they are."""
    from deltah.book import ledger

    claims = write_index(results)
    print(f"ledger: {ledger.summarise(claims)}")
    for claim in claims:
        print(f"  {claim.id:8} {claim.verdict:26} {claim.statement}")
    print(ledger.by_source(claims))
    print(f"open {(results / 'index.html').relative_to(ROOT)}")


def write_index(results: Path) -> list[Any]:
    """Write the ledger, and the page that leads to every chapter; returns the claims."""
    from deltah.book import ledger

    claims = ledger.write_summary(results)
    stems = {path.name.split(".")[0] for ending in ("html", "unfinished.json")
             for path in results.glob(f"[0-9][0-9]_*.{ending}")}
    rows = "".join(f"<li>{row(results, stem, claims)}</li>" for stem in sorted(stems))
    write_text(
        results / "index.html",
        "<!doctype html><html lang=en><meta charset=utf-8><title>deltah</title>"
        "<style>body{font:16px/1.5 system-ui;max-width:44rem;margin:3rem auto;padding:0 1rem}li{margin:.6rem 0}</style>"
        f"<h1>deltah</h1><p>{ledger.summarise(claims)}. <a href=ledger.md>The ledger</a>, "
        f"<a href=ledger.json>as JSON</a>.</p><ul>{rows}</ul></html>")
    return claims


def row(results: Path, stem: str, claims: list[Any]) -> str:
    """A chapter's line of the index: its page and its claims, or what kept it from having any."""
    from deltah.book import ledger

    heading, note = html.escape(title(NOTEBOOKS / f"{stem}.py")), note_of(results, stem)
    if not note.is_file():
        own = ledger.summarise(claim for claim in claims if claim.chapter == stem.split("_")[0])
        return f'<a href="{stem}.html">{heading}</a><br><small>{own}</small>'
    error, partial = html.escape(json.loads(note.read_text())["error"]), results / f"{stem}.partial.ipynb"
    link = f' <a href="{partial.name}">The notebook up to this cell</a>' if partial.is_file() else ""
    return f"{heading}<br><small><strong>{error}</strong>.{link}</small>"


def title(script: Path) -> str:
    """The chapter's heading, the first line of prose in its script."""
    for line in script.read_text().splitlines() if script.is_file() else []:
        if line.startswith("# # "):
            return line[4:]
    return script.stem


def sync(chapters: list[Path], force: bool) -> int:
    import jupytext
    import nbformat
    from jupytext.cli import jupytext as jupytext_command
    from nbclient import NotebookClient

    keep_verdicts(chapters)
    for chapter in chapters:
        jupytext_command(["--quiet", "--set-formats", "ipynb,py:percent", "--sync", str(chapter)])
        mark = inputs.fingerprint(ROOT, chapter, parameters={})
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


def keep_verdicts(chapters: list[Path]) -> None:
    """Ship the verdicts on other seeds that `make run PROFILE=full` gathered of the chapters as they now are."""
    for chapter in chapters:
        name = f"{chapter.name.split('_')[0]}.json"
        found = ROOT / "results" / "full" / "seeds" / name
        mark = inputs.fingerprint(ROOT, chapter, parameters={}, seeds=False)
        if found.is_file() and json.loads(found.read_text())["fingerprint"] == mark:
            (ROOT / "data" / "seeds").mkdir(exist_ok=True)
            write_text(ROOT / "data" / "seeds" / name, found.read_text())


def refresh_figures() -> None:
    """Renew the figures that the README shows, which are kept in notebooks/figures/."""
    for kept in (NOTEBOOKS / "figures").glob("*.png"):
        drawn = ROOT / "results" / "default" / "figures" / kept.name
        if drawn.is_file():
            shutil.copy(drawn, kept)


if __name__ == "__main__":
    sys.exit(main())
