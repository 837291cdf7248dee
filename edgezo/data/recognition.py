"""Which form reads the rows of a dataset (row_kinds.py).

A row is recognised by its fields: ``text``; ``prompt`` + ``completion``; ``prompt``, ``chosen``, ``rejected``;
``messages``; or any fields with a template, a label field and label words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from edgezo.data.chat import ChatTemplates
from edgezo.data.foreign_turns import is_alpaca
from edgezo.data.preferences import PAIR, has_answers_of_turns
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
    TurnsForm,
    WrittenForm,
)
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
from edgezo.data.trees import tokens_behind
from edgezo.data.turns import has_turns
from edgezo.errors import UsageError
from edgezo.machine.foreign import clip

DEFAULT_TEMPLATE = "{text}\nLabel:"
FIRST_ROWS = 1000  # where bad rows are skipped, so many say which fields are the usual ones
# Of a model without a chat template, and of one with it.
ALPACA_NOTES = (
    "rows as Alpaca has them: instruction and input stand in Alpaca's prompt, since the model has no chat template",
    "rows as Alpaca has them: instruction and input are the user's turn, output is the assistant's",
)


@dataclass(frozen=True)
class Labelling:
    """How labelled rows are to be read, as far as task and user give it."""

    template: Template | None
    words: Mapping[str, str] | None  # label -> label word
    options: tuple[Template, ...]
    label_field: str
    labelled: bool  # a template, label words or a label field is given, so the rows have labels

    @staticmethod
    def of(
        task: Task | None,
        template: str | None,
        labels: str | None,
        label_field: str,
        problems: Problems,
    ) -> Labelling:
        """What the user gives (--template, --labels, --label-field), else what the task gives."""
        default_field = label_field == "label"
        if task and (task.options or task.options_field) and labels:
            problems.add(f"--task {task.name} has candidates in every row: leave out --labels")
        if task and task.generation and labels:
            problems.add(f"--task {task.name} has written answers: leave out --labels")
        text = template or (task.template if task else None)
        labels = labels or (task.labels if task else None)
        options = [parse_template(option, problems) for option in task.options] if task else []
        return Labelling(
            template=parse_template(text, problems) if text else None,
            words=parse_labels(labels, problems) if labels else None,
            options=tuple(option for option in options if option),
            label_field=task.label_field if task and default_field else label_field,
            labelled=bool(text or labels or not default_field),
        )


class Reading(NamedTuple):
    """What the forms of rows without labels need."""

    tokenizer: (
        Any  # None: what needs one is left out, and conversations are read without a template
    )
    text_ends: bool  # rows with ``text`` end with the end token
    now: str  # the time that chat templates write
    rules: int = 2  # by which rows are read (sources.py)
    words: tuple[str, ...] = ()  # of the run that is evaluated (sources.py)


class Recognised(NamedTuple):
    """The form of a dataset's rows."""

    form: Form
    label_ids: tuple[int, ...] = ()  # token ids of the label words, of kind "label"
    label_names: tuple[str, ...] = ()  # names of the candidates
    # Tokens of the label words, of kind "choice" where every row has the same words.
    endings: tuple[tuple[int, ...], ...] = ()


def recognise(
    task: Task | None,
    labelling: Labelling,
    train: Sequence[Record],
    known: Sequence[Record],  # labels are collected from these where no label words are given
    how: Reading,
    masked: bool,
    problems: Problems,
    notes: list[str],
) -> Recognised:
    """The form of a dataset's rows. Raises UsageError with all problems if there are any."""
    form = task_form(task, labelling, masked, problems)
    form = form or _plain_form(_first(train, problems), labelling, how, notes)
    if form is None:
        return _labelled_form(labelling, train, known, how, masked, problems, notes)
    if masked and task is None:
        problems.add(
            "a masked language model learns from labelled rows only: give --template, --labels and "
            f"--label-field (the rows have: {train[0].keys})"
        )
    problems.raise_any()
    return Recognised(form, (), PAIR[1:] if isinstance(form, PairForm) else ())


def task_form(
    task: Task | None, labelling: Labelling, masked: bool, problems: Problems
) -> Form | None:
    """The form of a task whose answers are written or listed in the row; None for other tasks."""
    if task is None or not (task.generation or task.options_field):
        return None
    if masked:
        problems.add(f"--task {task.name} needs a causal language model")
    if labelling.template is None:  # the user's cannot be parsed
        problems.raise_any()
    assert labelling.template is not None
    if task.options_field:
        return ListedOptionsForm(labelling.template, task.options_field, labelling.label_field)
    return WrittenForm(labelling.template, task.source)


def _first(train: Sequence[Record], problems: Problems) -> Record:
    """The row that the others are read as: the first; where bad rows are skipped, one with the usual fields."""
    if problems.skipped is None:
        return train[0]
    some = train[:FIRST_ROWS]
    counts = Counter(frozenset(record.fields) for record in some)
    usual = counts.most_common(1)[0][0]
    return next(record for record in some if frozenset(record.fields) == usual)


def _plain_form(first: Record, labelling: Labelling, how: Reading, notes: list[str]) -> Form | None:
    """The form of rows without labels, by the fields of the first row; None if rows are labelled.

    Raises UsageError for rows that no form reads.
    """
    if labelling.labelled:
        return None
    if has_turns(first.fields):
        alpaca = is_alpaca(first.fields)
        if alpaca:
            notes.append(ALPACA_NOTES[bool(getattr(how.tokenizer, "chat_template", True))])
        if alpaca and how.tokenizer and not getattr(how.tokenizer, "chat_template", None):
            return AlpacaForm()
        return _turns_form(how)
    if has_answers_of_turns(first.fields):
        return PairForm(_turns_form(how))
    if "role" in first.fields and "content" in first.fields and _has_no_other_kind(first.fields):
        raise UsageError(
            f"{first.where} has the keys {first.keys}: each row is a turn of a conversation.\n"
            "Write all turns of a conversation into one row, as the list messages"
        )
    if all(name in first.fields for name in PAIR):
        return PairForm()
    if all(name in first.fields for name in PAIR[1:]) and _has_no_other_kind(first.fields):
        notes.append("pairs without a prompt: it is the words that both answers begin with")
        return PairForm()
    if "prompt" in first.fields and "completion" in first.fields:
        return CompletionForm()
    if labelling.label_field in first.fields:
        return None
    if "text" in first.fields:
        return TextForm(how.text_ends, windows=how.rules > 1)
    raise UsageError(
        f"{first.where} has the keys {first.keys}, and edgezo does not know how to read such rows.\n"
        "It reads rows with text; with prompt and completion; with prompt, chosen and rejected; with messages; with "
        "instruction and output; or any others with a label, given --template '{field} ...', --labels '0=word,1=word' "
        "and --label-field"
    )


def _turns_form(how: Reading) -> MessagesForm | TurnsForm:
    """What reads conversations. Raises UsageError for a model without a chat template."""
    if how.tokenizer is None:
        return TurnsForm()
    if not getattr(how.tokenizer, "chat_template", None):
        raise UsageError(
            "the rows have turns of a conversation, but this model has no chat template: use an instruction-"
            "tuned model, or rows with prompt and completion"
        )
    return MessagesForm(ChatTemplates(how.tokenizer, how.now))


def _has_no_other_kind(fields: Mapping[str, Any]) -> bool:
    """Whether a row has no field by which rows of another kind are recognised."""
    return fields.keys().isdisjoint(("text", "completion", "label"))


def _labelled_form(
    labelling: Labelling,
    train: Sequence[Record],
    known: Sequence[Record],  # labels are collected from these where no label words are given
    how: Reading,
    masked: bool,
    problems: Problems,
    notes: list[str],
) -> Recognised:
    """The form of labelled rows. Raises UsageError with all problems if there are any."""
    label_field, tokenizer = labelling.label_field, how.tokenizer
    keys = {str(key) for record in train for key in record.fields}
    template = _template(labelling, keys, problems, notes)
    words = labelling.words
    if labelling.options:
        words = {str(i): option.names[0] for i, option in enumerate(labelling.options)}
    elif words is None and label_field in keys:
        words = derive_labels(known, label_field, problems, how.words)
        listed = clip(", ".join(words.values()), 200)
        notes.append(f"no --labels: the label words are the values of {label_field!r}: {listed}")
    problems.raise_any()
    assert template is not None and words is not None

    labels = {label_key(record.fields.get(label_field)) for record in train}
    if absent := [key for key in words if key not in labels]:
        rows = "row" if how.words else "training row"
        notes.append(f"no {rows} has label {', '.join(absent)}")
    names = tuple(words.values())
    before, after = around_mask(template, tokenizer, masked, problems)
    index = {key: i for i, key in enumerate(words)}
    form = LabelForm(before, after, label_field, index, blank_prompts=how.rules < 2)
    if not labelling.options and tokenizer is None:
        return Recognised(form, (), names)
    if not labelling.options:
        return word_form(form, names, tokenizer, masked, problems, notes)
    if masked:
        problems.add("candidates of several words need a causal language model")
    problems.raise_any()
    return Recognised(ChoiceForm(form, labelling.options), (), names)


def _template(
    labelling: Labelling, keys: Collection[str], problems: Problems, notes: list[str]
) -> Template | None:
    """The template of labelled rows with these fields; None after noting that there is none."""
    listed = ", ".join(sorted(keys)[:12])
    template = labelling.template
    if template is None and "text" in keys:
        template = parse_template(DEFAULT_TEMPLATE, problems)
        notes.append(f"no --template: prompts are written as {DEFAULT_TEMPLATE!r}")
    if template is None:
        problems.add(f"give --template: how the fields of a row ({listed}) become a prompt")
    elif unknown := [n for n in template.names if n not in keys and n != MASK]:
        problems.add(f"--template names {', '.join(unknown)}, but the rows have: {listed}")
    if labelling.label_field not in keys:
        problems.add(
            f"no row has the label field {labelling.label_field!r}, but: {listed} (give --label-field)"
        )
    return template


def word_form(
    form: LabelForm,
    names: tuple[str, ...],
    tokenizer: Any,
    masked: bool,
    problems: Problems,
    notes: list[str],
) -> Recognised:
    """The form of rows with label words ``names``: by their first tokens where these differ, else as a choice."""
    at_line_start = form.before.tail.rstrip(" ").endswith("\n")
    joined = masked and not form.before.tail.endswith(" ")
    spaced = not at_line_start and not joined and wants_space(tokenizer, names)
    tokens = {name: word_ids(tokenizer, name, spaced) for name in names}
    for name, ids in tokens.items():
        if not ids or ids[0] == tokenizer.unk_token_id:
            problems.add(
                f"the label word {name!r} is not in this model's vocabulary: give another with --labels"
            )
    firsts = tuple(ids[0] for ids in tokens.values() if ids)
    shared = [name for name, ids in tokens.items() if ids and firsts.count(ids[0]) > 1]
    listed = ", ".join(shared[:6]) + (", ..." if len(shared) > 6 else "")
    if shared and masked:
        problems.add(
            f"label words {listed} begin with the same token, and a masked model predicts one: "
            "give others with --labels"
        )
    problems.raise_any()
    if shared:
        endings = tuple(tuple(tokens[name]) for name in names)
        behind, _ = tokens_behind(endings)
        notes.append(
            f"label words {listed} begin with the same token: all words are scored by all of their tokens, {behind:,} "
            "behind each prompt; words in --labels with other first tokens would be faster"
        )
        return Recognised(replace(form, kind="choice"), (), names, endings)
    if long := [name for name, ids in tokens.items() if len(ids) > 1]:
        notes.append(
            f"label words of several tokens are scored by their first token: {', '.join(long)}"
        )
    return Recognised(form, firsts, names)


def around_mask(
    template: Template, tokenizer: Any, masked: bool, problems: Problems
) -> tuple[Template, Template | None]:
    """The template before the label word and after it; None after it for causal models."""
    before, after = template.split()
    if masked:
        if tokenizer.mask_token_id is None:
            problems.add("this model's tokenizer has no mask token, which a masked model needs")
        if after is None:
            before = Template((*before.parts, (" ", None)))
            after = Template(((" .", None),))
        return before, after
    if after is not None and (after.names or after.tail.strip(" .")):
        problems.add(
            "the template has text after {mask}: a causal model predicts the label word from what "
            "stands before it, so {mask} comes last"
        )
    return before, None
