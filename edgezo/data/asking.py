"""Rows without answers become examples: the same prompts, by the same forms, as in training.

A row gets a stand-in for the answer that is to be predicted, so that the forms of training read it as they read theirs
(row_kinds.py), and the prompt's tokens are those that an evaluation predicts after.

    label, choice    a class, by its label word, a linear probe, or an option's text
    completion       what the model writes after ``prompt``, a template or a conversation
    text             how likely the text is: the mean log-probability of its tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from edgezo.data.asked_rows import LINE
from edgezo.data.batches import Example
from edgezo.data.chat import ChatTemplates
from edgezo.data.dataset import MOST_WRITTEN, drafts_of
from edgezo.data.encoder import Encoder
from edgezo.data.foreign_turns import ALPACA, foreign_turns
from edgezo.data.preferences import PAIR, has_answers_of_turns
from edgezo.data.recognition import (
    DEFAULT_TEMPLATE,
    Labelling,
    Reading,
    Recognised,
    around_mask,
    task_form,
    word_form,
)
from edgezo.data.row_files import Problems, Record
from edgezo.data.row_kinds import (
    AlpacaForm,
    ChoiceForm,
    CompletionForm,
    Form,
    LabelForm,
    ListedOptionsForm,
    MessagesForm,
    PairForm,
    TextForm,
    WrittenForm,
    templates_of,
)
from edgezo.data.sources import DataRequest
from edgezo.data.tasks import TASKS, Generation, Task
from edgezo.data.templates import as_words, label_key, parse_template, unescaped
from edgezo.data.turns import ASKED, ROLES, TURN_FIELDS
from edgezo.errors import UsageError
from edgezo.machine.meant import nearest

STAND_IN = "yes"  # in the place of a text that is to be written
_ASSISTANT = "assistant"


class AskedRow(NamedTuple):
    """A row to predict."""

    example: Example
    label: int  # the place of the right answer, where the row has it; else -1
    cut: bool = False  # whether it had more tokens than a row may have


@dataclass
class Asker:
    """Makes examples of rows without answers, for one model and one task."""

    request: DataRequest
    encoder: Encoder
    how: Reading
    kind: str  # of the data that the model was trained on
    notes: list[str] = field(default_factory=list)
    recognised: Recognised | None = None  # None: decided by the keys of the first row
    task: Task | None = None
    # True: a row with more tokens than there is room for is refused, and not cut.
    whole_rows: bool = False

    @staticmethod
    def of(
        request: DataRequest,
        tokenizer: Any,
        masked: bool,
        kind: str | None = None,
        names: Sequence[str] = (),
    ) -> Asker:
        """``kind`` and ``names`` are those of a run's data, its label names; None and () for a plain model.

        Raises UsageError for a task, a template or label words that cannot be used.
        """
        problems = Problems()
        task = TASKS.get(request.task) if request.task else None
        if request.task and task is None:
            problems.add(
                f"there is no task {request.task!r}: --task takes one of {', '.join(TASKS)}"
                f"{nearest(request.task, TASKS)}"
            )
        asker = Asker(
            request,
            Encoder(tokenizer, request.max_length, masked),
            Reading(tokenizer, request.text_end == "yes", request.written_at or ""),
            kind or "completion",
            task=task,
        )
        template = unescaped(request.template, asker.notes) if request.template else None
        labelling = Labelling.of(task, template, request.labels, request.label_field, problems)
        form = task_form(task, labelling, masked, problems)
        if form is not None:
            asker.recognised = Recognised(form)
        elif labelling.labelled or kind == "label" or (kind == "choice" and names != PAIR[1:]):
            asker.recognised = _labelled(labelling, names, asker, masked, problems)
            asker.encoder.follow_with(asker.recognised.endings)
        elif masked:
            problems.add(
                "a masked language model answers with a label word: give --template and --labels"
            )
        problems.raise_any()
        if kind is None and asker.recognised is not None:
            asker.kind = asker.recognised.form.kind
        asker._check_kind()
        return asker

    def _check_kind(self) -> None:
        """UsageError where the model was trained on rows of another kind than it is asked."""
        if self.recognised is None:
            return
        asked = self.recognised.form.kind
        if (asked == "label") != (self.kind == "label"):
            raise UsageError(
                f"this run was trained on rows of the kind {self.kind}, and these are of the kind {asked}.\n"
                "Give rows as those that it was trained on."
            )

    # -- what is predicted --------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """The classes, where they are the same in every row."""
        return self.recognised.label_names if self.recognised is not None else ()

    @property
    def label_ids(self) -> tuple[int, ...]:
        """Token ids of the label words, of kind "label"."""
        return self.recognised.label_ids if self.recognised is not None else ()

    @property
    def endings(self) -> tuple[tuple[int, ...], ...]:
        """Tokens of the label words, where they are scored by all of their tokens."""
        return self.recognised.endings if self.recognised is not None else ()

    @property
    def values(self) -> tuple[str, ...]:
        """The value in the data of each class; () where none is known."""
        form = self.recognised.form if self.recognised is not None else None
        labels = form.labels if isinstance(form, ChoiceForm) else form
        return tuple(labels.index) if isinstance(labels, LabelForm) else ()

    @property
    def generation(self) -> Generation:
        """How answers are written."""
        most = self.request.max_new_tokens
        of_task = self.task.generation if self.task is not None else None
        if of_task is not None:
            return of_task._replace(most=most) if most else of_task
        return Generation(most or MOST_WRITTEN)

    @property
    def writes(self) -> bool:
        """Whether an answer is a text that the model writes. Known once there was a row."""
        form = self.recognised.form if self.recognised is not None else None
        return isinstance(form, CompletionForm | WrittenForm | MessagesForm)

    @property
    def asks(self) -> str:
        """What a prediction is called: label, answer, completion or score. Known once there was a row."""
        form = self.recognised.form if self.recognised is not None else None
        if isinstance(form, TextForm):
            return "score"
        if isinstance(form, CompletionForm | WrittenForm):
            return "completion"
        return "label" if self.names else "answer"

    @property
    def may_write(self) -> bool:
        """Whether rows may still ask for a text."""
        return self.recognised is None or self.writes

    # -- rows ---------------------------------------------------------------------------------------------

    def ask(self, records: Sequence[Record], problems: Problems) -> list[AskedRow]:
        """The examples of the rows up to the first that is wrong, which is noted."""
        if records and self.recognised is None:
            form = self._form_of(records[0])
            self.recognised = Recognised(form, (), PAIR[1:] if isinstance(form, PairForm) else ())
            self._check_kind()
        if self.recognised is None:
            return []
        form, names = self.recognised.form, self.names
        completed = [self._completed(record, form) for record in records]
        drafts = []
        for draft in drafts_of(completed, form, names, True, self.encoder, problems, False):
            if len(problems):
                break
            drafts.append(draft)
        if len(drafts) < len(records) and not len(problems):
            where = records[len(drafts)].where
            problems.add("a row that asks for nothing", at=where)
        asked, cut = [], self.encoder.cut
        for record, example in zip(records, self.encoder.some_examples(drafts), strict=False):
            before, cut = cut, self.encoder.cut
            if cut > before and self.whole_rows:
                problems.add(
                    f"a row with more than {self.encoder.max_length} tokens: --max-mem has no room for it, and with "
                    f"--max-length {self.encoder.max_length} it is cut",
                    at=record.where,
                )
                break
            if not all(row.score_at for row in example.rows):
                problems.add("a row without a text to predict after", at=record.where)
                break
            followed = replace(example, endings=self.endings) if self.endings else example
            asked.append(AskedRow(followed, self._right(record, form), cut > before))
        return asked

    def close(self) -> None:
        """End what renders conversations."""
        templates = templates_of(self.recognised.form) if self.recognised is not None else None
        if templates is not None:
            templates.close()

    def _form_of(self, first: Record) -> Form:
        """The form of rows without label words, by the keys of the first one."""
        fields = first.fields
        if LINE in fields:
            return TextForm(self.how.text_ends) if self.kind == "text" else CompletionForm()
        if has_answers_of_turns(fields):
            return PairForm(self._messages())
        if all(name in fields for name in PAIR[1:]):
            return PairForm()
        asks = ALPACA[0] in fields and getattr(self.how.tokenizer, "chat_template", None)
        if any(n in fields for n in TURN_FIELDS) or isinstance(fields.get(ASKED), list) or asks:
            return self._messages()
        if ALPACA[0] in fields:
            return AlpacaForm()
        if "prompt" in fields:
            return CompletionForm()
        if "text" in fields:
            return TextForm(self.how.text_ends)
        raise UsageError(
            f"{first.where} has the keys {first.keys}. A row to predict has prompt, messages or text, or with "
            "--template and --labels the fields that the template names."
        )

    def _messages(self) -> MessagesForm:
        if not getattr(self.how.tokenizer, "chat_template", None):
            raise UsageError("the rows are conversations, but this model has no chat template")
        return MessagesForm(ChatTemplates(self.how.tokenizer, self.how.now or None))

    def _completed(self, record: Record, form: Form) -> Record:
        """The row with a stand-in for its answer."""
        fields = _spread(record.fields, form)
        if self.task is not None and self.task.prepare is not None:
            fields = self.task.prepare(fields)
        stand_in: dict[str, Any] = {}
        if isinstance(form, LabelForm):
            stand_in = {form.label_field: next(iter(form.index))}
        elif isinstance(form, ChoiceForm):
            stand_in = {form.labels.label_field: next(iter(form.labels.index))}
        elif isinstance(form, ListedOptionsForm):
            stand_in = {form.label_field: 0, "answers": []}
        elif isinstance(form, CompletionForm):
            stand_in = {form.uses[-1]: STAND_IN}
        elif isinstance(form, WrittenForm):
            stand_in = {"answers": [STAND_IN], "completion": STAND_IN}
        elif isinstance(form, MessagesForm):
            stand_in = {"messages": _answered(fields)}
        return replace(record, fields={**fields, **stand_in})

    def _right(self, record: Record, form: Form) -> int:
        """The place of the right answer among the classes, where the row has one that is known; else -1."""
        labels = form.labels if isinstance(form, ChoiceForm) else form
        if not isinstance(labels, LabelForm):
            return -1
        key = label_key(record.fields.get(labels.label_field))
        if key is None:
            return -1
        return labels.index.get(key, labels.index.get(as_words(key), -1))


def _labelled(
    labelling: Labelling, names: Sequence[str], asker: Asker, masked: bool, problems: Problems
) -> Recognised:
    """The form of rows that are told apart by label words or options."""
    tokenizer = asker.how.tokenizer
    template = labelling.template or parse_template(DEFAULT_TEMPLATE, problems)
    words: Mapping[str, str] = labelling.words or {name: name for name in names}
    if labelling.options:
        words = {str(i): option.names[0] for i, option in enumerate(labelling.options)}
    if not words:
        problems.add("which answers are there? Give the label words: --labels '0=bad,1=good'")
    problems.raise_any()
    assert template is not None
    before, after = around_mask(template, tokenizer, masked, problems)
    form = LabelForm(before, after, labelling.label_field, {key: i for i, key in enumerate(words)})
    classes = tuple(words.values())
    if labelling.options:
        return Recognised(ChoiceForm(form, labelling.options), (), classes)
    return word_form(form, classes, tokenizer, masked, problems, asker.notes)


def _spread(fields: Mapping[str, Any], form: Form) -> Mapping[str, Any]:
    """The fields of a row; a line of text is that of the one field that a prompt has."""
    if LINE not in fields:
        return fields
    names = list(_prompted(form))
    if len(names) != 1:
        listed = ", ".join(names) or "none"
        raise UsageError(
            f"a line of text fills one field, and a prompt here has {listed}: give JSON objects with these fields"
        )
    return {names[0]: fields[LINE]}


def _prompted(form: Form) -> Iterator[str]:
    """The fields of a prompt, each once."""
    if isinstance(form, LabelForm):
        yield from dict.fromkeys(form.prompted)
    elif isinstance(form, ChoiceForm):
        options = [name for option in form.options for name in option.names]
        yield from dict.fromkeys((*form.labels.prompted, *options))
    elif isinstance(form, WrittenForm):
        yield from dict.fromkeys(form.template.names)
    elif isinstance(form, CompletionForm | TextForm):
        yield form.uses[0]


def _answered(fields: Mapping[str, Any]) -> list[Any]:
    """The turns of a row up to the last that is not the assistant's, and a stand-in for the answer."""
    turns = next((fields[name] for name in (*TURN_FIELDS, ASKED) if name in fields), None)
    turns = list(turns) if isinstance(turns, list) else foreign_turns(fields) or []
    while turns and isinstance(turns[-1], dict) and _role(turns[-1]) == _ASSISTANT:
        turns.pop()
    return [*turns, {"role": _ASSISTANT, "content": STAND_IN}]


def _role(turn: Mapping[str, Any]) -> Any:
    role = turn.get("role", turn.get("from"))
    return ROLES.get(role, role) if isinstance(role, str) else role
