"""Ways to read rows: a record becomes a draft, which is text with marks on what is to be predicted.

    Record(where, fields) -> Draft(pieces, label)

Which form reads a dataset: recognition.py.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from edgezo.data.chat import ChatTemplates, ChatText, TemplateFails
from edgezo.data.foreign_turns import ALPACA
from edgezo.data.preferences import PAIR, conversations, has_answers_of_turns, prompted
from edgezo.data.row_files import Problems, Record, Remarks
from edgezo.data.templates import Template, label_key
from edgezo.data.turns import OF_TEMPLATE, USED, Conversation, NothingToLearn, conversation

MISSING_WORDS = (
    "nan",
    "none",
    "null",
    "n/a",
    "<na>",
)  # what tables write into a cell without a value
# The prompts of Alpaca's model, without an input and with one.
ALPACA_PROMPTS = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n",
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n",
)


@dataclass(frozen=True)
class Piece:
    """Text of one token sequence."""

    text: str
    # Characters to predict, [start, stop); (): the text is followed by a label word.
    spans: tuple[tuple[int, int], ...] = ()
    ends: bool = False  # the end token follows and is predicted
    bare: bool = False  # the text has its special tokens already (a chat template wrote them)
    after: str | None = None  # masked models: the text after the mask token, which follows ``text``
    clipped: bool = False  # a part of a very long text


@dataclass(frozen=True)
class Draft:
    """One example before tokenisation: one piece, or one for each option."""

    pieces: tuple[Piece, ...]
    label: int = -1
    options: tuple[str, ...] = ()  # the texts of a choice
    answers: tuple[str, ...] = ()  # every right answer; () of a label
    fields: Mapping[str, Any] | None = None  # of its row, if predictions are judged by them
    windows: bool = False  # a text that is longer than a row becomes several examples
    where: str = ""  # the place of its row, for errors


class Form(Protocol):
    """One way to read rows."""

    @property
    def kind(self) -> str:
        """The kind of dataset that it makes: "label", "choice", "completion" or "text"."""
        ...

    @property
    def uses(self) -> tuple[str, ...]:
        """The fields of a row that it reads."""
        ...

    def draft(self, record: Record, problems: Problems) -> Draft | None:
        """The example of one row; None after noting what is wrong with the row."""
        ...


def _listed(names: Sequence[str]) -> str:
    """The fields of these names, for messages."""
    return ("field " if len(names) == 1 else "each of the fields ") + ", ".join(map(repr, names))


def _lacks(record: Record, names: Sequence[str], problems: Problems) -> bool:
    """Whether a row lacks one of the fields, or has something else there than a text or number; notes which."""
    missing = [n for n in names if not _is_text(record.fields.get(n))]
    for name in missing:
        value = record.fields.get(name)
        there = value is not None and not isinstance(value, float)
        state = "is not a text or number" if there else "is missing"
        problems.add(f"field {name!r} {state}", at=f"{record.where} (it has: {record.keys})")
    return bool(missing)


def _is_text(value: Any) -> bool:
    """Whether a field has a text or a number. NaN is what tables have where they have nothing."""
    return isinstance(value, str | int | float) and value == value


def _remark_blanks(record: Record, names: Sequence[str], remarks: Remarks) -> None:
    """Say which of the fields of a prompt are empty, or have what tables write where they have nothing."""
    for name in names:
        text = str(record.fields[name]).strip()
        if not text:
            remarks.add(f"rows whose field {name!r} is empty", record.where)
        elif text.lower() in MISSING_WORDS:
            remarks.add(f"rows whose field {name!r} is the word {text!r}", record.where)


def seam(before: str, after: str) -> str:
    """What joins two texts: a space, or "" where there is white space already or the script writes none."""
    if not before or not after or before[-1].isspace() or after[0].isspace():
        return ""
    wide = (unicodedata.east_asian_width(c) in "WF" for c in (before[-1], after[0]))
    return "" if any(wide) else " "


@dataclass(frozen=True)
class TextForm:
    """``text``: every token is predicted from those before it, and unless told otherwise the end token."""

    ends: bool = True
    windows: bool = False
    kind: str = "text"
    uses: tuple[str, ...] = ("text",)

    def draft(self, record: Record, problems: Problems) -> Draft | None:
        if _lacks(record, ("text",), problems):
            return None
        text = str(record.fields["text"])
        if not text.strip():
            problems.add("field 'text' is empty", at=record.where)
            return None
        _remark_blanks(record, self.uses, problems.remarks)
        ends = self.ends and not record.goes_on
        return Draft((Piece(text, ((0, len(text)),), ends=ends),), windows=self.windows)


@dataclass(frozen=True)
class CompletionForm:
    """``prompt`` and ``completion``: the completion and the end token are predicted."""

    kind: str = "completion"
    uses: tuple[str, ...] = ("prompt", "completion")

    def draft(self, record: Record, problems: Problems) -> Draft | None:
        if _lacks(record, self.uses, problems):
            return None
        prompt, completion = (str(record.fields[n]) for n in self.uses)
        if not completion.strip():
            problems.add("field 'completion' is empty", at=record.where)
            return None
        _remark_blanks(record, self.uses, problems.remarks)
        return Draft((_completed(prompt, completion),), answers=(completion.strip(),))


@dataclass(frozen=True)
class AlpacaForm(CompletionForm):
    """``instruction``, ``input`` and ``output`` for a model without a chat template: as Alpaca's model was asked."""

    uses: tuple[str, ...] = ALPACA

    def draft(self, record: Record, problems: Problems) -> Draft | None:
        if _lacks(record, (ALPACA[0], ALPACA[2]), problems):
            return None
        output = str(record.fields["output"])
        if not output.strip():
            problems.add("field 'output' is empty", at=record.where)
            return None
        texts = [str(record.fields.get(name) or "").strip() for name in ALPACA[:2]]
        prompt = ALPACA_PROMPTS[bool(texts[1])].format(*texts)
        return Draft((_completed(prompt, output),), answers=(output.strip(),))


def _completed(prompt: str, completion: str) -> Piece:
    """A prompt and its completion, which is predicted with the end token."""
    text = prompt + seam(prompt, completion) + completion
    return Piece(text, ((len(prompt), len(text)),), ends=True)


@dataclass(frozen=True)
class WrittenForm:
    """A filled template, followed by an answer that is written, end token included. Several answers may be right."""

    template: Template
    source: str  # the field that a task takes its answers from
    kind: str = "completion"

    @property
    def uses(self) -> tuple[str, ...]:
        return (*self.template.names, self.source)

    def draft(self, record: Record, problems: Problems) -> Draft | None:
        if _lacks(record, self.template.names, problems):
            return None
        answers, target = record.fields.get("answers"), record.fields.get("completion")
        if not isinstance(answers, list) or not isinstance(target, str) or not target.strip():
            problems.add(f"no right answer in the field {self.source!r}", at=record.where)
            return None
        prompt = self.template.fill(record.fields)
        return Draft((_completed(prompt, target),), answers=tuple(answers))


@dataclass(frozen=True)
class MessagesForm:
    """``messages``: what the assistant writes in its turns is predicted, their end tokens included.

    Turns that the template writes in another way once more turns follow, or whose tool calls it leaves out, are not.
    """

    templates: ChatTemplates
    kind: str = "completion"
    uses: tuple[str, ...] = USED

    def draft(self, record: Record, problems: Problems) -> Draft | None:
        asked = _asked(record, problems)
        if asked is None:
            return None
        try:
            chat = self.templates.render(asked)
        except TemplateFails as error:
            problems.add("the model's chat template fails", at=f"{record.where}: {error}")
            if error.over:
                problems.raise_any()
            return None
        _remark(asked, chat, record.where, problems.remarks)
        stop = max((stop for _, stop in chat.spans), default=0)
        piece = Piece(chat.text[:stop], chat.spans, ends=not chat.ended, bare=True)
        return Draft((piece,), answers=(chat.answer,))


@dataclass(frozen=True)
class TurnsForm:
    """Conversations without a chat template, to look at them: a line of each turn, after the name of its role."""

    kind: str = "completion"
    uses: tuple[str, ...] = USED

    def draft(self, record: Record, problems: Problems) -> Draft | None:
        asked = _asked(record, problems)
        if asked is None:
            return None
        text, spans = "", list[tuple[int, int]]()
        for number, message in enumerate(asked.messages):
            content = message.get("content", "")
            content = "\n".join(content) if isinstance(content, list) else content
            if calls := message.get("tool_calls"):
                content = f"{content} {json.dumps(calls, ensure_ascii=False)}".strip()
            start = len(text) + len(f"{message['role']}: ")
            text += f"{message['role']}: {content}\n"
            if number in asked.learned:
                spans.append((start, len(text) - 1))
        return Draft((Piece(text[:-1], tuple(spans), ends=True),))


@dataclass(frozen=True)
class PairForm:
    """``prompt``, ``chosen`` and ``rejected``: which of two answers follows, their end tokens included.

    ``turns`` reads each of the answers where they are lists of turns; None where they are texts.
    """

    turns: MessagesForm | TurnsForm | None = None
    kind: str = "choice"

    @property
    def uses(self) -> tuple[str, ...]:
        return PAIR if self.turns is None else (*PAIR, *OF_TEMPLATE)

    def draft(self, record: Record, problems: Problems) -> Draft | None:
        if self.turns is not None:
            return self._of_turns(self.turns, record, problems)
        record = replace(record, fields=prompted(record.fields))
        if _lacks(record, PAIR, problems):
            return None
        prompt, *answers = (str(record.fields[name]) for name in PAIR)
        if not all(answer.strip() for answer in answers) or answers[0] == answers[1]:
            problems.add(_NO_PAIR, at=record.where)
            return None
        _remark_blanks(record, PAIR, problems.remarks)
        return Draft(tuple(_completed(prompt, answer) for answer in answers), 0)

    def _of_turns(
        self, turns: MessagesForm | TurnsForm, record: Record, problems: Problems
    ) -> Draft | None:
        if not has_answers_of_turns(record.fields):
            problems.add(
                "'chosen' and 'rejected' are not both lists of turns",
                at=f"{record.where} (it has: {record.keys})",
            )
            return None
        both = conversations(record.fields)
        if both[0] == both[1]:
            problems.add(_NO_PAIR, at=record.where)
            return None
        drafts = [
            turns.draft(replace(record, fields=fields, where=f"{record.where}: {name}"), problems)
            for name, fields in zip(PAIR[1:], both, strict=True)
        ]
        pieces = [draft.pieces[0] for draft in drafts if draft is not None]
        return Draft(tuple(pieces), 0) if len(pieces) == len(both) else None


_NO_PAIR = "'chosen' and 'rejected' are twice the same, or one of them is empty"


def templates_of(form: Form) -> ChatTemplates | None:
    """The chat templates that a form renders conversations with, to be closed when it is done."""
    turns = form.turns if isinstance(form, PairForm) else form
    return turns.templates if isinstance(turns, MessagesForm) else None


def _asked(record: Record, problems: Problems) -> Conversation | None:
    """The turns of a row; None after noting why it has none to learn."""
    try:
        return conversation(record.fields)
    except NothingToLearn as why:
        problems.remarks.add(f"rows left out, since {why}", record.where)
    except ValueError as fault:
        problems.add(f"messages: {fault}", at=record.where)
    return None


def _remark(asked: Conversation, chat: ChatText, where: str, remarks: Remarks) -> None:
    """Say what of a conversation is not learned as it stands in its row."""
    for what, turns in (
        (
            "turns of the assistant not learned, since the model's chat template writes them in another way once more "
            "turns follow",
            chat.rewritten,
        ),
        (
            "turns of the assistant not learned, since the model's chat template does not write their tool calls",
            chat.unwritten,
        ),
        (
            "turns of the assistant of which the model's chat template leaves out a part",
            chat.shortened,
        ),
    ):
        if turns:
            remarks.add(what, where, turns)
    if not chat.ended:
        remarks.add(
            "rows whose turns the model's chat template ends with no token: the end token follows the last one",
            where,
        )
    for what in asked.remarks:
        remarks.add(what, where)
    for name in chat.unused:
        remarks.add(f"rows whose {name!r} the model's chat template does not use", where)


@dataclass(frozen=True)
class LabelForm:
    """A filled template, followed by one label word (or with it at the mask)."""

    before: Template  # the label word
    after: Template | None  # the mask; None for causal models
    label_field: str
    index: Mapping[str, int]  # label -> its place among the label words
    blank_prompts: bool = True  # rows may have a prompt of which every field is empty
    kind: str = "label"

    @property
    def prompted(self) -> tuple[str, ...]:
        """The fields of the prompt."""
        return (*self.before.names, *(self.after.names if self.after else ()))

    @property
    def uses(self) -> tuple[str, ...]:
        return (*self.prompted, self.label_field)

    def draft(self, record: Record, problems: Problems) -> Draft | None:
        if _lacks(record, self.uses, problems):
            return None
        if not self.blank_prompts and not any(str(record.fields[n]).strip() for n in self.prompted):
            problems.add(
                f"{_listed(self.prompted)} is empty, so there is no prompt", at=record.where
            )
            return None
        _remark_blanks(record, self.prompted, problems.remarks)
        label = self.label(record, problems)
        after = None if self.after is None else self.after.fill(record.fields)
        text = self.before.fill(record.fields).rstrip(" ")
        return None if label is None else Draft((Piece(text, after=after),), label)

    def label(self, record: Record, problems: Problems) -> int | None:
        """The place of a row's label among the label words; None after noting that it has none."""
        key = label_key(record.fields[self.label_field])
        if key == "" and key not in self.index:
            problems.add(
                f"field {self.label_field!r} is empty: a row needs its label", at=record.where
            )
            return None
        if key is None or key not in self.index:
            known = ", ".join(list(self.index)[:10]) + (", ..." if len(self.index) > 10 else "")
            problems.add(
                f"a label that is none of {known}", at=f"{record.where}: {self.label_field}={key!r}"
            )
            return None
        return self.index[key]


@dataclass(frozen=True)
class ChoiceForm:
    """A filled template, followed by one of several texts whose templates are the same in every row."""

    labels: LabelForm
    options: tuple[Template, ...]
    kind: str = "choice"

    @property
    def uses(self) -> tuple[str, ...]:
        return (*self.labels.uses, *self._of_options)

    @property
    def _of_options(self) -> list[str]:
        return [name for option in self.options for name in option.names]

    def draft(self, record: Record, problems: Problems) -> Draft | None:
        if _lacks(record, self._of_options, problems):
            return None
        prompt = self.labels.draft(record, problems)
        if prompt is None:
            return None
        options = tuple(option.fill(record.fields) for option in self.options)
        return _choice(prompt.pieces[0].text, options, prompt.label)


def _choice(text: str, options: tuple[str, ...], label: int) -> Draft:
    """A text, followed by one of ``options``, each in another piece."""
    wholes = [text + seam(text, option) + option for option in options]
    pieces = [Piece(whole, ((len(text), len(whole)),)) for whole in wholes]
    return Draft(tuple(pieces), label, options)


@dataclass(frozen=True)
class ListedOptionsForm:
    """A filled template, followed by one of the texts that the row lists, of which there may be any number."""

    template: Template
    options_field: str
    label_field: str
    kind: str = "choice"

    @property
    def uses(self) -> tuple[str, ...]:
        return (*self.template.names, self.options_field, self.label_field)

    def draft(self, record: Record, problems: Problems) -> Draft | None:
        if _lacks(record, self.template.names, problems):
            return None
        options = record.fields.get(self.options_field)
        if not isinstance(options, list) or not all(isinstance(o, str) for o in options):
            problems.add(f"field {self.options_field!r} is not a list of texts", at=record.where)
            return None
        options = tuple(option.strip() for option in options if option.strip())
        label = record.fields.get(self.label_field)
        if not isinstance(label, int) or not 0 <= label < len(options):
            problems.add(
                f"no right answer is among the texts of {self.options_field!r}", at=record.where
            )
            return None
        answers = record.fields.get("answers")
        if not isinstance(answers, list):
            answers = [options[label]]
        draft = _choice(self.template.fill(record.fields), options, label)
        return replace(draft, answers=tuple(a for a in answers if isinstance(a, str)))
