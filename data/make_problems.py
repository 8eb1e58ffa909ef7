"""Write the shipped arithmetic word problems, train.jsonl and test.jsonl, in GSM8K's format.

    python data/make_problems.py [folder]

Each problem starts from a small number and changes it one to four times. Its worked answer is written in
one of three styles, which differ in length and in how much work they show, and ends with "#### <number>".
`generate` is an endless stream: `make policy` trains on it, leaving out the questions of the test split.
"""

import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

SEED = 20251
TRAIN, TEST = 4096, 1024
NAMES = ["Ava", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivan", "Jo", "Kim", "Leo", "Mia", "Noor"]
THINGS = ["apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps", "stones", "tickets"]
LARGEST = 198

# For each kind of step: how a question may tell it.
STORIES = {
    "+": ["{a} buys {k} more.", "{a} finds {k} more.", "{b} gives {a} {k} more."],
    "-": ["{a} gives {k} to {b}.", "{a} loses {k}.", "{a} sells {k}."],
    "*": ["Then {a} has {k} times as many."],
    "/": ["{a} shares them equally among {k} bags and keeps one bag."],
}
# How the wordy style may begin, and how it may begin a line: a choice that no question decides.
STARTS = ["{a} has {k}.", "Start with {k}.", "First {k}."]
LINKS = ["Now", "So", "Then", "That is", "We get"]


def _step(rng: random.Random, total: int) -> tuple[str, int, int]:
    """Draw one change of `total`: its sign, its number, and the total after it, between 2 and LARGEST."""
    while True:
        sign = rng.choices("+-*/", weights=[4, 4, 1, 1])[0]
        number = rng.randint(2, 5) if sign in "*/" else rng.randint(2, 60)
        after = {"+": total + number, "-": total - number, "*": total * number, "/": total // number}[sign]
        if 2 <= after <= LARGEST and not (sign == "/" and total % number):
            return sign, number, after


def _solution(rng: random.Random, name: str, start: int, steps: list[tuple[str, int, int]]) -> str:
    """Write the worked answer: one expression, a line for each step, or a sentence for each step."""
    style = rng.choice(["expression", "lines", "sentences"])
    final = steps[-1][2]
    if style == "expression":
        expression = str(start)
        for i, (sign, number, _) in enumerate(steps):
            # A product or quotient acts on everything before it.
            binds = sign in "*/" and i > 0
            expression = f"({expression}){sign}{number}" if binds else f"{expression}{sign}{number}"
        return f"{expression}={final}\n#### {final}"
    lines = [rng.choice(STARTS).format(a=name, k=start)] if style == "sentences" else []
    before = start
    for sign, number, after in steps:
        equation = f"{before}{sign}{number}={after}"
        lines.append(f"{rng.choice(LINKS)} {equation}." if style == "sentences" else equation)
        before = after
    return "\n".join([*lines, f"#### {final}"])


def generate(seed: int) -> Iterator[dict[str, str]]:
    """Yield problems {"question", "answer"} without end, always the same ones for a seed."""
    rng = random.Random(seed)
    while True:
        a, b = rng.sample(NAMES, 2)
        thing = rng.choice(THINGS)
        total = start = rng.randint(5, 60)
        told, steps = [], []
        for _ in range(rng.choices([1, 2, 3, 4], weights=[5, 7, 5, 3])[0]):
            sign, number, total = _step(rng, total)
            told.append(rng.choice(STORIES[sign]).format(a=a, b=b, k=number))
            steps.append((sign, number, total))
        question = f"{a} has {start} {thing}. {' '.join(told)} How many {thing} does {a} have?"
        yield {"question": question, "answer": _solution(rng, a, start, steps)}


def split(seed: int = SEED) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The shipped train and test splits; no question is in both, or twice in one."""
    problems = {}
    for problem in generate(seed):
        problems.setdefault(problem["question"], problem)
        if len(problems) == TRAIN + TEST:
            break
    problems = list(problems.values())
    return problems[TEST:], problems[:TEST]


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, problems in zip(("train", "test"), split(), strict=True):
        partial = folder / f".{name}.jsonl.partial"
        partial.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
        os.replace(partial, folder / f"{name}.jsonl")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "problems")
