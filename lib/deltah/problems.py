"""Problems: prompts with known answers, as a `datasets.Dataset`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, get_dataset_config_names, load_dataset

from deltah import checks
from deltah.models.prompts import Prompt, as_messages, check_messages
from deltah.rewards import ANSWER_MARK, answer_text, final_answer, normalise_answer

# Of the last, the assistant's message at the end is the answer.
CONVERSATIONS = "messages"
PROMPT_COLUMNS = ("prompt", "question", "problem", CONVERSATIONS)
ANSWER_COLUMNS = ("answer", "solution")
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_problems(path_or_hub_id: str | Path, split: str, chat: bool = False) -> Dataset:
    """Load problems from a folder, a file or the Hugging Face hub.

    A prompt is looked for in the columns `prompt`, `question`, `problem` and `messages`, an answer in `answer` and
    `solution`. Conversational data, as TRL has them, stay as they are: lists of messages {"role", "content"}. Of a
    conversation in `messages`, the assistant's message at the end is no part of the prompt, and is the answer where no
    column has one.

    Args:
        path_or_hub_id: a folder that holds `<split>.jsonl` (or .json, .csv, .parquet), one such file, or a
            hub id such as "openai/gsm8k"; of several configurations on the hub, "main" is taken.
        split: "train", "test", ...; of a single file, it is the name of the whole.
        chat: make plain questions the message of a user, for models that have been trained to chat.

    Returns:
        A Dataset with the columns `prompt` (the question and a line break, or messages), `answer` (the final answer:
        what follows "####" or stands in \\boxed{...} where they occur) and `solution` (the worked answer as it
        stands in the source).

    Raises:
        FileNotFoundError: a path that looks local and does not exist, or a folder without the split.
        ValueError: an unreadable or empty source, or one that lacks a prompt or an answer.
        TypeError: an argument of the wrong type.

    >>> load_problems("data/problems", "test")[0]["answer"]                  # doctest: +SKIP
    '22'
    >>> load_problems("openai/gsm8k", "test", chat=True)[0]["prompt"]        # doctest: +SKIP
    [{'content': 'Janet’s ducks lay 16 eggs per day. ...', 'role': 'user'}]
    """
    checks.instance("path_or_hub_id", path_or_hub_id, (str, Path))
    checks.instance("split", split, str, "the name of a split")
    checks.boolean("chat", chat)
    table = _read(path_or_hub_id, split)
    if len(table) == 0:
        raise ValueError(f"path_or_hub_id: {str(path_or_hub_id)!r} holds no problems for split {split!r}")
    prompt_column = _column(table, PROMPT_COLUMNS, path_or_hub_id)
    answered = prompt_column == CONVERSATIONS and not set(ANSWER_COLUMNS) & set(table.column_names)
    answer_column = None if answered else _column(table, ANSWER_COLUMNS, path_or_hub_id)
    problems = {"prompt": [], "answer": [], "solution": []}
    for i, row in enumerate(table):
        try:
            prompt, solution = _prompt_and_solution(row, prompt_column, answer_column)
        except (TypeError, ValueError) as error:
            raise ValueError(f"path_or_hub_id: row {i} of {str(path_or_hub_id)!r}: {error}") from error
        if isinstance(prompt, str):
            prompt = as_messages(prompt) if chat else prompt.strip() + "\n"
        final = final_answer(solution)
        problems["prompt"].append(prompt)
        problems["answer"].append(normalise_answer(final) if ANSWER_MARK in solution else final)
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


def _prompt_and_solution(row: Mapping[str, Any], prompt_column: str, answer_column: str | None) -> tuple[Prompt, str]:
    """What is asked, as it stands, and the worked answer."""
    prompt = row[prompt_column]
    if isinstance(prompt, list):
        check_messages(repr(prompt_column), prompt)
    elif not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"expected text in {prompt_column!r}, got {prompt!r}")
    answered = prompt_column == CONVERSATIONS and isinstance(prompt, list) and prompt[-1]["role"] == "assistant"
    if not (answered or answer_column):
        raise ValueError(f"expected the assistant's message at the end of {prompt_column!r}")
    value = row[answer_column] if answer_column else prompt[-1]["content"]
    if answered:
        prompt = prompt[:-1]
        check_messages(repr(prompt_column), prompt)
    return prompt, answer_text(repr(answer_column or prompt_column), value).strip()
