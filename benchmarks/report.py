"""What a run leaves behind: a page, the numbers and a figure for each subject, and an index of all targets."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from cases import ROOT
from matplotlib.ticker import NullLocator
from side_by_side import Measurement, Section, Target

from deltah.book.figures import DASHES, MARKERS, use_style

Row = tuple[str, str, str]


@dataclass
class Outcome:
    """A section's measurements: at full size, where memory is held against targets, and along each axis."""

    section: Section
    main: Measurement
    heavy: Measurement
    growth: dict[str, list[Measurement]] = field(default_factory=dict)

    def targets(self) -> list[Row]:
        """(target, measured, verdict), agreement last."""
        rows = [self._judge(target) for target in self.section.targets]
        wrong = [name for name, difference in self.main.differences.items() if not difference <= self.section.tolerance]
        if self.main.differences:
            rows.append((f"all sides agree to {self.section.tolerance:g}, {self.section.difference_unit}",
                         f"{max(self.main.differences.values()):.2g}",
                         "DIFFER: " + ", ".join(wrong) if wrong else "met"))
        return rows

    def _judge(self, target: Target) -> Row:
        section, limit = self.section, f"at most {target.limit:g}"
        if target.base is None:
            name = f"{target.side}: {target.what}, {limit} {section.memory_label}"
            if target.side not in self.heavy.memory:
                return name, "", "not measured"
            value = section.memory_inputs + self.heavy.memory[target.side] / section.memory_unit(self.heavy.case)
            shown = f"{value:.3g}"
        else:
            name = f"{target.side} / {target.base}: {target.what}, {limit}"
            if target.base in self.main.absent:
                return name, "", f"not measured; {target.base}: {self.main.absent[target.base]}"
            value, low, high = self.main.ratio(target.side, target.base)
            shown = f"{value:.2f} ({low:.2f} to {high:.2f})"
        return name, shown, "met" if value <= target.limit else "MISSED"


def machine() -> list[str]:
    """What the numbers depend on besides the code."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    peers = [line.split("==")[0] for line in (ROOT / "benchmarks/requirements.txt").read_text().splitlines() if line]
    versions = [f"{name} {version}" for name in ("torch", "transformers", *peers) if (version := _version(name))]
    return [f"{device}, {os.cpu_count()} cores, {torch.get_num_threads()} threads", ", ".join(versions)]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def table(header: list[str], rows: list) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)] + [""]


def page(title: str, outcomes: list[Outcome], figure: str | None) -> str:
    lines = [f"# {title}", "", *(line + "  " for line in machine()), ""]
    if figure:
        lines += [f"![Growth of time and memory]({figure})", ""]
    for outcome in outcomes:
        section, main, heavy = outcome.section, outcome.main, outcome.heavy
        rounds = len(next(iter(main.seconds.values())))
        lines += [f"## {section.title}", "", section.about, "", f"{main.case.describe()}; {rounds} rounds."]
        if heavy is not main:
            lines += [f"Peak memory: {heavy.case.describe()}."]
        lines += ["", *table(["side", section.unit, f"ratio to {section.base}", "peak memory, MB", "difference"],
                             [_row(outcome, name) for name in (*main.seconds, *main.absent)])]
        lines += table(["target", "measured", "verdict"], outcome.targets())
        for axis, measurements in outcome.growth.items():
            lines += _growth_table(section, axis, measurements)
    return "\n".join(lines)


def _row(outcome: Outcome, name: str) -> list[str]:
    section, main = outcome.section, outcome.main
    if name in main.absent:
        return [name, main.absent[name], "", "", ""]
    ratio = "{:.2f} ({:.2f} to {:.2f})".format(*main.ratio(name, section.base)) if section.base in main.seconds else ""
    memory = f"{outcome.heavy.memory[name] / 1e6:,.0f}" if name in outcome.heavy.memory else ""
    difference = f"{main.differences[name]:.1e}" if name in main.differences else ""
    return [name, f"{main.median(name):.4g}", ratio, memory, difference]


def _growth_table(section: Section, axis: str, measurements: list[Measurement]) -> list[str]:
    names = list(measurements[0].seconds)
    rows = []
    for m in measurements:
        cells = [f"{m.median(n):.3g}" + (f"; {m.memory[n] / 1e6:,.0f}" if n in m.memory else "") if n in m.seconds
                 else m.absent[n] for n in names]
        rows.append([f"{_extent(section, axis, m):,}", *cells])
    return [f"By {axis} ({section.unit}; peak memory, MB), first {measurements[0].case.describe()}:", "",
            *table([axis, *names], rows)]


def _extent(section: Section, axis: str, measurement: Measurement) -> int:
    name = section.axes[axis][0]
    return measurement.case.parameters if name == "width" else getattr(measurement.case, name)


def _short(value: int) -> str:
    if value >= 1e6:
        return f"{value / 1e6:.3g}M"
    return f"{value / 1e3:.3g}k" if value >= 1e4 else str(value)


def draw(outcomes: list[Outcome], path: Path) -> bool:
    """Time and memory along every axis; False where nothing grew."""
    outcomes = [o for o in outcomes if o.growth]
    if not outcomes:
        return False
    use_style()
    columns = max(len(o.growth) for o in outcomes)
    figure, axes = plt.subplots(2 * len(outcomes), columns, figsize=(3.4 * columns, 5.6 * len(outcomes)),
                                squeeze=False, sharey="row")
    for i, outcome in enumerate(outcomes):
        names = list(outcome.main.seconds)
        for j, (axis, measurements) in enumerate(outcome.growth.items()):
            time, memory = axes[2 * i:2 * i + 2, j]
            x = [_extent(outcome.section, axis, m) for m in measurements]
            for k, name in enumerate(names):
                if not all(name in m.seconds for m in measurements):
                    continue
                style = dict(color=f"C{k}", marker=MARKERS[k % len(MARKERS)], linestyle=DASHES[k % len(DASHES)])
                time.plot(x, [m.median(name) for m in measurements], label=name, **style)
                if all(m.memory.get(name, 0) > 0 for m in measurements):
                    memory.plot(x, [m.memory[name] / 1e6 for m in measurements], label=name, **style)
            for panel in (time, memory):
                panel.set(xscale="log", yscale="log", xlabel=axis)
                panel.set_xticks(x, [_short(value) for value in x])
                panel.xaxis.set_minor_locator(NullLocator())
        axes[2 * i, 0].set(title=outcome.section.title, ylabel=outcome.section.unit)
        axes[2 * i + 1, 0].set(ylabel="peak memory, MB")
        handles, labels = axes[2 * i, 0].get_legend_handles_labels()
        axes[2 * i, -1].legend(handles, labels, loc="center left", bbox_to_anchor=(1.02, 0.5))
    partial = path.with_name(f".{path.stem}.partial.png")
    figure.savefig(partial, dpi=120)
    plt.close(figure)
    os.replace(partial, path)
    return True


def write(text: str, path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def save(subject: str, title: str, outcomes: list[Outcome], results: Path) -> str:
    """Writes <subject>.md, .json and .png, and returns the page."""
    results.mkdir(parents=True, exist_ok=True)
    figure = f"{subject}.png" if draw(outcomes, results / f"{subject}.png") else None
    text = page(title, outcomes, figure)
    numbers = {"title": title, "machine": machine(), "sections": {
        o.section.title: {"targets": o.targets(), "main": asdict(o.main), "heavy": asdict(o.heavy),
                          "growth": {axis: [asdict(m) for m in ms] for axis, ms in o.growth.items()}}
        for o in outcomes}}
    write(json.dumps(numbers, indent=1), results / f"{subject}.json")
    write(text, results / f"{subject}.md")
    return text


def index(results: Path) -> None:
    """Writes index.md: the targets of every subject that has been run."""
    lines = ["# Side by side", "", "Times are ratios of sides that ran in turns within one run: the median over "
             "rounds, and the range.", ""]
    for path in sorted(results.glob("*.json")):
        numbers = json.loads(path.read_text())
        if "sections" not in numbers:   # of an older layout
            continue
        lines += [f"## [{numbers['title']}]({path.stem}.md)", "", numbers["machine"][0], ""]
        lines += table(["comparison", "target", "measured", "verdict"],
                       [[title, *row] for title, section in numbers["sections"].items() for row in section["targets"]])
    write("\n".join(lines), results / "index.md")
