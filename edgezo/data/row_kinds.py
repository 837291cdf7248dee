"""Ways to read rows: a record becomes a draft, text with the stretches to be predicted marked.

    Record(where, fields) -> Draft(pieces, label)

A row is recognised by its keys: ``text``; ``prompt`` + ``completion``; ``prompt``, ``chosen``, ``rejected``;
``messages``; or any fields with a template, a label field and label words.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from edgezo.data.preferences import PAIR
from edgezo.data.row_files import Problems, Record
from edgezo.data.tasks import Task
from edgezo.data.templates import (
    MASK,
    Template,
    derive_labels,
    label_key,
    parse_labels,
    parse_template,
    wants_space,
    word_ids,
)
from edgezo.errors import UsageError

DEFAULT_TEMPLATE = "{text}\nLabel:"


# ----------------------------------------------------------------------------------------- forms


@dataclass(frozen=True)
class Piece:
    """Text of one token sequence; ``spans`` are the characters to predict (none: a label word)."""

    text: str
    spans: tuple[tuple[int, int], ...] = ()
    ends: bool = False  # the end token follows and is predicted
    bare: bool = False  # the text holds its own special tokens (a chat template wrote them)
    right: str | None = None  # masked models: what follows the mask token, which follows ``text``


@dataclass(frozen=True)
class Draft:
    """One example before tokenization: one piece, or one for each option."""

    pieces: tuple[Piece, ...]
    label: int = -1
    options: tuple[str, ...] = ()  # the texts of a choice
    answers: tuple[str, ...] = ()  # every right one; () of a label
    fields: Mapping[str, Any] | None = None  # of its row, where predictions are judged by them


class Form(Protocol):
    """One way to read rows."""

    @property
    def kind(self) -> str:
        """The kind of data set that comes of it: "label", "choice", "completion" or "text"."""
        ...

    def draft(self, record: Record, problems: Problems) -> Draft | None:
        """The example of one row; None after adding what is wrong with it."""
        ...


def _lacks(record: Record, names: Sequence[str], problems: Problems) -> bool:
    """Adds the fields that a row does not have, or has as something that is no text or number."""
    missing = [n for n in names if not isinstance(record.fields.get(n), str | int | float)]
    for name in missing:
        state = "is no text or number" if record.fields.get(name) is not None else "is missing"
        problems.add(f"field {name!r} {state}", at=f"{record.where} (it has: {record.keys})")
    return bool(missing)


def seam(before: str, after: str) -> str:
    """What joins two texts: a space, unless there is white space already or the script has none."""
    if not before or not after or before[-1].isspace() or after[0].isspace():
        return ""
    wide = (unicodedata.east_asian_width(c) in "WF" for c in (before[-1], after[0]))
    return "" if any(wide) else " "


@dataclass(frozen=True)
class TextForm:
    """``text``: every token is predicted from those before it."""

    kind: str = "text"

    def draft(self, record: Record, problems: Problems) -> Draft | None:
        if _lacks(record, ("text",), problems):
            return None
        text = str(record.fields["text"])
        if not text.strip():
            problems.add("empty text", at=record.where)
            return None
        return Draft((Piece(text, ((0, len(text)),)),))


@dataclass(frozen=True)
class CompletionForm:
    """``prompt`` and ``completion``: the completion and the end token are predicted."""

    kind: str = "completion"

    def draft(self, record: Record, problems: Problems) -> Draft | None:
        if _lacks(record, ("prompt", "completion"), problems):
            return None
        prompt, completion = (str(record.fields[n]) for n in ("prompt", "completion"))
        if not completion.strip():
            problems.add("empty completion", at=record.where)
            return None
        return Draft((_completed(prompt, completion),), answers=(completion.strip(),))


def _completed(prompt: str, completion: str) -> Piece:
    text = prompt + seam(prompt, completion) + completion
    return Piece(text, ((len(prompt), len(text)),), ends=True)


@dataclass(frozen=True)
class WrittenForm:
    """A filled template and an answer in words of its own, which ends; several may be right."""

    template: Template
    source: str  # the field that a task finds its answers in
    kind: str = "completion"

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
class PairForm:
    """``prompt``, ``chosen`` and ``rejected``: which of two answers, their end tokens included."""

    kind: str = "choice"

    def draft(self, record: Record, problems: Problems) -> Draft | None:
        if _lacks(record, PAIR, problems):
            return None
        prompt, *answers = (str(record.fields[name]) for name in PAIR)
        if not all(answer.strip() for answer in answers) or answers[0] == answers[1]:
            problems.add("an empty answer, or twice the same", at=record.where)
            return None
        texts = [prompt + seam(prompt, answer) + answer for answer in answers]
        pieces = [Piece(text, ((len(prompt), len(text)),), ends=True) for text in texts]
        return Draft(tuple(pieces), 0)


@dataclass(frozen=True)
class MessagesForm:
    """``messages``: the assistant's turns, with their end tokens, are predicted.

    A turn's text is what the chat template adds when the turn is appended. Where a template writes
    earlier turns differently once more follow, only the last and those that stay the same count.
    """

    tokenizer: Any
    kind: str = "completion"

    def draft(self, record: Record, problems: Problems) -> Draft | None:
        messages = record.fields.get("messages")
        wrong = self._wrong(messages)
        if wrong or not isinstance(messages, list):
            problems.add(f"messages: {wrong}", at=f"{record.where} (it has: {record.keys})")
            return None
        last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        try:
            full = self._render(messages[: last + 1])
            spans = []
            for index in (i for i, m in enumerate(messages) if m["role"] == "assistant"):
                before = self._render(messages[:index], add_generation_prompt=True)
                after = self._render(messages[: index + 1]).rstrip()
                if full.startswith(after) and after.startswith(before):
                    spans.append((len(before), len(after)))
                elif index == last:  # no clean start: from where the two renderings part
                    before = self._render(messages[:index])
                    start = next(
                        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b),
                        min(len(before), len(after)),
                    )
                    spans.append((start, len(after)))
        except (
            Exception
        ) as error:  # a template is a program of the model's authors: any error can come
            problems.add("the chat template refuses a row", at=f"{record.where}: {error}")
            return None
        spans = [span for span in spans if span[0] < span[1]]
        answers = (messages[last]["content"].strip(),)
        return Draft((Piece(full.rstrip(), tuple(spans), bare=True),), answers=answers)

    def _render(self, messages: list[Any], **options: Any) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))

    @staticmethod
    def _wrong(messages: Any) -> str:
        if not isinstance(messages, list) or not messages:
            return "not a list of turns"
        for turn in messages:
            if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
                return 'a turn is not {"role": ..., "content": ...}'
            if not isinstance(turn.get("content"), str):
                return f"a turn of {turn['role']!r} has no text content"
        if not any(t["role"] == "assistant" and t["content"].strip() for t in messages):
            return "no assistant turn with text, so nothing to learn"
        return ""


@dataclass(frozen=True)
class LabelForm:
    """A filled template and one label word after it (or at the mask)."""

    left: Template
    right: Template | None  # after the mask; None for causal models
    label_field: str
    index: Mapping[str, int]  # label -> its place among the label words
    kind: str = "label"

    def draft(self, record: Record, problems: Problems) -> Draft | None:
        names = (*self.left.names, *(self.right.names if self.right else ()))
        if _lacks(record, (*names, self.label_field), problems):
            return None
        label = self.label(record, problems)
        right = None if self.right is None else self.right.fill(record.fields)
        text = self.left.fill(record.fields).rstrip(" ")
        return None if label is None else Draft((Piece(text, right=right),), label)

    def label(self, record: Record, problems: Problems) -> int | None:
        key = label_key(record.fields[self.label_field])
        if key is None or key not in self.index:
            known = ", ".join(list(self.index)[:10]) + (", ..." if len(self.index) > 10 else "")
            problems.add(
                f"label outside the set ({known})", at=f"{record.where}: {self.label_field}={key!r}"
            )
            return None
        return self.index[key]


@dataclass(frozen=True)
class ChoiceForm:
    """A filled template with one of several texts after it."""

    labels: LabelForm
    options: tuple[Template, ...]
    kind: str = "choice"

    def draft(self, record: Record, problems: Problems) -> Draft | None:
        if _lacks(record, [name for option in self.options for name in option.names], problems):
            return None
        prompt = self.labels.draft(record, problems)
        if prompt is None:
            return None
        options = tuple(option.fill(record.fields) for option in self.options)
        return _choice(prompt.pieces[0].text, options, prompt.label)


def _choice(text: str, options: tuple[str, ...], label: int) -> Draft:
    wholes = [text + seam(text, option) + option for option in options]
    pieces = [Piece(whole, ((len(text), len(whole)),)) for whole in wholes]
    return Draft(tuple(pieces), label, options)


@dataclass(frozen=True)
class OwnOptionsForm:
    """A filled template and one of the texts that the row lists, as many as it likes."""

    template: Template
    options_field: str
    label_field: str
    kind: str = "choice"

    def draft(self, record: Record, problems: Problems) -> Draft | None:
        if _lacks(record, self.template.names, problems):
            return None
        options = record.fields.get(self.options_field)
        if not isinstance(options, list) or not all(isinstance(o, str) for o in options):
            problems.add(f"field {self.options_field!r} is no list of texts", at=record.where)
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


# ----------------------------------------------------------------------------------- recognition


@dataclass(frozen=True)
class Asked:
    """What is known of labelled rows before they are read."""

    template: Template | None
    words: Mapping[str, str] | None  # label -> label word
    options: tuple[Template, ...]
    label_field: str
    labelled: bool  # something says that the rows have labels


def ask(
    task: Task | None,
    template: str | None,  # of the user, over the task's
    labels: str | None,  # of the user, over the task's
    label_field: str,
    problems: Problems,
) -> Asked:
    """What the user asked for, over what the task says."""
    default_field = label_field == "label"
    if task and (task.options or task.own_options) and labels:
        problems.add(f"--task {task.name} has its own candidates in every row: leave out --labels")
    if task and task.generation and labels:
        problems.add(f"--task {task.name} has written answers: leave out --labels")
    text = template or (task.template if task else None)
    labels = labels or (task.labels if task else None)
    options = [parse_template(option, problems) for option in task.options] if task else []
    return Asked(
        template=parse_template(text, problems) if text else None,
        words=parse_labels(labels, problems) if labels else None,
        options=tuple(option for option in options if option),
        label_field=task.label_field if task and default_field else label_field,
        labelled=bool(text or labels or not default_field),
    )


def task_form(task: Task | None, asked: Asked, masked: bool, problems: Problems) -> Form | None:
    """The form of a task whose rows have neither label words nor the same options; None for others."""
    if task is None or not (task.generation or task.own_options):
        return None
    if masked:
        problems.add(f"--task {task.name} needs a causal language model")
    if asked.template is None:  # the user's is not understood
        problems.raise_any()
    assert asked.template is not None
    if task.own_options:
        return OwnOptionsForm(asked.template, task.own_options, asked.label_field)
    return WrittenForm(asked.template, task.source)


def plain_form(first: Record, asked: Asked, tokenizer: Any) -> Form | None:
    """The form of rows without labels, by the keys of the first; None where rows are labelled."""
    if asked.labelled:
        return None
    if "messages" in first.fields:
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(
                "the rows have 'messages', but this model has no chat template: use an instruction-"
                "tuned model, or rows with prompt and completion"
            )
        return MessagesForm(tokenizer)
    if all(name in first.fields for name in PAIR):
        return PairForm()
    if "prompt" in first.fields and "completion" in first.fields:
        return CompletionForm()
    if asked.label_field in first.fields:
        return None
    if "text" in first.fields:
        return TextForm()
    raise UsageError(
        f"rows of this kind are not known: {first.where} has the keys {first.keys}. edgezo reads "
        "rows with text; with prompt and completion; with prompt, chosen and rejected; with messages; or any "
        "others with a "
        "label, given --template '{field} ...', --labels '0=word,1=word' and --label-field"
    )


def labelled_form(
    asked: Asked,
    train: Sequence[Record],
    known: Sequence[Record],  # those that labels are found in, where no label words were given
    tokenizer: Any,
    masked: bool,
    problems: Problems,
    notes: list[str],
) -> tuple[Form, tuple[int, ...], tuple[str, ...]]:
    """The form, the label words' token ids (kind "label") and the names of the candidates."""
    keys = {str(key) for record in train for key in record.fields}
    has = ", ".join(sorted(keys)[:12])
    template = asked.template
    if template is None and "text" in keys:
        template = parse_template(DEFAULT_TEMPLATE, problems)
        notes.append(f"no --template: prompts are written as {DEFAULT_TEMPLATE!r}")
    if template is None:
        problems.add(f"give --template: how the fields of a row ({has}) become a prompt")
    elif unknown := [n for n in template.names if n not in keys and n != MASK]:
        problems.add(f"--template names {', '.join(unknown)}; the rows have: {has}")
    if asked.label_field not in keys:
        problems.add(f"no row has the label field {asked.label_field!r}; the rows have: {has}")
    options, words = asked.options, asked.words
    if options:
        words = {str(i): option.names[0] for i, option in enumerate(options)}
    elif words is None and asked.label_field in keys:
        words = derive_labels(known, asked.label_field, problems)
    problems.raise_any()
    assert template is not None and words is not None

    names = tuple(words.values())
    index = {key: i for i, key in enumerate(words)}
    seen = {label_key(record.fields.get(asked.label_field)) for record in train}
    if absent := [key for key in index if key not in seen]:
        notes.append(f"no training row has label {', '.join(absent)}")
    left, right = _around_mask(template, tokenizer, masked, problems)
    labels = LabelForm(left, right, asked.label_field, index)
    if options:
        if masked:
            problems.add("candidates of several words need a causal language model")
        problems.raise_any()
        return ChoiceForm(labels, options), (), names

    at_line_start = left.tail.rstrip(" ").endswith("\n")
    joined = masked and not left.tail.endswith(" ")
    spaced = not at_line_start and not joined and wants_space(tokenizer, names)
    tokens = {name: word_ids(tokenizer, name, spaced) for name in names}
    unknown_id = tokenizer.unk_token_id
    for name, ids in tokens.items():
        if not ids or ids[0] == unknown_id:
            problems.add(f"the label word {name!r} is not in this model's vocabulary")
    firsts = tuple(ids[0] for ids in tokens.values() if ids)
    long = [name for name, ids in tokens.items() if len(ids) > 1]
    shared = [name for name, ids in tokens.items() if ids and firsts.count(ids[0]) > 1]
    listed = ", ".join(shared)
    if shared and masked:
        problems.add(
            f"label words {listed} begin with the same token, and a masked model predicts one: "
            "give others with --labels"
        )
    problems.raise_any()
    if shared:
        notes.append(
            f"label words {listed} begin with the same token: each candidate is scored in a row of "
            f"its own ({len(names)} rows an example); other words in --labels would be faster"
        )
        return ChoiceForm(labels, tuple(Template(((n, None),)) for n in names)), (), names
    if long:
        notes.append(f"label words of several tokens are scored by their first: {', '.join(long)}")
    return labels, firsts, names


def _around_mask(
    template: Template, tokenizer: Any, masked: bool, problems: Problems
) -> tuple[Template, Template | None]:
    """What stands before and after the label word; None after it for causal models."""
    left, right = template.split()
    if masked:
        if tokenizer.mask_token_id is None:
            problems.add("this model's tokenizer has no mask token")
        if right is None:
            left = Template((*left.parts, (" ", None)))
            right = Template(((" .", None),))
        return left, right
    if right is not None and (right.names or right.tail.strip(" .")):
        problems.add(
            "the template has text after {mask}: a causal model predicts the label word from what "
            "stands before it, so {mask} comes last"
        )
    return left, None
