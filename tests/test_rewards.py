import json
import threading
from decimal import Decimal

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

import deltah as dh
from conftest import GSM8K
from deltah import rewards
from deltah.rewards import extract_boxed, extract_last_number, final_answer, normalise_answer


@pytest.mark.parametrize("text, answer", [
    ("9 * 2 = $18\n#### 18", "18"), ("#### 1,234", "1234"), ("#### $12.50", "12.5"), ("#### -3.", "-3"),
    ("#### 5\n#### 7", "7"), ("####  42  \nextra", "42"), ("no mark", None), ("#### ", ""), ("#### 0.0", "0"),
    ("#### 5 #### 7", "7"), ("#### 5\n####", ""), ("####\n5", ""), ("##### 5", "5"), ("####\u2009\t ", ""),
])
def test_extracts_the_final_answer(text, answer):
    assert dh.extract_answer(text) == answer


@pytest.mark.parametrize("answers", [
    (".5", "0.5", "0.50", "+.5", "$0.5", "5e-1"), ("-0", "0", "+0", "-0.00", "−0", "0e5"),
    ("007", "7", "7.", "7.0", " 7 "),
    ("1,000", "1000", "1e3", "1E+3", "1 000", "1\u2009000", "1\u202f000", r"1\,000", "1{,}000", r"1,\!000",
     "1,000.00."),
    ("−5", "-5", "–5", "- 5", "-$5", "$-5", r"-\$5", "\ufe635"), ("50%", r"50\%", "50 %", "50"),
    ("1,00,000", "100,000", "100000"), ("1/2", r"\frac{1}{2}", r"\dfrac{1}{2}", "$1/2$", "1 / 2"), ("٣", "3"),
    ("blue whale.", "blue whale", "bluewhale"), ("\u200b5", "5\ufeff", "5"), ("€5", "£5", "¥5", "5"),
    ("1" + "0" * 40 + "1", "+1" + "0" * 40 + "1.0"),
])
def test_equal_answers_have_one_spelling(answers):
    assert {normalise_answer(answer) for answer in answers} == {normalise_answer(answers[0])}


@pytest.mark.parametrize("one, other", [
    ("1,2", "12"), ("12 34", "1234"), ("1 1/2", "11/2"), ("1/2", "0.5"), ("2/4", "1/2"), ("007a", "7a"), ("5", "-5"),
    ("10,00", "1000"), ("1.5", "15"), ("0." + "0" * 30 + "1", "0"), ("1" + "0" * 40 + "1", "1" + "0" * 41),
    ("1e3", "1e4"),
])
def test_other_answers_have_others(one, other):
    assert normalise_answer(one) != normalise_answer(other)


@pytest.mark.parametrize("answer, spelling", [
    ("100", "100"), ("blue", "blue"), ("$", ""), ("...", ""), (" \u2009", ""), ("1e999999999", "1e999999999"),
    ("-1,234,567.250", "-1234567.25"),
])
def test_spellings(answer, spelling):
    assert normalise_answer(answer) == spelling


@settings(max_examples=300, deadline=None)
@given(st.decimals(allow_nan=False, allow_infinity=False, min_value=Decimal("-1e30"), max_value=Decimal("1e30")),
       st.integers(0, 3), st.booleans(), st.sampled_from(["", "$", r"\$", "€"]))
def test_a_number_keeps_its_value_in_every_dress(value, zeros, grouped, currency):
    plain = format(value.copy_abs(), "f")
    whole, _, decimals = plain.partition(".")
    dressed = format(int(whole), ",") if grouped else "0" * zeros + whole
    dressed += f".{decimals}{'0' * zeros}" if decimals else "." * bool(zeros)
    dressed = ("−" if value < 0 else "") + currency + dressed
    found = normalise_answer(dressed)
    assert Decimal(found) == value
    assert found == normalise_answer(str(value))
    assert extract_last_number(f"It is {dressed}") == found


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet="017,. -−$%\\!;{}frac/e+\u2009\u200b\tx", max_size=12))
def test_a_spelling_is_its_own_spelling(answer):
    once = normalise_answer(answer)
    assert normalise_answer(once) == once


@pytest.mark.parametrize("text, number", [
    ("10 - 3 = 7, that is $-1,007.50.", "-1007.5"), ("10-3", "3"), ("= -5", "-5"), ("so -$5", "-5"), ("$10-$3", "3"),
    ("(10)-3", "3"), ("H2O", None), ("答案是5。", "5"), ("so ...5", "5"), (r"1\,000 m", "1000"), ("v1.2.3", None),
    (r"\frac{3}{4}", "3/4"), ("16/2=8", "8"), ("**72**", "72"), ("12,34", "34"), ("1e3", "1000"), ("−3", "-3"),
    ("7 and 1 000", "0"), ("1\u202f000", "1000"), ("words", None), ("", None), ("5kg", "5"), ("half is .5", "0.5"),
])
def test_the_last_number(text, number):
    assert extract_last_number(text) == number


@pytest.mark.parametrize("text, inside", [
    (r"\boxed{1} or \boxed{\frac{1}{2}}.", r"\frac{1}{2}"), (r"\boxed{\{1\}}", r"\{1\}"), (r"\boxed{1", None),
    (r"\boxed{}", ""), (r"\boxed {7}", "7"), (r"\boxed{\boxed{5}}", "5"), ("none", None), (r"\boxed{1} \boxed{2", None),
    ("\\boxed{\n8\n}", "8"), (r"\boxed{a\\}", r"a\\"),
])
def test_the_last_box(text, inside):
    assert extract_boxed(text) == inside


def test_what_a_worked_answer_comes_to():
    assert final_answer("1 + 1 = 2\n#### 2\n") == "2"
    assert final_answer(r"so \boxed{x^2}. ") == "x^2"
    assert final_answer(" 12 ") == "12" and final_answer(r"\boxed{") == ""


def test_rewards_need_the_mark_and_the_right_answer():
    responses = ["#### 18", "18", "#### 18.0", "#### 19", "####", "", "#### 18\n####", "####\n18", "#### 19 #### 18"]
    assert dh.score_answers(responses, ["18"] * 9).tolist() == [1, 0, 1, 0, 0, 0, 0, 0, 1]
    assert dh.score_answers(["#### 4"], ["2+2=4\n#### 4"]).tolist() == [1]
    assert dh.score_answers(["#### 4", "#### 0.1"], [4, np.float32(0.1)]).tolist() == [1, 1]
    with pytest.raises(ValueError, match="answers: expected 1, one for each response, got 2"):
        dh.score_answers(["a"], ["a", "b"])


def test_rewards_are_float32_whatever_pytorch_s_default():
    torch.set_default_dtype(torch.float64)
    try:
        assert dh.score_answers(["#### 4"], ["4"]).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("answer, error", [
    ("", ValueError), ("####", ValueError), ("#### \n", ValueError), (" \u2009", ValueError), ("$", ValueError),
    (".", ValueError), (r"\boxed{}", ValueError), (float("nan"), ValueError), (float("inf"), ValueError),
    (None, TypeError), (True, TypeError), ([5], TypeError), (torch.tensor(0.1), TypeError),
])
def test_an_expected_answer_that_is_none_is_refused(answer, error):
    with pytest.raises(error, match=r"^answers\[1\]: expected"):
        dh.score_answers(["####", "####"], ["1", answer])
    for reward in rewards.REWARDS.values():
        with pytest.raises(error, match=r"^rows\[1\]\['answer'\]: expected"):
            reward(["####", "####"], [{"answer": "1"}, {"answer": answer}])


@pytest.mark.parametrize("name, texts, expected", [
    ("answer", ["#### 1/2", "1/2", "#### .5"], [1, 0, 0]),
    ("last_number", ["#### 1/2", "it is 1/2.", "1/2 or 3"], [1, 1, 0]),
    ("boxed", [r"\boxed{\frac{1}{2}}", "1/2", r"\boxed{1/2} \boxed{}"], [1, 0, 0]),
    ("math", [r"\boxed{\frac{2}{4}}", "so 0.5", "3"], [1, 1, 0]),
])
def test_each_reward_looks_in_its_place(name, texts, expected):
    found = rewards.REWARDS[name](texts, [{"answer": r"half, that is \boxed{1/2}"}] * 3)
    assert found.tolist() == expected and found.dtype == torch.float32


def test_last_number_refuses_answers_that_are_none():
    with pytest.raises(ValueError, match=r"rows\[0\]\['answer'\]: expected a number, .* got 'blue'"):
        rewards.last_number(["5"], [{"answer": "blue"}])


@pytest.mark.parametrize("rows, error, message", [
    ([{"prompt": "a"}], ValueError, r"rows\[0\]: expected an 'answer' to compare with, got prompt"),
    ([], ValueError, "rows: expected 1, one for each text, got 0"),
    (["5"], TypeError, r"rows\[0\]: expected a dict, got '5'"), (None, TypeError, "rows: expected a list, got None"),
])
def test_rows_that_do_not_fit_are_named(rows, error, message):
    for reward in rewards.REWARDS.values():
        with pytest.raises(error, match=message):
            reward(["5"], rows)


@pytest.mark.parametrize("call, message", [
    (lambda: normalise_answer(5), "answer: expected text, got 5"), (lambda: dh.extract_answer(None), "text: expected"),
    (lambda: dh.score_answers("#### 5", ["5"]), "responses: expected a list, got '#### 5'"),
    (lambda: dh.score_answers(["5"], None), "answers: expected a list, got None"),
    (lambda: dh.score_answers([5], ["5"]), r"responses\[0\]: expected text, got 5"),
    (lambda: rewards.math([None], [{"answer": "5"}]), r"texts\[0\]: expected text, got None"),
])
def test_arguments_of_the_wrong_type_are_named(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_math_ends_what_never_would_and_goes_on():
    """9^(9^(9^9)) is one operation of Python's, which no handler of a signal interrupts; in a thread there are none."""
    texts, found = ["1", r"\boxed{9^{9^{9^9}}}", r"\boxed{x + 1}"], []
    rows = [{"answer": "1"}, {"answer": "5"}, {"answer": "1 + x"}]
    thread = threading.Thread(target=lambda: found.append(rewards.math(texts, rows).tolist()))
    thread.start()
    thread.join(60)
    assert found == [[1, 0, 1]]


def test_math_without_its_package_says_how_to_get_it(monkeypatch, shipped):
    monkeypatch.setattr(rewards.importlib.util, "find_spec", lambda name: None)
    data = Dataset.from_dict({"prompt": ["1+1?"], "answer": ["2"]})
    monkeypatch.setattr("deltah.sampling._sample_batch", lambda *_: pytest.fail("sampled before the reward was found"))
    with pytest.raises(ImportError, match="reward: 'math' needs the package math-verify; pip install math-verify"):
        dh.sample(shipped, data, reward="math")


def test_math_names_an_answer_that_it_cannot_read():
    with pytest.raises(ValueError, match=r"rows\[1\]\['answer'\]: math-verify reads nothing in '\\\\text"):
        rewards.math(["", ""], [{"answer": "1"}, {"answer": r"\text{}"}])


def test_a_verifier_that_fails_says_why(monkeypatch, tmp_path):
    (tmp_path / "broken.py").write_text("raise SystemExit('no such thing')")
    monkeypatch.setattr(rewards, "VERIFIER", tmp_path / "broken.py")
    with pytest.raises(RuntimeError, match="reward: math-verify failed: no such thing"):
        rewards.math(["1"], [{"answer": "1"}])


@pytest.fixture(scope="module")
def asked():
    return Dataset.from_dict({"prompt": ["Ava has 3 eggs.", "Ben has 12."], "answer": ["3", "12"], "level": [1, 2]})


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_a_reward_is_any_function_of_texts_and_rows(shipped, asked, kind):
    seen = []

    def reward(texts, rows):
        seen.append((texts, rows))
        return kind([len(text) * row["level"] for text, row in zip(texts, rows, strict=True)])

    rollouts = dh.sample(shipped, asked, responses_per_prompt=3, max_new_tokens=8, reward=reward)
    ((texts, rows),) = seen
    assert texts == shipped.decode(rollouts.response_ids, rollouts.response_mask)
    assert rows == [asked[i] for i in (0, 0, 0, 1, 1, 1)]
    assert rollouts.rewards.tolist() == [len(t) * level for t, level in zip(texts, (1, 1, 1, 2, 2, 2), strict=True)]
    assert rollouts.rewards.dtype == torch.float32


def test_plain_prompts_are_the_rows_of_a_list(shipped):
    rollouts = dh.sample(shipped, ["a", "b"], 2, 4, reward=lambda texts, rows: [row == {"prompt": "b"} for row in rows])
    assert rollouts.rewards.tolist() == [0, 0, 1, 1]
    assert dh.sample(shipped, ["a"], 1, 4).rewards is None


def test_a_named_reward_is_its_function(shipped, problems):
    some = problems.select(range(8))
    named = {name: dh.sample(shipped, some, 2, 48, reward=name) for name in rewards.REWARDS}
    texts = shipped.decode(named["answer"].response_ids, named["answer"].response_mask)
    rows = [some[i // 2] for i in range(16)]
    for name, rollouts in named.items():
        assert torch.equal(rollouts.rewards, rewards.REWARDS[name](texts, rows))
    assert torch.equal(dh.sample(shipped, some, 2, 48).rewards, named["answer"].rewards)
    assert 0 < named["answer"].rewards.sum() < 16
    assert named["boxed"].rewards.sum() == 0
    assert torch.equal(named["math"].rewards, named["last_number"].rewards)


def fail(texts, rows):
    raise KeyError("level")


@pytest.mark.parametrize("reward, message", [
    (fail, r"reward: raised KeyError \('level'\)"), (lambda t, r: None, "a function that returns 4 numbers.*got None"),
    (lambda t, r: [1.0], "a function that returns 4 numbers, one for each text, got 1"),
    (lambda t, r: torch.ones(4, 1), r"reward: value 0: expected a number, got list"),
    (lambda t, r: torch.ones(()), "numbers, one for each text, got 1.0"), (lambda t, r: {0: 1}, "got dict"),
    (lambda t, r: [1, 2, "3", 4], "reward: value 2: expected a number, got '3'"),
    (lambda t, r: [1, None, 3, 4], "reward: value 1: expected a number, got None"),
    (lambda t, r: np.array([1, 2, 3, np.nan]), "reward: value 3: expected a number, got nan"),
    (lambda t, r: [1e300] * 4, "rewards: expected finite numbers"), (lambda t: [1] * 4, "reward: raised TypeError"),
])
def test_what_was_sampled_survives_a_reward_that_fails(shipped, asked, reward, message):
    with pytest.raises(rewards.RewardError, match=message) as raised:
        dh.sample(shipped, asked, 2, 4, reward=reward)
    kept, whole = raised.value.rollouts, dh.sample(shipped, asked, 2, 4)
    assert kept.rewards is None and torch.equal(kept.input_ids, whole.input_ids)


@pytest.mark.parametrize("reward, error", [("exact", ValueError), (3, TypeError), ([fail], TypeError)])
def test_a_reward_that_is_no_function_is_named(shipped, asked, reward, error):
    with pytest.raises(error, match="reward: expected .*answer, last_number, boxed, math, got"):
        dh.sample(shipped, asked, reward=reward)


@pytest.mark.parametrize("answers, error, message", [
    (["3", None], TypeError, r"rows\[1\]\['answer'\]: expected text or a number, got None"),
    (["3", "#### "], ValueError, r"rows\[1\]\['answer'\]: expected an answer, got '#### '"),
    ([3.0, float("nan")], ValueError, r"rows\[1\]\['answer'\]: expected an answer, got 'nan'"),
    ([True, False], TypeError, r"rows\[0\]\['answer'\]: expected text or a number, got True"),
])
def test_answers_are_read_before_the_first_token_is_sampled(shipped, monkeypatch, answers, error, message):
    monkeypatch.setattr("deltah.sampling._sample_batch", lambda *_: pytest.fail("sampled before the answers were read"))
    with pytest.raises(error, match=message):
        dh.sample(shipped, Dataset.from_dict({"prompt": ["a", "b"], "answer": answers}))


@pytest.mark.parametrize("cast", [int, float, lambda x: f" {x}.0 "])
@pytest.mark.parametrize("layout", [None, "numpy", "torch"])
def test_answers_may_be_numbers(shipped, problems, cast, layout):
    some = problems.select(range(8))
    numbers = Dataset.from_dict({"prompt": some["prompt"][:], "answer": [cast(int(x)) for x in some["answer"]]})
    if layout == "torch" and cast is float:
        with pytest.raises(TypeError, match=r"rows\[0\]\['answer'\]: expected text or a number, got a float32 tensor"):
            dh.sample(shipped, numbers.with_format(layout), 2)
        return
    expected = dh.sample(shipped, some, 2)
    assert expected.rewards.sum() > 0
    assert torch.equal(dh.sample(shipped, numbers.with_format(layout), 2).rewards, expected.rewards)


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the GSM8K files are not here")
def test_gsm8k_answers_are_right_by_every_reward():
    solutions = [json.loads(line)["answer"] for name in ("train", "test")
                 for line in (GSM8K / f"{name}.jsonl").read_text().splitlines()]
    rows = [{"answer": solution} for solution in solutions]
    finals = [solution.rsplit("####", 1)[1] for solution in solutions]
    assert rewards.answer(solutions, rows).min() == 1
    assert rewards.last_number(solutions, rows).min() == 1
    assert rewards.last_number([f"Altogether that makes ${final.strip()}." for final in finals], rows).min() == 1
    assert rewards.boxed([f"so \\boxed{{{final}}}" for final in finals], rows).min() == 1
    # The same responses, each held to the next problem's answer.
    shifted = rows[1:] + rows[:1]
    same = [normalise_answer(a) == normalise_answer(b) for a, b in zip(finals, finals[1:] + finals[:1], strict=True)]
    assert rewards.last_number(solutions, shifted).tolist() == same


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the GSM8K files are not here")
def test_gsm8k_answers_are_right_by_math_verify():
    solutions = [json.loads(line)["answer"] for line in (GSM8K / "test.jsonl").read_text().splitlines()][:200]
    rows = [{"answer": solution} for solution in solutions]
    assert rewards.math([solution.rsplit("\n", 1)[1] for solution in solutions], rows).min() == 1
    assert rewards.math([rf"\boxed{{{final_answer(solution)}+1}}" for solution in solutions], rows).max() == 0
