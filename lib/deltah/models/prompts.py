"""Prompts as people have them: plain text, or a conversation as a list of messages; and their tokens.

A message is a dict with the texts "role" and "content", as in TRL's conversational data. A tokenizer's chat template
turns messages into tokens, special ones included; plain text is tokenized as it stands.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from transformers import PreTrainedTokenizerBase

from deltah import checks

Message = Mapping[str, str]
Prompt = str | Sequence[Message]

# What is left of a character whose UTF-16 was cut in two, and stands for nothing.
SURROGATE = re.compile("[\ud800-\udfff]")


def as_messages(text: str) -> list[dict[str, str]]:
    """A question as a conversation of one message.

    >>> as_messages("2+2?\\n")
    [{'role': 'user', 'content': '2+2?'}]
    """
    return [{"role": "user", "content": text.strip()}]


def check_messages(name: str, messages: Sequence[Message]) -> None:
    """Raise TypeError or ValueError, with this name, where `messages` are no conversation."""
    if not messages:
        raise ValueError(f"{name}: expected at least one message, got an empty list")
    for i, message in enumerate(messages):
        checks.instance(f"{name}[{i}]", message, Mapping, "a message (a dict with 'role' and 'content')")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise TypeError(f"{name}[{i}]: expected text under {key!r}, got {checks.shown(message.get(key))}")


def check_prompts(prompts: Iterable[Prompt]) -> list[Prompt]:
    """A list of prompts from any iterable of them.

    Raises:
        TypeError: `prompts` is a single string, a dict or no iterable, or holds something else than texts and lists
            of messages.
        ValueError: no prompts, a list without messages, or text that is not Unicode.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts: expected a list of strings, got a single string")
    if isinstance(prompts, (bytes, Mapping, Set)) or not isinstance(prompts, Iterable):
        raise TypeError("prompts: expected a Dataset, or a list of strings or of lists of messages, "
                        f"got {checks.shown(prompts)}")
    prompts = list(prompts)
    if not prompts:
        raise ValueError("prompts: expected at least one prompt, got none")
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, (list, tuple)):
            check_messages(f"prompts[{i}]", prompt)
        elif not isinstance(prompt, str):
            raise TypeError(f"prompts[{i}]: expected a string or a list of messages, got {checks.shown(prompt)}")
        elif SURROGATE.search(prompt):
            raise ValueError(f"prompts[{i}]: expected text, got half of a character (a lone surrogate)")
    return prompts


def conversational(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The same prompts, with plain ones as the message of a user.

    Raises:
        ValueError: a plain one without text.
    """
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str) and not prompt.strip():
            raise ValueError(f"prompts[{i}]: expected some text, got {prompt!r}")
    return [as_messages(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


def has_template(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether a tokenizer can read messages."""
    return bool(getattr(tokenizer, "chat_template", None))


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Prompt]) -> list[list[int]]:
    """Token ids of each prompt, special tokens included: see `Policy.encode`."""
    prompts = check_prompts(prompts)
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    encoded = iter(tokenizer(texts)["input_ids"] if texts else ())
    rows = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            ids = list(next(encoded))
            if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
                # Text that a chat template wrote has this token already, and the tokenizer puts another before it.
                ids = ids[1:]
        else:
            ids = _encode_messages(tokenizer, prompt, f"prompts[{i}]")
        if not ids:
            raise ValueError(f"prompts[{i}]: expected some text, got {prompt!r}, which has no tokens")
        rows.append(ids)
    return rows


def _encode_messages(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], name: str) -> list[int]:
    if not has_template(tokenizer):
        raise ValueError(f"{name}: is a list of messages, and the policy's tokenizer has no chat template to read it "
                         "with; set tokenizer.chat_template, or give plain text")
    # Arrow writes None for the keys that another message of the column has; templates ask whether a key is there.
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    unfinished = messages[-1]["role"] == "assistant"
    options: dict[str, Any] = {"continue_final_message": True} if unfinished else {"add_generation_prompt": True}
    try:
        return list(tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"])
    except Exception as error:  # a template is a program of its own and raises what it likes
        raise ValueError(f"{name}: the tokenizer's chat template does not take these messages ({error})") from error
