"""Problems: prompts with known answers, as a `datasets.Dataset`, and the reward of a response."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset, get_dataset_config_names, load_dataset
from torch import Tensor

PROMPT_COLUMNS = ("prompt", "question", "problem")
ANSWER_COLUMNS = ("answer", "solution")
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
# What GSM8K puts before a worked answer's result.
ANSWER_MARK = "####"


def load_problems(path_or_hub_id: str | Path, split: str) -> Dataset:
    """Load problems from a folder, a file or the Hugging Face hub.

    Args:
        path_or_hub_id: a folder that holds `<split>.jsonl` (or .json, .csv, .parquet), one such file, or a
            hub id such as "openai/gsm8k"; of several configurations on the hub, "main" is taken.
        split: "train", "test", ...; of a single file, it is the name of the whole.

    Returns:
        A Dataset with the columns `prompt` (the question and a line break), `answer` (the final answer, what
        follows "####" where that occurs) and `solution` (the worked answer as it stands in the source).

    Raises:
        FileNotFoundError: a path that looks local and does not exist, or a folder without the split.
        ValueError: an unreadable or empty source, or one that lacks a prompt or an answer.

    >>> load_problems("data/problems", "test")[0]["answer"]                  # doctest: +SKIP
    '22'
    """
    table = _read(path_or_hub_id, split)
    if len(table) == 0:
        raise ValueError(f"path_or_hub_id: {str(path_or_hub_id)!r} holds no problems for split {split!r}")
    prompt = _column(table, PROMPT_COLUMNS, path_or_hub_id)
    answer = _column(table, ANSWER_COLUMNS, path_or_hub_id)
    problems = {"prompt": [], "answer": [], "solution": []}
    for i, row in enumerate(table):
        question, solution = row[prompt], str(row[answer] if row[answer] is not None else "").strip()
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"path_or_hub_id: row {i} of {str(path_or_hub_id)!r}: expected text in {prompt!r}, "
                             f"got {question!r}")
        final = extract_answer(solution) if ANSWER_MARK in solution else solution
        if not final:
            raise ValueError(f"path_or_hub_id: row {i} of {str(path_or_hub_id)!r}: expected an answer in {answer!r}, "
                             f"got {row[answer]!r}")
        problems["prompt"].append(question.strip() + "\n")
        problems["answer"].append(final)
        problems["solution"].append(solution)
    return Dataset.from_dict(problems)


def _read(source: str | Path, split: str) -> Dataset:
    path = Path(source)
    if path.is_dir():
        files = [path / f"{split}{ending}" for ending in READERS if (path / f"{split}{ending}").is_file()]
        if not files:
            raise FileNotFoundError(f"split: no {split}.jsonl (or .json, .csv, .parquet) in {str(path)!r}")
        path = files[0]
    elif not path.is_file():
        return _read_hub(source, split)
    if path.suffix not in READERS:
        raise ValueError(f"path_or_hub_id: expected one of {', '.join(READERS)}, got {path.name!r}")
    try:
        return load_dataset(READERS[path.suffix], data_files={split: str(path)}, split=split)
    except Exception as error:  # the readers raise many types; each means that nothing was loaded
        raise ValueError(f"path_or_hub_id: {str(path)!r} is not readable as {path.suffix} "
                         f"({error.__cause__ or error})") from error


def _read_hub(source: str | Path, split: str) -> Dataset:
    name = str(source)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in READERS:
        raise FileNotFoundError(f"path_or_hub_id: no file or folder {name!r}")
    try:
        configurations = get_dataset_config_names(name)
        chosen = "main" if "main" in configurations else configurations[0]
        return load_dataset(name, chosen, split=split)
    except Exception as error:  # the hub client raises many types; each means that nothing was loaded
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"path_or_hub_id: could not load split {split!r} of {name!r}; expected a folder, a file or "
                         f"the id of a data set on the hub ({reason})") from error


def _column(table: Dataset, names: Sequence[str], source: str | Path) -> str:
    for name in names:
        if name in table.column_names:
            return name
    raise ValueError(f"path_or_hub_id: {str(source)!r}: expected a column named {' or '.join(names)}, "
                     f"got {', '.join(table.column_names)}")


def extract_answer(text: str) -> str | None:
    """The final answer of a worked solution: what follows the last "####" on its line, normalised.

    Thousands separators, currency signs and a trailing period go, and a whole number loses its ".0".

    >>> extract_answer("16 - 3 - 4 = 9 eggs, 9 * 2 = $18\\n#### $1,018.00")
    '1018'
    >>> extract_answer("no mark") is None
    True
    """
    if ANSWER_MARK not in text:
        return None
    return normalise_answer(text.rsplit(ANSWER_MARK, 1)[1].strip().split("\n")[0])


def normalise_answer(answer: str) -> str:
    """One spelling for equal answers: see `extract_answer`."""
    answer = re.sub(r"[$€£%\s]", "", answer).rstrip(".")
    if re.fullmatch(r"[-+]?[\d,]*\.?\d+", answer):
        answer = answer.replace(",", "").removeprefix("+")
        if "." in answer:
            answer = answer.rstrip("0").rstrip(".")
    return answer


def score_answers(responses: Sequence[str], answers: Sequence[str]) -> Tensor:
    """The reward of each response: 1 where the answer after its last "####" is the right one, else 0.

    Args:
        responses: N generated texts.
        answers: N final answers, or worked answers that contain "####".

    Returns:
        [N] float32.

    Raises:
        ValueError: as many answers as responses are expected.

    >>> score_answers(["2+2=4\\n#### 4", "#### 5"], ["4", "4"])
    tensor([1., 0.])
    """
    if len(responses) != len(answers):
        raise ValueError(f"answers: expected {len(responses)}, one for each response, got {len(answers)}")
    expected = [extract_answer(a) if ANSWER_MARK in a else normalise_answer(a) for a in answers]
    return torch.tensor([float(extract_answer(r) == e) for r, e in zip(responses, expected, strict=True)])
