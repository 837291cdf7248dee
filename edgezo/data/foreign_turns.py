"""Rows of other programs that are conversations, as lists of turns.

instruction, input, output      Alpaca's form; also history, a list of earlier questions and answers, and system
mapping, current_node           a conversation that ChatGPT exported: a tree, of which the last branch is read
chat_messages                   a conversation that Claude exported
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ALPACA = ("instruction", "input", "output")
MORE_OF_ALPACA = ("history", "system")
EXPORTED = ("mapping", "current_node", "chat_messages")
# A row with one of these is of another kind, whatever else it has.
_OTHERS = ("text", "completion", "label", "chosen", "rejected")
_SENDERS = {"human": "user", "user": "user", "assistant": "assistant"}


def is_alpaca(fields: Mapping[str, Any]) -> bool:
    """Whether a row is an instruction with its answer."""
    return "instruction" in fields and "output" in fields and fields.keys().isdisjoint(_OTHERS)


def is_exported(fields: Mapping[str, Any]) -> bool:
    """Whether a row is a conversation as ChatGPT or Claude exports it."""
    tree = isinstance(fields.get("mapping"), Mapping) and "current_node" in fields
    return (tree or isinstance(fields.get("chat_messages"), list)) and "text" not in fields


def foreign_turns(fields: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The turns of such a row, the last of Alpaca's without an answer if the row has none; None of any other row.

    Raises ValueError for an answer without text.
    """
    if is_exported(fields):
        messages = (
            _of_tree(fields) if isinstance(fields.get("mapping"), Mapping) else _of_list(fields)
        )
        return _joined(messages)
    return _of_alpaca(fields) if "instruction" in fields else None


def asked_of_alpaca(fields: Mapping[str, Any]) -> str:
    """What an instruction and its input ask."""
    texts = (str(fields.get(name) or "").strip() for name in ALPACA[:2])
    return "\n\n".join(text for text in texts if text)


def _of_alpaca(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    turns = list[dict[str, Any]]()
    if system := fields.get("system"):
        turns.append({"role": "system", "content": system})
    history = fields.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(p, list) and len(p) == 2 for p in history
    ):
        raise ValueError("'history' is not a list of pairs of a question and its answer")
    for question, answer in history:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    turns.append({"role": "user", "content": asked_of_alpaca(fields)})
    if "output" in fields:
        if not str(fields["output"] or "").strip():
            raise ValueError("the field 'output' is empty")
        turns.append({"role": "assistant", "content": fields["output"]})
    return turns


def _of_tree(fields: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    """(role, text) of the messages from the root of a tree to its current end; a circle ends where it closes."""
    nodes, at = fields["mapping"], fields["current_node"]
    messages, seen = list[tuple[Any, Any]](), set[str]()
    while isinstance(at, str) and at not in seen and isinstance(nodes.get(at), Mapping):
        seen.add(at)
        node = nodes[at]
        message = _object(node.get("message"))
        author, content = _object(message.get("author")), _object(message.get("content"))
        if content.get("content_type") == "text":
            parts = content.get("parts")
            parts = parts if isinstance(parts, list) else []
            text = "\n".join(part for part in parts if isinstance(part, str))
            messages.append((author.get("role"), text))
        at = node.get("parent")
    return messages[::-1]


def _object(value: Any) -> Mapping[str, Any]:
    """An object of JSON; an empty one in place of anything else."""
    return value if isinstance(value, Mapping) else {}


def _of_list(fields: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    messages = (m for m in fields["chat_messages"] if isinstance(m, Mapping))
    return [(message.get("sender"), message.get("text")) for message in messages]


def _joined(messages: list[tuple[Any, Any]]) -> list[dict[str, Any]]:
    """Turns of the user and the assistant by turns, what one of them says in a row as one turn."""
    turns = list[dict[str, Any]]()
    for sender, text in messages:
        role = _SENDERS.get(sender) if isinstance(sender, str) else None
        if role is None or not isinstance(text, str) or not text.strip():
            continue
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += f"\n\n{text}"
        else:
            turns.append({"role": role, "content": text})
    return turns
