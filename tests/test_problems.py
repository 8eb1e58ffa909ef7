import json

import pytest
import torch
from datasets import Dataset

import deltah as dh
from conftest import GSM8K, ROOT


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
    ('{"text": "1+1?"}', "expected a column named prompt or question or problem or messages, got text"),
    ('{"question": "1+1?", "reply": "2"}', "expected a column named answer or solution"),
    ('{"question": "  ", "answer": "2"}', "row 0 .* expected text in 'question'"),
    ('{"question": "1+1?", "answer": "#### "}', "row 0 .* 'answer': expected an answer, got '#### '"),
    ('{"question": "1+1?", "answer": "  "}', "row 0 .* 'answer': expected an answer, got '  '"),
    ('{"question": "1+1?", "answer": 2}\n{"question": "1+2?", "answer": null}',
     "row 1 .* 'answer': expected text or a number, got None"),
    ('{"question": "1+1?", "answer": true}', "row 0 .* 'answer': expected text or a number, got True"),
    ('{"question": 5, "answer": "2"}', "row 0 .* expected text in 'question', got 5"),
    ('{"prompt": [], "answer": "2"}', "row 0 .* 'prompt': expected at least one message"),
    ('{"prompt": ["1+1?"], "answer": "2"}', r"row 0 .* 'prompt'\[0\]: expected a message .*, got '1\+1\?'"),
    ('{"prompt": [{"role": "user"}], "answer": "2"}', r"row 0 .* 'prompt'\[0\]: expected text under 'content'"),
    ('{"messages": [{"role": "user", "content": "1?"}]}', "row 0 .* the assistant's message at the end of 'messages'"),
    ('{"messages": [{"role": "assistant", "content": "2"}]}', "row 0 .* 'messages': expected at least one message"),
    ('{"messages": "1+1?"}', "row 0 .* the assistant's message at the end of 'messages'"),
    ('{"prompt": "1+1?", "messages": [{"role": "assistant", "content": "2"}]}', "expected a column named answer or"),
])
def test_unreadable_files_are_named(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        dh.load_problems(path, "train")


@pytest.mark.parametrize("arguments, message", [
    ((None, "train"), "path_or_hub_id: expected a str or Path, got None"), (("x", None), "split: expected"),
    (("x", 3), "split: expected the name of a split, got 3"), (("x", "train", "yes"), "chat: expected True or False"),
])
def test_arguments_of_the_wrong_type_are_named(arguments, message):
    with pytest.raises(TypeError, match=message):
        dh.load_problems(*arguments)


def written(folder, *rows):
    path = folder / "mine.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_numbers_are_answers(tmp_path):
    loaded = dh.load_problems(written(tmp_path, {"prompt": "1+1?", "answer": 2}, {"prompt": "0?", "answer": 0}), "t")
    assert loaded["answer"][:] == ["2", "0"]
    loaded = dh.load_problems(written(tmp_path, {"question": "1/4?", "answer": .25}), "t")
    assert loaded["answer"][:] == ["0.25"]


def test_an_answer_in_a_box_is_found(tmp_path):
    row = {"problem": "1/4+1/4?", "solution": r"It is $\boxed{\frac{1}{2}}$."}
    loaded = dh.load_problems(written(tmp_path, row), "t")[0]
    assert loaded == {"prompt": "1/4+1/4?\n", "answer": r"\frac{1}{2}", "solution": row["solution"]}


SYSTEM, ASKED, TOLD = ({"role": role, "content": text} for role, text in (
    ("system", "Be brief."), ("user", " 1+1?\n"), ("assistant", "1+1=2\n#### 2")))


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("row, prompt", [
    ({"prompt": [SYSTEM, ASKED], "answer": "2"}, [SYSTEM, ASKED]),
    ({"question": [ASKED], "solution": "#### 2"}, [ASKED]),
    ({"messages": [SYSTEM, ASKED, TOLD]}, [SYSTEM, ASKED]),
    ({"messages": [ASKED, TOLD, ASKED, TOLD]}, [ASKED, TOLD, ASKED]),
    ({"messages": [ASKED, {**TOLD, "content": "9"}], "answer": "2"}, [ASKED]),
    ({"messages": [ASKED], "answer": 2}, [ASKED]),
    ({"prompt": [ASKED], "messages": [SYSTEM, ASKED, {**TOLD, "content": "9"}], "answer": "2"}, [ASKED]),
])
def test_conversations_stay_as_they_are(tmp_path, row, prompt, chat):
    loaded = dh.load_problems(written(tmp_path, row), "t", chat=chat)
    assert loaded.column_names == ["prompt", "answer", "solution"]
    assert loaded[0]["prompt"] == prompt and loaded[0]["answer"] == "2"


def test_chat_makes_messages_of_plain_questions():
    path = ROOT / "data" / "problems"
    plain, chat = dh.load_problems(path, "test"), dh.load_problems(path, "test", chat=True)
    assert [[{"role": "user", "content": x.removesuffix("\n")}] for x in plain["prompt"]] == chat["prompt"][:]
    assert plain["answer"][:] == chat["answer"][:]


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
