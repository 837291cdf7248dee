"""``edgezo predict`` and ``edgezo.load``: a run or a model in memory, and rows that become predictions as they come.

Prompt, template and label words are those that the run was trained with: its configuration and its journal say them.
No row that it was trained on is read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgezo.data.asked_rows import GROUP_ROWS, LINE
from edgezo.data.asking import AskedRow, Asker
from edgezo.data.batches import Example, collate, evaluation_batches
from edgezo.data.dataset import Dataset
from edgezo.data.row_files import Problems, Record
from edgezo.data.sources import DataRequest
from edgezo.data.token_stats import TokenStats
from edgezo.errors import UsageError
from edgezo.machine.files import user_path
from edgezo.machine.gpu_memory import Memory, confirmed
from edgezo.machine.hardware import machine
from edgezo.machine.limits import EVAL_TOKENS
from edgezo.machine.process_memory import ReadingGuard, malloc_trim, peak_rss_bytes, rss_bytes
from edgezo.network import cards, loader
from edgezo.network.generate import write_one
from edgezo.network.loader import ModelFiles
from edgezo.network.model import Model
from edgezo.network.sampling import Sampler
from edgezo.plan.budget import portable
from edgezo.plan.config import RunConfig
from edgezo.plan.data_fields import LOSS
from edgezo.plan.fields import flag
from edgezo.plan.request import make_config
from edgezo.run.called import called, give_back, usable, with_threads
from edgezo.run.directory import RunFiles
from edgezo.run.evaluate import in_memory
from edgezo.run.exported import Exported
from edgezo.run.objective import Judge, evaluation_parts
from edgezo.run.parent import open_with_parents
from edgezo.run.places import at_base, for_torch, with_base
from edgezo.run.session import Opened, ram_cap_bytes, settle, without_states

WRITTEN_ROWS = 32  # rows whose answers are written before the first of them is given out
_DIGITS = 6  # of a probability that is given out
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # in the place of a character of which a part is written


@dataclass
class Predictor:
    """A run or a model in memory, which answers rows and prompts."""

    target: str
    model: Model
    memory: Memory
    asker: Asker
    judge: Judge
    guard: ReadingGuard
    steps: int
    unfinished: str = ""  # how far a run is that has not ended
    rows: int = 0  # so many rows were predicted,
    known: int = 0  # of so many the right answer is known,
    right: int = 0  # and so many predictions are it
    tokens: int = 0  # so many tokens the rows had
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
                for text in self._texts(examples[at : at + WRITTEN_ROWS]):
                    yield {kind: text}
            return
        with self.memory.short("predictions"):
            answers = self._answers(examples)
        if kind == "score":
            for example, scores in zip(examples, answers, strict=True):
                n_tokens = len(example.rows[0].score_ids)
                yield {"score": round(float(scores[0]), _DIGITS), "tokens": n_tokens}
            return
        for row, scores in zip(asked, answers, strict=True):
            yield self._choice(row, scores)

    def _choice(self, row: AskedRow, scores: Tensor) -> dict[str, Any]:
        """A class or an option with the probabilities of all."""
        names = self.asker.names or row.example.options
        shares = [round(share, _DIGITS) for share in torch.softmax(scores.double(), -1).tolist()]
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

    def _answers(self, examples: Sequence[Example]) -> list[Tensor]:
        """Of each example the logits (K,) of its classes, or scores of its options. Batches are an evaluation's."""
        answers: list[Tensor] = [torch.empty(0)] * len(examples)
        read = self.model.reads(examples)
        for part in evaluation_batches(read):
            chosen = [read[i] for i in part]
            rows = chosen[0].whole_rows
            if len(chosen) == 1 and len(rows) > 1 and chosen[0].tokens > EVAL_TOKENS:
                options = [Example((row,), -1) for row in rows]
                answers[part[0]] = torch.cat(self._answers(options))
                continue
            scores = self.model.answers(collate(chosen, range(len(part))))
            if scores.dim() == 2:
                pieces: Sequence[Tensor] = list(scores)
            else:
                pieces = scores.split([len(example.whole_rows) for example in chosen])
            for i, piece in zip(part, pieces, strict=True):
                answers[i] = piece
        return answers

    def _texts(self, examples: Sequence[Example]) -> list[str]:
        texts = [""] * len(examples)
        most = self.asker.generation.most
        with self.memory.short("answers"):
            for part in evaluation_parts(examples, most, self.model.kept_tokens):
                chosen = [examples[i] for i in part]
                (written,) = self.judge.write(self.model, chosen, most_tokens=EVAL_TOKENS)
                for i, text in zip(part, written, strict=True):
                    texts[i] = text
        return texts

    # -- one text -----------------------------------------------------------------------------------------

    @property
    def classifies(self) -> bool:
        """Whether it tells labels or options apart, and writes no text."""
        return self.model.readout is not None or self.asker.kind in ("label", "choice")

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
        return Writing(self.model, self.judge, ids, most, sampler)

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

    model: Model
    judge: Judge
    prompt: Sequence[int]  # its tokens
    most: int  # tokens that are written at most
    sampler: Sampler | None
    tokens: list[int] = field(default_factory=list)  # written so far
    ended: bool = False  # by an end token or a stop, and not for having ``most`` tokens

    def __iter__(self) -> Iterator[str]:
        given = 0
        for token in write_one(self.model, self.prompt, self.most, self.sampler):
            self.tokens.append(token)
            self.ended = self.judge.over(self.tokens)
            over = self.ended or len(self.tokens) == self.most
            text = self.judge.answer(self.tokens, strip=False)
            if len(text) > given and (over or not text.endswith(_UNFINISHED)):
                yield text[given:]
                given = len(text)
            if over:
                return


# ---------------------------------------------------------------------------------------------
# Loading

# Settings by which a plain model is asked; a run has them of its own.
_OF_ASKING = ("task", "labels", "label_field")


def load(
    target: str | os.PathLike[str],
    *,
    note: Callable[[str], None] = lambda text: None,
    **settings: Any,
) -> Predictor:
    """A run (its directory) or a model (a card, a directory, a GGUF file) in memory, to predict and write with.

    ``settings`` are those of ``edgezo predict``: ``max_mem_bytes``, ``max_new_tokens``, and for a model ``template``,
    ``labels`` or ``task``; of a run ``base``, where its base is now.
    ``note`` gets what a user should know. Use it in a ``with`` block, or call ``close``.
    Raises EdgezoError where the run or the model cannot be read, UsageError for settings that mean nothing here, and
    DoesNotFit where it does not fit into the cap.
    """
    name = os.fspath(target)
    with called(), ExitStack() as at_end:
        cfg = use_request(name, settings)
        at_end.enter_context(with_threads(cfg.threads))
        used = at_end.enter_context(predictor(name, cfg, note))
        used.at_end = at_end.pop_all()
    return used


def use_request(target: str, given: Mapping[str, Any]) -> RunConfig:
    """The request to use a run as it was trained, but for what ``given`` changes; or a plain model.

    Of a run ``given`` may say where its ``base`` is now.
    """
    run = RunFiles(Path(target))
    base = given.get("base")
    given = {name: value for name, value in given.items() if name != "base"}
    if not run.config.is_file():
        if base is not None:
            raise UsageError(f"--base is that of a run, and {target} is none: leave it out")
        exported = _exported_at(target)
        layer = exported.settings if exported is not None else {}
        return make_config({**given, "model": target}, layer, need_data=False)
    if refused := [flag(name) for name in _OF_ASKING if given.get(name) is not None]:
        raise UsageError(
            f"{target} is a run, which is asked as it was trained: leave out {', '.join(refused)}"
        )
    saved = run.read_config()
    layer = portable(saved, confirmed(machine())).to_dict()
    if given.get("device") not in (None, saved.device):  # the cap was that of the other device
        layer |= {"max_mem_bytes": None, "residency": None}
    return at_base(make_config({**given, "objective": None}, layer, need_data=False), base)


def base_of(target: str) -> str:
    """The model that a run was trained over. Raises UsageError for what is no run."""
    run = RunFiles(Path(target))
    if not run.config.is_file():
        raise UsageError(f"{target} is no run, and has no base here: name a model, --compare MODEL")
    return with_base(run.read_config(), run.path).model


def _exported_at(target: str) -> Exported | None:
    """What edgezo has exported to a path; None for anything else, such as the name of a card."""
    path = user_path(target)
    return Exported.at(path) if path.exists() else None


@contextmanager
def predictor(
    target: str, cfg: RunConfig, note: Callable[[str], None] = lambda text: None
) -> Iterator[Predictor]:
    """A run (a directory with config.toml) or a model in memory, until the end of the block.

    ``cfg`` is the request: of a run its own settings, but for what is asked now. ``note`` gets what a user should know.
    Raises EdgezoError for a run that is damaged or of another base, DoesNotFit where it does not fit into the cap.
    """
    run = RunFiles(Path(target))
    trained = run.read_config() if run.config.is_file() else None
    guard = ReadingGuard(ram_cap_bytes(cfg, usable(machine())))
    kind: str | None = None
    names: tuple[str, ...] = ()
    with ExitStack() as at_end:
        if trained is None:
            cfg = replace(cfg, train=("head",))  # the smallest: nothing is trained
            exported = _exported_at(target)
            if exported is not None and exported.asks_as(cfg):
                kind, names = exported.kind, exported.names
        else:
            cfg = with_base(for_torch(cfg), run.path, note)
            with open_with_parents(run) as journal:
                facts = journal.header["dataset"]
            kind, names = facts["kind"], tuple(facts["label_names"])
        files = loader.open_model(cards.resolve(cfg.model))
        loader.model_class(files)  # its code is part of the process that a plan starts from
        asker = _asker(cfg, files, kind, names)
        for text in (*files.notes, *asker.notes):
            note(text)
        dataset = Dataset(
            *(asker.kind, (), (), asker.label_ids, asker.names, ()),
            generation=asker.generation,
            expected=_expected(asker),
            endings=asker.endings,
        )
        tokenizer = asker.how.tokenizer
        judge = Judge.of(replace(cfg, objective=LOSS), dataset, tokenizer, files.end_ids)
        malloc_trim()
        read_bytes = max(0, peak_rss_bytes())
        asked = without_states(cfg)
        opened = Opened(asked, files, tokenizer, dataset, None, judge, guard.peak_before_bytes)
        if read_bytes > guard.peak_before_bytes:
            opened = replace(opened, read_peak_bytes=read_bytes)
        planned = settle(opened, confirmed(machine()), rss_bytes())
        model, memory, steps, far = at_end.enter_context(in_memory(run, trained, planned, note))
        used = Predictor(target, model, memory, asker, judge, guard, steps, far)
        at_end.callback(used.end_askers)
        yield used


def _asker(cfg: RunConfig, files: ModelFiles, kind: str | None, names: Sequence[str]) -> Asker:
    """How rows become prompts, by the request; no prompt and its answer is longer than the model has positions."""
    shared = {f.name for f in fields(DataRequest)} & {f.name for f in fields(RunConfig)}
    request = DataRequest(**{name: getattr(cfg, name) for name in shared})
    tokenizer = loader.load_tokenizer(files.path)
    masked = files.kind == "masked"
    asker = Asker.of(request, tokenizer, masked, kind, names)
    if files.shape.positions:
        most = asker.generation.most if asker.may_write else 0
        positions = files.shape.max_positions - files.position_offset - most
        if positions < 1:
            raise UsageError(
                f"--max-new-tokens {most} leaves no room for a prompt in {files.shape.max_positions} positions"
            )
        asker.encoder.max_length = min(asker.encoder.max_length, positions)
    return asker


def _expected(asker: Asker) -> TokenStats:
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
