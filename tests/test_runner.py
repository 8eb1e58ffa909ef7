"""What `make run` does: for whom it executes a chapter again, what it refuses at once, and what a failure leaves."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jupytext
import nbformat
import pytest

from conftest import ROOT

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
PARAMETERS = 'model = "../data/policy"\nproblems = "none"\ndevice = "auto"\nresults = "none"\nx = 1'
# What a ledger saves, without the seconds that it takes to import the library.
CLAIM = """import json, pathlib
folder = pathlib.Path(results) / "ledger"
folder.mkdir(exist_ok=True)
(folder / "{number}.json").write_text(json.dumps([dict(id="{number}.1", chapter="{number}", source="", section="",
    statement="x = x", measured=x, expected=x, tolerance=0.1, verdict="holds", correction=None)]))"""


class Project:
    """A project in a folder of the test's own, with the real runner."""

    def __init__(self, root):
        self.root, self.notebooks, self.results = root, root / "notebooks", root / "results" / "quick"
        (self.notebooks / "profiles").mkdir(parents=True)
        (self.notebooks / "profiles" / "quick.yaml").write_text("all: {}\n")
        for name in ("run.py", "inputs.py"):
            shutil.copy(ROOT / "notebooks" / name, self.notebooks)

    def chapter(self, name, code):
        """A pair of script and notebook."""
        cells = [nbformat.v4.new_markdown_cell(f"# {name}: its title"),
                 nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
                 nbformat.v4.new_code_cell(code)]
        notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNEL})
        jupytext.write(notebook, self.notebooks / f"{name}.py", fmt="py:percent")
        nbformat.write(notebook, self.notebooks / f"{name}.ipynb")

    def earlier(self, number):
        """What an earlier run left of a chapter, when its code was another."""
        (self.results / "ledger").mkdir(parents=True, exist_ok=True)
        (self.results / f"{number}_chapter.html").write_text("an old page")
        exec(claim(number), {"results": str(self.results), "x": 1})

    def start(self, *arguments, cwd=None):
        # A shell that runs the tests in the background has interrupts ignored, and so would what is started here.
        return subprocess.Popen([sys.executable, self.notebooks / "run.py", "run", *arguments], cwd=cwd or self.root,
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
                                env={**os.environ, "PYTHONPATH": str(ROOT / "lib")})

    def run(self, *arguments, cwd=None):
        """(exit status, all that was printed)"""
        process = self.start(*arguments, cwd=cwd)
        out, err = process.communicate(timeout=300)
        return process.returncode, out + err

    def index(self):
        return (self.results / "index.html").read_text()

    def claims(self):
        return [claim["id"] for claim in json.loads((self.results / "ledger.json").read_text())]


@pytest.fixture
def inputs(monkeypatch):
    """The runner's module of inputs."""
    monkeypatch.syspath_prepend(ROOT / "notebooks")
    return importlib.import_module("inputs")


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path / "a project")


def claim(number):
    return CLAIM.format(number=number)


def test_a_failure_is_shown_and_marked_and_the_others_go_on(project):
    """A failed chapter, a killed kernel, a killed worker process: each costs its own chapter, its page and claims.

    Takes some twenty seconds: three runs of the runner, and five kernels.
    """
    project.chapter("01_chapter", "raise RuntimeError(f'x is {x}')")
    project.chapter("02_chapter", "import os; os.kill(os.getpid(), 9)")
    project.chapter("03_chapter", "import os; os.kill(os.getppid(), 9)")
    project.chapter("04_chapter", claim("04"))
    for number in ("01", "02", "03"):
        project.earlier(number)
    status, printed = project.run("--set", "x=5")
    assert status == 1 and "04_chapter: done" in printed and "Traceback (most recent call last):\n  File" not in printed
    assert "raise RuntimeError" in printed and "RuntimeError: x is 5" in printed
    assert printed.count("Its kernel died, most likely out of memory: give it more") == 1
    assert printed.count("The process that executed it died (SIGKILL), most likely out of memory") == 1
    assert project.claims() == ["04.1"]
    index = project.index()
    assert "<strong>failed: RuntimeError</strong>" in index and "<strong>failed: its kernel died</strong>" in index
    assert "<strong>failed: its process died (SIGKILL)</strong>" in index
    assert '<a href="01_chapter.partial.ipynb">' in index and (project.results / "01_chapter.partial.ipynb").is_file()
    assert 'href="01_chapter.html"' not in index and 'href="04_chapter.html"' in index
    assert index.count("1 claims: 1 holds") == 2 and "04_chapter: its title" in index

    project.chapter("01_chapter", claim("01"))
    status, printed = project.run("--chapter", "1")
    assert status == 0 and "01_chapter: done" in printed and project.claims() == ["01.1", "04.1"]
    assert 'href="01_chapter.html"' in project.index() and project.index().count("<strong>") == 2
    status, printed = project.run("--chapter", "04", "--set", "x=5")
    assert status == 0 and "04_chapter: up to date" in printed and "executing" not in printed


def test_what_did_not_finish_is_not_up_to_date(project):
    """Also with the code that has an executed notebook: the claims of that are gone. Takes seconds: two kernels."""
    project.chapter("01_chapter", claim("01"))
    assert project.run()[0] == 0
    (project.results / "01_chapter.unfinished.json").write_text('{"error": "interrupted", "message": ""}')
    (project.results / "ledger" / "01.json").unlink()
    status, printed = project.run()
    assert status == 0 and "01_chapter: done" in printed and project.claims() == ["01.1"]


@pytest.mark.parametrize("kind, expected", [(signal.SIGINT, "interrupted"), (signal.SIGKILL, "not finished")])
def test_an_interrupted_chapter_is_marked(project, kind, expected):
    """By the runner where it can, else by what it noted before. Takes seconds: a run of the runner."""
    started = project.root / "started"
    project.chapter("01_chapter", f"import time; open({str(started)!r}, 'w').close(); time.sleep(60)")
    project.earlier("01")
    process = project.start()
    deadline = time.monotonic() + 120
    while not (started.exists() and (project.results / "index.html").exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(kind)
    process.wait(timeout=60)
    if kind == signal.SIGKILL:
        os.killpg(process.pid, kind)
    out, err = process.communicate(timeout=60)
    assert process.returncode == (130 if kind == signal.SIGINT else -9), out + err
    assert f"<strong>{expected}</strong>" in project.index() and project.claims() == []


def test_a_chapter_is_executed_again_when_its_inputs_change(project, inputs):
    project.chapter("01_chapter", "")
    script, model = project.notebooks / "01_chapter.py", project.root / "a model"
    model.mkdir()
    (model / "weights").write_bytes(b"1" * 5_000_000)
    (project.root / "problems.jsonl").write_text("{}")
    given = {"model": str(model), "problems": str(project.root / "problems.jsonl"), "x": 5}
    marks = [inputs.fingerprint(project.root, script, given)]

    def changed():
        marks.append(inputs.fingerprint(project.root, script, given))
        return marks[-1] not in marks[:-1]

    assert not changed()
    (project.root / "lib" / "deltah" / "wing").mkdir(parents=True)
    (project.root / "lib" / "deltah" / "wing" / "new.py").write_text("")
    assert changed()
    (model / "weights").write_bytes(b"1" * 4_999_999 + b"2")
    assert changed()
    (model / "weights").rename(model / "others")
    assert changed()
    (project.root / "problems.jsonl").write_text("{ }")
    assert changed()
    given["x"] = 6
    assert changed()
    given["model"] = "openai/a-hub-id"
    assert changed()
    assert not changed()


@pytest.mark.parametrize("arguments, message", [
    (["--chapter", "99"], "CHAPTER: there is no chapter '99'; there are 01"),
    (["--profile", "huge"], "PROFILE: there is no profile 'huge'; there are quick"),
    (["--profile", "../profiles/quick"], "PROFILE: there is no profile '../profiles/quick'; there are quick"),
    (["--set", "modle=x"], "--set: there is no parameter 'modle'; there are model, problems, device, x"),
    (["--set", "results=x"], "--set: there is no parameter 'results'"),
    (["--set", "model"], "--set: expected NAME=VALUE, got 'model'"),
    (["--set", "model=./none"], "MODEL: './none' cannot be used: there is no such file or folder"),
    (["--set", "model=notebooks"], "cannot be used: "),
    (["--set", "problems=broken.jsonl"], "PROBLEMS: "),
    (["--set", "device=gpu7"], "DEVICE: 'gpu7' cannot be used: "),
])
def test_what_cannot_be_used_ends_the_run_with_one_line(project, arguments, message):
    """Before anything is executed."""
    project.chapter("01_chapter", 'if x > 1: dh.load_problems(problems, "train")')
    (project.root / "broken.jsonl").write_text("{")
    status, printed = project.run(*arguments)
    assert status == 1 and message in printed.strip().splitlines()[-1]
    assert "Traceback" not in printed and "executing" not in printed and not project.results.exists()


def test_what_can_be_used_arrives(project, tmp_path):
    """Relative paths are the caller's; a file named like a device is no device; numbers are numbers.

    Takes seconds, as `make run` with a model of one's own does: it loads the libraries to look at what was given.
    """
    project.chapter("01_chapter", 'if x > 9: dh.load_problems(problems, "train")\n'
                                  'print(model, problems, device, x + 1)')
    (tmp_path / "cpu").write_text("")
    shutil.copytree(ROOT / "data" / "policy", tmp_path / "my policy")
    (tmp_path / "mine.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    status, printed = project.run("--set", "model=my policy", "problems=mine.jsonl", "device=cpu", "x=2", cwd=tmp_path)
    assert status == 0, printed
    shown = (project.results / "01_chapter.ipynb").read_text()
    assert f"{tmp_path}/my policy {tmp_path}/mine.jsonl cpu 3" in shown


def test_a_profile_names_paths_from_the_notebooks(project, inputs):
    (project.notebooks / "profiles" / "quick.yaml").write_text('all: {model: a/hub-id, x: 2}\n"01": {model: ../mine}\n')
    (project.root / "mine").mkdir()
    for name in ("01_chapter", "02_chapter"):
        project.chapter(name, "")
    one, two = (inputs.read_parameters(project.notebooks, "quick", project.notebooks / f"{name}.py", {"x": 3})
                for name in ("01_chapter", "02_chapter"))
    assert one == {"model": str(project.root / "mine"), "x": 3, "results": str(project.results)}
    assert two["model"] == "a/hub-id"


ESTIMATE = """import json, pathlib
folder = pathlib.Path(results) / "ledger"
folder.mkdir(exist_ok=True)
entry = dict(id="01.1", chapter="01", source="", section="", statement="x = x", measured=x, expected=x, tolerance=0.1,
             correction=None, verdict="holds" if seed != 2 else "refuted", standard_error=0.1, low=0.0, high=9.0,
             count=9)
exact = dict(entry, id="01.2", standard_error=None)
(folder / "01.json").write_text(json.dumps([entry, exact]))
if seed == {failing}: raise ValueError("a seed of its own")"""


def test_estimates_are_tried_on_other_seeds(project, inputs, monkeypatch):
    """A profile that says so executes each chapter on other seeds, at its own sizes, and gathers the verdicts."""
    monkeypatch.setattr(sys.modules[__name__], "PARAMETERS", PARAMETERS + "\nseed = 0")
    (project.notebooks / "profiles" / "quick.yaml").write_text('seeds: 3\n"01":\n  x: 5\n')
    project.chapter("01_chapter", ESTIMATE.format(failing=3))
    status, output = project.run()
    assert status == 1 and "01_chapter, seed 3: FAILED" in output and "a seed of its own" in output
    gathered = project.results / "seeds" / "01.json"
    project.chapter("01_chapter", ESTIMATE.format(failing=None))
    status, output = project.run()
    assert status == 0 and "01_chapter, seed 3: done" in output
    assert json.loads(gathered.read_text())["verdicts"] == {
        "01.1": {"statement": "x = x", "on_seeds": ["holds", "refuted", "holds"]}}
    entries = {seed: json.loads((project.results / "seeds" / seed / "ledger" / "01.json").read_text())
               for seed in ("1", "2", "3")}
    assert [entry[0]["measured"] for entry in entries.values()] == [1, 1, 1]
    assert json.loads((project.results / "ledger" / "01.json").read_text())[0]["measured"] == 5
    status, output = project.run()
    assert "01_chapter: up to date" in output and "01_chapter, seed 2: up to date" in output
    # What is shipped says nothing about itself: the verdicts that it holds stay those of the chapter.
    chapter, marks = project.notebooks / "01_chapter.py", []
    for shipped in ("one", "other"):
        (project.root / "data" / "seeds").mkdir(parents=True, exist_ok=True)
        (project.root / "data" / "seeds" / "01.json").write_text(shipped)
        marks.append([inputs.fingerprint(project.root, chapter, {}, seeds) for seeds in (False, True)])
    assert marks[0][0] == marks[1][0] == json.loads(gathered.read_text())["fingerprint"]
    assert marks[0][1] != marks[1][1]
    status, output = project.run()
    assert "01_chapter: executing" in output and "01_chapter, seed 2: up to date" in output
