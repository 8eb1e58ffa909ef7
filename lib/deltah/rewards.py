"""Rewards: what a response is worth, from its text and from what the data say about its prompt.

A reward is any function of (texts, rows) that returns a number for each text; `sample(..., reward=...)` takes one, or
the name of one of those here. They give 1 to the right answer and 0 to others, and look for it in different places:

| name | a response's answer |
|---|---|
| `answer` | what follows the last "####", on its line, as in GSM8K |
| `last_number` | the last number in the text |
| `boxed` | what the last \\boxed{...} holds |
| `math` | what the package math-verify finds, compared as mathematics: 1/2 is 0.5, and x + 1 is 1 + x |

The right answer is what the row's "answer" has after "####" or in \\boxed{...}, else all of it. The first three compare
spellings, of which `normalise_answer` gives equal numbers one.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from deltah import checks

if TYPE_CHECKING:
    from deltah.rollouts import Rollouts

Rows = Sequence[Mapping[str, Any]]
Reward = Callable[[Sequence[str], Rows], Sequence[float] | np.ndarray | Tensor]

# What GSM8K puts before a worked answer's result.
ANSWER_MARK = "####"
BOX = re.compile(r"\\boxed\s*\{")
VERIFIER = Path(__file__).with_name("verifier.py")

CURRENCIES = "$€£¥₹"
# No part of an answer's value: currencies, percent, characters without width; all as LaTeX writes them too.
DROPPED = re.compile(rf"\\?[{CURRENCIES}%]|\\!|[\u200b\u2060\ufeff]")
SPACE = re.compile(r"(?:\s|\\[,;: ])+")
MINUS = str.maketrans(dict.fromkeys("‐‑‒–−﹣-", "-"))
FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")
# Digits in groups of three; in India the last three, then in twos. An exponent is one that can be written out.
GROUPED = r"\d{1,3}(?:[, ]\d{3})+|\d{1,2}(?:,\d\d)+,\d{3}"
EXPONENT = r"[eE][-+]?0*\d{1,3}"
NUMBER = re.compile(rf"[-+]?(?:(?:{GROUPED}|\d+)(?:\.\d*)?|\.\d+)(?:{EXPONENT})?")
# In running text, a minus sign after a word, a number or a bracket subtracts or hyphenates, and digits after a letter
# belong to a name.
SIGN = rf"(?:(?<![\w)\]}}])-(?:\\?[{CURRENCIES}])?|(?<=[{CURRENCIES}])-)?"
IN_TEXT = re.compile(rf"({SIGN})(?<![A-Za-z_\d])(?<!\d\.)((?:(?:{GROUPED.replace(' ', '')})(?!\d)|\d+)(?:\.\d+)?"
                     rf"(?:{EXPONENT}(?!\w))?(?:/\d+)?|(?<!\.)\.\d+)")
THIN_SPACE = re.compile(r"(?<=\d)(?:\{,\}|\\[,!]|[\u00a0\u2009\u202f])(?=\d{3})")


class RewardError(ValueError):
    """A reward function failed, or returned something else than a finite number for each response.

    Attributes:
        rollouts: what was sampled, without rewards.
    """

    def __init__(self, message: str, rollouts: Rollouts):
        super().__init__(f"{message}; what was sampled is kept in this error's `rollouts`")
        self.rollouts = rollouts


def normalise_answer(answer: str) -> str:
    """One spelling for equal answers.

    A number loses its leading and trailing zeros, its plus sign, its separators of thousands and its exponent, by
    decimal arithmetic: nothing is rounded. From any answer go currencies, percent, a trailing period, and spaces but
    for those between digits; minus signs and dashes become "-". Fractions of integers stay fractions.

    >>> [normalise_answer(x) for x in ("$1,018.00", "−.50", "007", "1e3", "-0", "\\\\frac{1}{2}", "5 cm")]
    ['1018', '-0.5', '7', '1000', '0', '1/2', '5cm']
    """
    checks.instance("answer", answer, str, "text")
    while (tidied := _tidied(answer)) != answer:
        answer = tidied
    if not NUMBER.fullmatch(answer):
        return answer
    written = format(Decimal(re.sub("[, ]", "", answer)), "f")
    if "." in written:
        written = written.rstrip("0").rstrip(".")
    return "0" if written == "-0" else written


def _tidied(answer: str) -> str:
    answer = SPACE.sub(" ", DROPPED.sub("", answer.translate(MINUS)).replace("{,}", ","))
    answer = FRACTION.sub(r"\1/\2", re.sub(r"(?<!\d) | (?!\d)", "", answer))
    return answer.rstrip(".")


def extract_answer(text: str) -> str | None:
    """The final answer of a worked solution: what follows the last "####" on its line, as `normalise_answer` has it.

    >>> extract_answer("16 - 3 - 4 = 9 eggs, 9 * 2 = $18\\n#### $1,018.00")
    '1018'
    >>> extract_answer("no mark") is None
    True
    """
    checks.instance("text", text, str, "text")
    return normalise_answer(_after_mark(text)) if ANSWER_MARK in text else None


def extract_last_number(text: str) -> str | None:
    """The last number of a text, as `normalise_answer` has it; a fraction such as 1/2 is one number.

    >>> extract_last_number("10 - 3 = 7, that is $-1,007.50.")
    '-1007.5'
    """
    checks.instance("text", text, str, "text")
    text = FRACTION.sub(r"\1/\2", THIN_SPACE.sub(",", text.translate(MINUS)))
    found = IN_TEXT.findall(text)
    return normalise_answer("".join(found[-1])) if found else None


def extract_boxed(text: str) -> str | None:
    """What the last \\boxed{...} of a text holds, nested braces included; None where it is not closed.

    >>> extract_boxed("so \\\\boxed{\\\\frac{1}{2}}.")
    '\\\\frac{1}{2}'
    """
    checks.instance("text", text, str, "text")
    boxes = list(BOX.finditer(text))
    if not boxes:
        return None
    start, depth = boxes[-1].end(), 1
    for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        # An escaped brace is text.
        depth += {"{": 1, "}": -1}.get(brace.group(), 0)
        if depth == 0:
            return text[start:start + brace.start()].strip()
    return None


def final_answer(text: str) -> str:
    """What a worked answer comes to, as it stands: after its last "####", else in \\boxed{...}, else all of it.

    >>> final_answer("2 + 2 = 4\\n#### 4"), final_answer("\\\\boxed{x}"), final_answer(" blue ")
    ('4', 'x', 'blue')
    """
    if ANSWER_MARK in text:
        return _after_mark(text)
    return (extract_boxed(text) or "" if BOX.search(text) else text).strip()


def _after_mark(text: str) -> str:
    return text.rsplit(ANSWER_MARK, 1)[1].split("\n")[0].strip()


def answer_text(name: str, value: Any) -> str:
    """The text of an answer in a column of texts or numbers; TypeError or ValueError, with this name, for others."""
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_floating_point():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (str, Real, Decimal)):
        raise TypeError(f"{name}: expected text or a number, got {checks.shown(value)}")
    text = str(value)
    missing = isinstance(value, (float, np.floating, Decimal)) and not np.isfinite(float(value))
    if missing or not normalise_answer(final_answer(text)):
        raise ValueError(f"{name}: expected an answer, got {text!r}")
    return text


def score_answers(responses: Sequence[str], answers: Sequence[str | float]) -> Tensor:
    """The reward of each response: 1 where the answer after its last "####" is the right one, else 0.

    Args:
        responses: N generated texts.
        answers: N final answers, as texts or numbers, or worked answers that contain "####".

    Returns:
        [N] float32.

    Raises:
        ValueError: as many answers as responses are expected, and none of them empty.
        TypeError: a response that is not text, or an answer that is neither text nor a number.

    >>> score_answers(["2+2=4\\n#### 4", "#### 5"], ["4", 4])
    tensor([1., 0.])
    """
    responses, answers = _texts("responses", responses), _listed("answers", answers)
    if len(responses) != len(answers):
        raise ValueError(f"answers: expected {len(responses)}, one for each response, got {len(answers)}")
    expected = [normalise_answer(final_answer(answer_text(f"answers[{i}]", a))) for i, a in enumerate(answers)]
    return _equal([extract_answer(response) for response in responses], expected)


def answer(texts: Sequence[str], rows: Rows) -> Tensor:
    """1 where what follows the last "####" is the row's answer, else 0: [N] float32."""
    expected = _expected(texts, rows)
    return _equal([extract_answer(text) for text in texts], [normalise_answer(x) for x in expected])


def last_number(texts: Sequence[str], rows: Rows) -> Tensor:
    """1 where the last number is the row's answer, else 0: [N] float32. ValueError: an answer that is no number."""
    expected = [normalise_answer(x) for x in _expected(texts, rows)]
    for i, x in enumerate(expected):
        if extract_last_number(x) != x:
            raise ValueError(f"rows[{i}]['answer']: expected a number, which 'last_number' looks for, got {x!r}")
    return _equal([extract_last_number(text) for text in texts], expected)


def boxed(texts: Sequence[str], rows: Rows) -> Tensor:
    """1 where the last \\boxed{...} holds the row's answer, else 0: [N] float32."""
    expected = _expected(texts, rows)
    return _equal([normalise_answer(extract_boxed(text) or "") for text in texts],
                  [normalise_answer(x) for x in expected])


def math(texts: Sequence[str], rows: Rows) -> Tensor:
    """1 where math-verify finds the row's answer or an equal one, else 0: [N] float32.

    A response that keeps it busy for more than five seconds counts as wrong.

    Raises:
        ImportError: math-verify is not installed.
        ValueError: an answer that it cannot read.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError("reward: 'math' needs the package math-verify; pip install math-verify")
    pairs = list(zip(texts, _expected(texts, rows), strict=True))
    verdicts = _verdicts(pairs)
    for i, verdict in enumerate(verdicts):
        if verdict is None:
            raise ValueError(f"rows[{i}]['answer']: math-verify reads nothing in {pairs[i][1]!r}")
    return torch.tensor(verdicts, dtype=torch.float32)


REWARDS: dict[str, Reward] = {"answer": answer, "last_number": last_number, "boxed": boxed, "math": math}


def find_reward(reward: str | Reward | None, rows: Rows) -> Reward | None:
    """The function that `reward` stands for; None: `answer` where the rows have one, else none.

    One of those here is tried on empty responses, so that answers which it cannot compare with show before sampling.
    """
    if reward is None:
        if "answer" not in rows[0]:
            return None
        reward = "answer"
    if isinstance(reward, str):
        reward = REWARDS[checks.choice("reward", reward, REWARDS)]
    elif not callable(reward):
        raise TypeError(f"reward: expected a function of (texts, rows) or one of {', '.join(REWARDS)}, "
                        f"got {checks.shown(reward)}")
    if any(reward is own for own in REWARDS.values()):
        reward([""] * len(rows), rows)
    return reward


def rewarded(rollouts: Rollouts, reward: Reward, texts: Sequence[str], rows: Rows) -> Rollouts:
    """The rollouts with the rewards of their texts [N], whose prompts are those of the rows [N].

    Raises:
        RewardError: the function fails, or returns something else than N finite numbers.
    """
    try:
        values = reward(texts, [dict(row) for row in rows])
    except Exception as error:
        raise RewardError(f"reward: raised {type(error).__name__} ({error})", rollouts) from error
    try:
        return rollouts.replace(rewards=_as_tensor(values, len(texts)).to(rollouts.input_ids.device))
    except (TypeError, ValueError) as error:
        raise RewardError(str(error), rollouts) from error


def _as_tensor(values: Any, count: int) -> Tensor:
    values = values.tolist() if hasattr(values, "tolist") else values
    wanted = f"a function that returns {count} numbers, one for each text"
    checks.instance("reward", values, (list, tuple), wanted)
    if len(values) != count:
        raise ValueError(f"reward: expected {wanted}, got {len(values)}")
    return torch.tensor([float(x) if isinstance(x, (bool, np.bool_)) else checks.number(f"reward: value {i}", x)
                         for i, x in enumerate(values)], dtype=torch.float32)


def _listed(name: str, values: Sequence[Any]) -> list[Any]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{name}: expected a list, got {checks.shown(values)}")
    return list(values)


def _texts(name: str, values: Sequence[str]) -> list[str]:
    return [checks.instance(f"{name}[{i}]", x, str, "text") for i, x in enumerate(_listed(name, values))]


def _expected(texts: Sequence[str], rows: Rows) -> list[str]:
    """The right answer of each row, none of them empty."""
    texts, rows = _texts("texts", texts), _listed("rows", rows)
    if len(texts) != len(rows):
        raise ValueError(f"rows: expected {len(texts)}, one for each text, got {len(rows)}")
    for i, row in enumerate(rows):
        checks.instance(f"rows[{i}]", row, Mapping, "a dict")
        if "answer" not in row:
            raise ValueError(f"rows[{i}]: expected an 'answer' to compare with, got {', '.join(map(str, row))}")
    return [final_answer(answer_text(f"rows[{i}]['answer']", row["answer"])) for i, row in enumerate(rows)]


def _equal(found: Sequence[str | None], expected: Sequence[str]) -> Tensor:
    return torch.tensor([float(f == e) for f, e in zip(found, expected, strict=True)], dtype=torch.float32)


def _verdicts(pairs: Sequence[tuple[str, str]]) -> list[bool | None]:
    """What `verifier.py` says of each pair, in a process that is started again after each pair that ends it."""
    verdicts: list[bool | None] = []
    while len(verdicts) < len(pairs):
        # -P: without the library's folder on the path, where `statistics` is another module than Python's.
        done = subprocess.run([sys.executable, "-P", VERIFIER], input=json.dumps(pairs[len(verdicts):]),
                              capture_output=True, text=True)
        verdicts += [json.loads(line) for line in done.stdout.splitlines()]
        if len(verdicts) < len(pairs) and done.returncode >= 0:
            raise RuntimeError(f"reward: math-verify failed: {done.stderr.strip()}")
        verdicts += [False] * (len(verdicts) < len(pairs))   # ended by a signal: too much time, memory or depth
    return verdicts
