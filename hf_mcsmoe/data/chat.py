"""Conversations among texts: what rows of messages say, and how a tokenizer writes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

# Columns that hold conversations, and the pair that is a text and what follows it.
COLUMNS = ("messages", "conversations")
PAIR = ("prompt", "completion")
# Who speaks, by the names that data sets with `from` and `value` use.
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Chat:
    """A conversation: messages with `role` and `content`, and the tools that are offered in it."""

    messages: tuple[dict[str, Any], ...]
    tools: tuple[Any, ...] = ()


def is_chat(value: Any) -> bool:
    """Tell whether a value is a list of messages, in either form."""
    listed = isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value) > 0
    return listed and all(isinstance(item, Mapping) and ({"role", "from"} & item.keys()) for item in value)


def chat_of(value: Sequence[Mapping[str, Any]], tools: Any = None) -> Chat:
    """Return a list of messages as a conversation.

    Raises:
        ValueError: a speaker of no known role, or a message that says nothing.
    """
    return Chat(tuple(map(_message, value)), tuple(tools) if isinstance(tools, list | tuple) else ())


def _message(given: Mapping[str, Any]) -> dict[str, Any]:
    if "role" in given:
        if not isinstance(given["role"], str) or "content" not in given:
            raise ValueError(f"a message needs a role and a content, and this one has {dict(given)!r:.200}")
        return {name: value for name, value in given.items() if value is not None or name == "content"}
    role = ROLES.get(str(given["from"]))
    if role is None or not isinstance(given.get("value"), str):
        raise ValueError(
            f"a message is 'from' one of {', '.join(ROLES)} and has a text as 'value', and this one is "
            f"{dict(given)!r:.200}"
        )
    return {"role": role, "content": given["value"]}


def written(text: "str | Chat", tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a text as it is, and a conversation as the tokenizer's chat template writes it.

    Raises:
        ValueError: the tokenizer has no template, or one that refuses the conversation.
    """
    if isinstance(text, str):
        return text
    if not tokenizer.chat_template:
        raise ValueError(
            "The data are conversations, and the tokenizer has no chat template to write them by: name a tokenizer "
            "that has one (--tokenizer), or a column of plain text (--column)."
        )
    try:
        given: Any = list(text.messages)
        return str(tokenizer.apply_chat_template(given, tools=list(text.tools) or None, tokenize=False))
    except (TemplateError, TypeError, KeyError) as error:
        raise ValueError(
            f"The tokenizer's chat template refuses a conversation ({error}) that begins {given[0]!r:.200}."
        ) from None
