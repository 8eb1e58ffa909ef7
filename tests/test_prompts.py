import copy

import pytest
from datasets import Dataset

import deltah as dh
from deltah.models.prompts import as_messages

# In the manner of the templates that people use: special tokens written out, roles in order, one key asked for.
TEMPLATE = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' and loop.previtem is defined and
 loop.previtem.role == 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}<{{ m.role }}>{{ m.content }}
{%- if m.name is defined %} by {{ m.name }}{% endif %}{{ eos_token }}{% endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}"""

ASKED = {"role": "user", "content": "Ava has 3 eggs. How many?"}
TALK = [{"role": "system", "content": "Be brief."}, ASKED]


@pytest.fixture(scope="module")
def chatting(shipped):
    """The shipped policy with a chat template, and a token that begins a text."""
    tokenizer = copy.deepcopy(shipped.tokenizer)
    tokenizer.add_special_tokens({"bos_token": "~"})
    tokenizer.chat_template = TEMPLATE
    assert tokenizer.bos_token_id < shipped.vocabulary_size
    return dh.Policy(shipped.model, tokenizer)


def templated(policy, messages, **options):
    return policy.tokenizer.apply_chat_template(messages, **options)["input_ids"]


def prompts_of(rollouts):
    width = rollouts.prompt_length
    return [row[kept].tolist() for row, kept in zip(rollouts.input_ids[:, :width], rollouts.attention_mask[:, :width],
                                                    strict=True)]


def test_messages_are_read_by_the_template(chatting):
    found = chatting.encode([TALK, "plain", tuple([ASKED])])
    assert found == [templated(chatting, TALK, add_generation_prompt=True), chatting.tokenizer("plain")["input_ids"],
                     templated(chatting, [ASKED], add_generation_prompt=True)]
    assert chatting.tokenizer.decode(found[0]) == (
        "~<system>Be brief.<|endoftext|><user>Ava has 3 eggs. How many?<|endoftext|><assistant>")


def test_the_assistants_last_message_is_continued(chatting):
    begun = [*TALK, {"role": "assistant", "content": "Ava has"}]
    (found,) = chatting.encode([begun])
    assert found == templated(chatting, begun, continue_final_message=True)
    assert chatting.tokenizer.decode(found).endswith("<assistant>Ava has")


def test_keys_that_only_other_messages_have_are_left_out(chatting):
    table = Dataset.from_dict({"prompt": [[ASKED], [{**ASKED, "name": "Ava"}]]})
    assert table[0]["prompt"][0]["name"] is None
    plain, named = chatting.encode(table["prompt"])
    assert "by Ava" in chatting.tokenizer.decode(named)
    assert plain == templated(chatting, [ASKED], add_generation_prompt=True)


def test_formatted_text_gets_no_second_first_token(chatting):
    from tokenizers.processors import TemplateProcessing
    tokenizer = copy.deepcopy(chatting.tokenizer)
    first = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="~ $A", special_tokens=[("~", first)])
    policy = dh.Policy(chatting.model, tokenizer)
    text = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, tokenize=False)
    assert tokenizer(text)["input_ids"][:2] == [first, first]
    assert policy.encode([text, TALK]) == [templated(chatting, TALK, add_generation_prompt=True)] * 2
    assert policy.encode(["plain"])[0] == [first, *chatting.encode(["plain"])[0]]


@pytest.mark.parametrize("chat", [None, True, False])
def test_when_plain_text_is_the_message_of_a_user(chatting, problems, chat):
    texts = problems["prompt"][:2]
    as_they_stand = chatting.encode(texts)
    by_template = [templated(chatting, as_messages(text), add_generation_prompt=True) for text in texts]
    assert by_template[0] != as_they_stand[0]
    in_a_list = prompts_of(dh.sample(chatting, texts, 1, 4, chat=chat))
    in_a_dataset = prompts_of(dh.sample(chatting, problems.select(range(2)), 1, 4, chat=chat))
    assert in_a_list == (by_template if chat else as_they_stand)
    assert in_a_dataset == (as_they_stand if chat is False else by_template)
    assert prompts_of(dh.sample(chatting, [TALK], 1, 4, chat=chat)) == chatting.encode([TALK])


def test_without_a_template_plain_text_stands_as_it_is(shipped, problems):
    some = problems.select(range(2))
    assert prompts_of(dh.sample(shipped, some, 1, 4)) == shipped.encode(some["prompt"])


def test_conversational_data_are_sampled_and_scored(chatting, problems):
    texts, answers = problems["prompt"][:4], problems["answer"][:4]
    talks = Dataset.from_dict({"prompt": [as_messages(text) for text in texts], "answer": answers})
    rollouts = dh.sample(chatting, talks, 2, 8)
    assert prompts_of(rollouts)[::2] == [templated(chatting, x, add_generation_prompt=True) for x in talks["prompt"]]
    assert rollouts.rewards.shape == (8,)
    seen = dh.sample(chatting, talks, 1, 2, reward=lambda _, rows: [r == t for r, t in zip(rows, talks, strict=True)])
    assert seen.rewards.min() == 1


@pytest.mark.parametrize("arguments", [{"prompts": [TALK]}, {"prompts": ["a"], "chat": True},
                                       {"prompts": Dataset.from_dict({"prompt": [TALK]})}])
def test_messages_without_a_template_are_refused(shipped, arguments):
    with pytest.raises(ValueError, match=r"prompts\[0\]: is a list of messages, and .* has no chat template"):
        dh.sample(shipped, **arguments)


@pytest.mark.parametrize("prompts, error, message", [
    ([[]], ValueError, r"prompts\[0\]: expected at least one message, got an empty list"),
    (["a", [{"role": "user"}]], TypeError, r"prompts\[1\]\[0\]: expected text under 'content', got None"),
    ([[{"role": 1, "content": "a"}]], TypeError, r"prompts\[0\]\[0\]: expected text under 'role', got 1"),
    ([["a"]], TypeError, r"prompts\[0\]\[0\]: expected a message \(a dict with 'role' and 'content'\), got 'a'"),
    (TALK, TypeError, r"prompts\[0\]: expected a string or a list of messages, got dict"),
    ([[ASKED, ASKED]], ValueError, r"prompts\[0\]: the tokenizer's chat template does not take these .*alternate"),
])
def test_messages_that_are_none_are_named(chatting, prompts, error, message):
    with pytest.raises(error, match=message):
        dh.sample(chatting, prompts)
    with pytest.raises(error, match=message):
        chatting.encode(prompts)


def test_an_empty_question_is_refused(chatting):
    with pytest.raises(ValueError, match=r"prompts\[1\]: expected some text, got ' '"):
        dh.sample(chatting, ["a", " "], chat=True)
