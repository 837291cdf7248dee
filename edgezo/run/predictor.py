"""A run or a model in memory: rows become predictions as they come, and prompts are answered. On every engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from edgezo.data.asked_rows import GROUP_ROWS, LINE
from edgezo.data.asking import AskedRow, Asker
from edgezo.data.dataset import Dataset
from edgezo.data.row_files import Problems, Record
from edgezo.data.sources import DataRequest
from edgezo.data.token_stats import TokenStats
from edgezo.errors import UsageError
from edgezo.machine.process_memory import ReadingGuard
from edgezo.network.plain_losses import softmax
from edgezo.network.sampling import Sampler
from edgezo.plan.config import RunConfig
from edgezo.plan.shapes import Shape
from edgezo.run.answering import Answering, AnswerText
from edgezo.run.called import give_back

WRITTEN_ROWS = 32  # rows whose answers are written before the first of them is given out
_DIGITS = 6  # of a probability that is given out
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # in the place of a character of which a part is written


@dataclass
class Predictor:
    """A run or a model in memory, which answers rows and prompts."""

    target: str
    model: Answering
    asker: Asker
    written: AnswerText
    guard: ReadingGuard
    steps: int
    unfinished: str = ""  # how far a run is that has not ended
    rows: int = 0  # so many rows were predicted,
    known: int = 0  # of so many the right answer is known,
    right: int = 0  # and so many predictions are it
    tokens: int = 0  # so many tokens the rows had
    cut: int = 0  # and so many rows had more than go through the model at once
    shorter: bool = False  # the cap has no room for rows of the length that was asked for
    prompted: dict[bool, Asker] = field(default_factory=dict)  # of texts, and of conversations
    at_end: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the model go, and give its memory back."""
        self.at_end.close()
        self.__dict__.pop("model", None)  # a notebook keeps the name of what it has closed
        give_back()

    def __getattr__(self, name: str) -> Any:
        if name == "model":
            raise UsageError(f"{self.target} was closed. Load it again.")
        raise AttributeError(name)

    def end_askers(self) -> None:
        """End the processes that render conversations."""
        for asker in (self.asker, *self.prompted.values()):
            asker.close()

    def predict(self, rows: Iterable[Mapping[str, Any] | str]) -> list[dict[str, Any]]:
        """One prediction for each row: a mapping of its fields, or a text.

        A prediction has ``label`` and ``probabilities``, ``completion``, ``answer``, or ``score``. Raises UsageError
        for a row that asks for nothing that the model answers.
        """
        records = [
            Record(f"row {number}", {LINE: row} if isinstance(row, str) else row)
            for number, row in enumerate(rows, 1)
        ]
        groups = (records[at : at + GROUP_ROWS] for at in range(0, len(records), GROUP_ROWS))
        return list(self.stream(groups, Problems()))

    def generate(
        self,
        prompt: str | Sequence[Mapping[str, str]],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> str:
        """The text that follows a prompt, or the answer to a conversation: the most likely one, or one by chance."""
        sampler = Sampler.of(temperature, top_p, seed)
        return "".join(self.write(prompt, max_new_tokens, sampler)).strip()

    # -- rows ---------------------------------------------------------------------------------------------

    def stream(
        self, groups: Iterable[Sequence[Record]], problems: Problems
    ) -> Iterator[dict[str, Any]]:
        """A prediction for each row of groups that come one by one, in their order.

        Raises UsageError for the first row that is wrong, once the rows before it have their predictions.
        """
        for group in groups:
            asked = self.asker.ask(group, problems)
            self.cut += sum(row.cut for row in asked)
            for prediction in self._predicted(asked):
                self.rows += 1
                yield {"row": self.rows, **prediction}
            problems.raise_any()
            self.guard.check(item=f"the rows after row {self.rows}")
        problems.raise_any()

    def _predicted(self, asked: Sequence[AskedRow]) -> Iterator[dict[str, Any]]:
        if not asked:
            return
        examples, kind = [row.example for row in asked], self.asker.asks
        self.tokens += sum(example.tokens for example in examples)
        if self.asker.writes:
            for at in range(0, len(examples), WRITTEN_ROWS):
                part = examples[at : at + WRITTEN_ROWS]
                for text in self.model.texts(part, self.asker.generation.most):
                    yield {kind: text}
            return
        answers = self.model.scores(examples)
        if kind == "score":
            for example, scores in zip(examples, answers, strict=True):
                n_tokens = len(example.rows[0].score_ids)
                yield {"score": round(float(scores[0]), _DIGITS), "tokens": n_tokens}
            return
        for row, scores in zip(asked, answers, strict=True):
            yield self._choice(row, scores)

    def _choice(self, row: AskedRow, scores: np.ndarray) -> dict[str, Any]:
        """A class or an option with the probabilities of all."""
        names = self.asker.names or row.example.options
        shares = [round(share, _DIGITS) for share in softmax(scores.astype(np.float64)).tolist()]
        best = int(scores.argmax())
        self.known += row.label >= 0
        self.right += row.label == best
        if not self.asker.names:  # the options are the row's: a text may stand there twice
            return {"answer": names[best], "option": best, "probabilities": shares}
        values = self.asker.values
        value = {"value": values[best]} if values and values != names else {}
        return {
            "label": names[best],
            **value,
            "probabilities": dict(zip(names, shares, strict=True)),
        }

    # -- one text -----------------------------------------------------------------------------------------

    @property
    def classifies(self) -> bool:
        """Whether it tells labels or options apart, and writes no text."""
        return self.model.probed or self.asker.kind in ("label", "choice")

    def write(
        self,
        prompt: str | Sequence[Mapping[str, str]],
        max_new_tokens: int | None = None,
        sampler: Sampler | None = None,
        *,
        whole: bool = False,
    ) -> Writing:
        """The text that follows a prompt, or the answer to a conversation: iterate over its pieces.

        Raises UsageError where nothing is written, and with ``whole`` where a prompt alone has too many tokens.
        """
        ids = self.prompt_ids(prompt, whole=whole)
        most = min(max_new_tokens or self.asker.generation.most, self.asker.generation.most)
        return Writing(self.model, self.written, ids, most, sampler)

    def prompt_ids(
        self, prompt: str | Sequence[Mapping[str, str]], *, whole: bool = False
    ) -> Sequence[int]:
        """The tokens of a prompt, or of a conversation without its oldest turns where it is too long.

        With ``whole``, UsageError where a prompt or a last turn would be cut.
        """
        if self.classifies:
            raise UsageError(
                f"{self.target} tells {', '.join(self.asker.names) or 'options'} apart, and writes nothing.\n"
                f"Ask it by edgezo predict {self.target} --data FILE."
            )
        turns = [] if isinstance(prompt, str) else list(prompt)
        while True:
            record = Record("the prompt", {"messages": turns} if turns else {"prompt": prompt})
            before = self.asker.encoder.cut
            ids = self._asked_as(bool(turns), record)
            if self.asker.encoder.cut == before:
                return ids
            if len(turns) < 2:
                break
            turns = turns[1:]
        if whole:
            raise UsageError(
                f"the prompt has more than {self.asker.encoder.max_length} tokens: shorten it, or start with a larger "
                "--max-length"
            )
        return ids

    def _asked_as(self, conversation: bool, record: Record) -> Sequence[int]:
        """The tokens of a prompt. What renders conversations is a process, and stays for those to come."""
        asker = self.prompted.setdefault(conversation, replace(self.asker, recognised=None))
        problems = Problems()
        try:
            asked = asker.ask([record], problems)
            problems.raise_any()
        except BaseException:
            self.prompted.pop(conversation).close()
            raise
        return asked[0].example.prompt


@dataclass
class Writing:
    """A text while it is written: iterate over its pieces, which come as they are written."""

    model: Answering
    written: AnswerText
    prompt: Sequence[int]  # its tokens
    most: int  # tokens that are written at most
    sampler: Sampler | None
    tokens: list[int] = field(default_factory=list)  # written so far
    ended: bool = False  # by an end token or a stop, and not for having ``most`` tokens

    def __iter__(self) -> Iterator[str]:
        given = 0
        for token in self.model.tokens_after(self.prompt, self.most, self.sampler):
            self.tokens.append(token)
            self.ended = self.written.over(self.tokens)
            over = self.ended or len(self.tokens) == self.most
            text = self.written.answer(self.tokens, strip=False)
            if len(text) > given and (over or not text.endswith(_UNFINISHED)):
                yield text[given:]
                given = len(text)
            if over:
                return


# ---------------------------------------------------------------------------------------------
# Asking


def asker_of(
    cfg: RunConfig,
    tokenizer: Any,
    shape: Shape,
    kind: str | None,
    names: Sequence[str],
    *,
    masked: bool = False,
    offset: int = 0,
) -> Asker:
    """How rows become prompts, by the request; no prompt and its answer is longer than the model has positions.

    ``kind`` and ``names`` are those of a run's data; ``offset``: positions that no token has.
    """
    shared = {f.name for f in fields(DataRequest)} & {f.name for f in fields(RunConfig)}
    request = DataRequest(**{name: getattr(cfg, name) for name in shared})
    asker = Asker.of(request, tokenizer, masked, kind, names)
    if shape.positions:
        most = asker.generation.most if asker.may_write else 0
        positions = shape.max_positions - offset - most
        if positions < 1:
            raise UsageError(
                f"--max-new-tokens {most} leaves no room for a prompt in {shape.max_positions} positions"
            )
        asker.encoder.max_length = min(asker.encoder.max_length, positions)
    return asker


def asked_dataset(asker: Asker) -> Dataset:
    """The data set of rows that are yet to come."""
    return Dataset(
        *(asker.kind, (), (), asker.label_ids, asker.names, ()),
        generation=asker.generation,
        expected=expected_tokens(asker),
        endings=asker.endings,
    )


def expected_tokens(asker: Asker) -> TokenStats:
    """Bounds on the tokens of rows that are yet to come."""
    most = asker.encoder.max_length
    written = asker.generation.most if asker.may_write else 0
    return TokenStats(
        kind=asker.kind,
        tokens=(most,),
        scored=1 if asker.kind == "label" else most,
        label_words=len(asker.label_ids),
        evaluated=most,
        written=written,
        evaluated_prompt=most,
    )
