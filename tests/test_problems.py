import json

import pytest
import torch
from datasets import Dataset

import deltah as dh
from conftest import GSM8K, ROOT
from deltah.problems import normalise_answer


@pytest.mark.parametrize("text, answer", [
    ("9 * 2 = $18\n#### 18", "18"), ("#### 1,234", "1234"), ("#### $12.50", "12.5"), ("#### -3.", "-3"),
    ("#### 5\n#### 7", "7"), ("####  42  \nextra", "42"), ("no mark", None), ("#### ", ""), ("#### 0.0", "0"),
])
def test_extracts_the_final_answer(text, answer):
    assert dh.extract_answer(text) == answer


def test_normalising_keeps_words_and_trailing_zeros_of_integers():
    assert normalise_answer("100") == "100"
    assert normalise_answer("blue") == "blue"


def test_rewards_need_the_mark_and_the_right_answer():
    responses = ["#### 18", "18", "#### 18.0", "#### 19", "####", ""]
    assert dh.score_answers(responses, ["18"] * 6).tolist() == [1, 0, 1, 0, 0, 0]
    assert dh.score_answers(["#### 4"], ["2+2=4\n#### 4"]).tolist() == [1]
    with pytest.raises(ValueError, match="answers: expected 1, one for each response, got 2"):
        dh.score_answers(["a"], ["a", "b"])


def test_shipped_problems_load_with_the_documented_columns(problems):
    assert problems.column_names == ["prompt", "answer", "solution"]
    assert len(problems) == 1024
    assert all(row["prompt"].endswith("?\n") and row["answer"].isdigit() for row in problems)
    assert dh.score_answers(problems["solution"], problems["answer"]).min() == 1


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_reads_files_of_every_format(tmp_path, ending):
    table = Dataset.from_dict({"problem": ["1+1?", "2+2?"], "solution": ["#### 2", "4"]})
    path = tmp_path / f"mine.{ending}"
    {"jsonl": table.to_json, "json": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[ending](path)
    loaded = dh.load_problems(path, "train")
    assert loaded["prompt"][:] == ["1+1?\n", "2+2?\n"] and loaded["answer"][:] == ["2", "4"]


def test_a_folder_without_the_split_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="split: no validation.jsonl"):
        dh.load_problems(ROOT / "data" / "problems", "validation")
    with pytest.raises(FileNotFoundError, match="path_or_hub_id: no file or folder"):
        dh.load_problems(str(tmp_path / "nothing.jsonl"), "train")


@pytest.mark.parametrize("content, message", [
    ("", "is not readable|holds no problems"),
    ('{"question": "1+1?", "answer": "#### 2"}\n{"question": "2+', "is not readable as .jsonl"),
    ('{"text": "1+1?"}', "expected a column named prompt or question or problem, got text"),
    ('{"question": "1+1?", "reply": "2"}', "expected a column named answer or solution"),
    ('{"question": "  ", "answer": "2"}', "row 0 .* expected text in 'question'"),
    ('{"question": "1+1?", "answer": "#### "}', "row 0 .* expected an answer in 'answer'"),
])
def test_unreadable_files_are_named(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        dh.load_problems(path, "train")


def test_an_unknown_ending_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="path_or_hub_id: expected one of .jsonl"):
        dh.load_problems(tmp_path / "a.txt", "train")


def test_the_splits_do_not_overlap_and_come_from_the_generator():
    read = {name: [json.loads(line) for line in (ROOT / "data" / "problems" / f"{name}.jsonl").read_text().splitlines()]
            for name in ("train", "test")}
    questions = {name: [row["question"] for row in rows] for name, rows in read.items()}
    assert not set(questions["train"]) & set(questions["test"])
    assert all(len(set(q)) == len(q) for q in questions.values())
    import sys
    sys.path.insert(0, str(ROOT / "data"))
    from make_problems import split
    assert split() == (read["train"], read["test"])


def test_every_worked_equation_is_right():
    for row in dh.load_problems(ROOT / "data" / "problems", "train"):
        for word in row["solution"].replace(".", " ").split():
            if "=" in word:
                left, right = word.split("=")
                assert eval(left) == int(right), row["solution"]  # digits, signs and brackets of our own files


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the GSM8K files are not here")
def test_gsm8k_loads_and_scores(shipped):
    train, test = (dh.load_problems(GSM8K, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (7473, 1319)
    assert train[0]["answer"] == "72"
    for row in (*train, *test):
        float(row["answer"])
    assert dh.score_answers(test["solution"], test["answer"]).min() == 1
    rollouts = dh.sample(shipped, test.select(range(4)), responses_per_prompt=2, max_new_tokens=8)
    assert rollouts.rewards.shape == (8,)
    scores = dh.score(shipped, rollouts)
    assert torch.isfinite(scores.entropies).all()
