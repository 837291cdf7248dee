"""Texts become token sequences: tokenised in bounded batches, cut to ``--max-length`` tokens.

A tokenizer takes up to a kilobyte for a character, and a rule of a foreign tokenizer may take for ever. So texts pass
in small batches on a thread of their own, while this one watches memory and processor time; and of a very long text
only the part is tokenised that its row is made of.
"""

from __future__ import annotations

import math
import threading
import time
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from edgezo.data.batches import Example
from edgezo.data.packed import PackedExamples
from edgezo.data.row_kinds import Draft, Piece
from edgezo.data.text_parts import best_cut, text_parts
from edgezo.data.trees import Row
from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.foreign import reading
from edgezo.machine.process_memory import Guard, ReadingGuard

ENCODE_ROWS = 256  # at most so many texts are tokenised at a time,
ENCODE_CHARS = 1 << 16  # and of texts of more than one at most so many characters
ASCII_BYTES, OTHER_BYTES = 300, 1000  # of memory that a tokenizer takes for a character
# Characters of a text that is tokenised whole: at least these, and so many for each token of a row.
WHOLE_CHARS, WHOLE_TIMES = 1 << 16, 16
MOST_CHARS = 1 << 20  # on each side of the first predicted one, of a longer text
MOST_BATCH_CPU_S = 20.0  # for a batch, which takes a tenth of a second
MOST_ID = 2**31 - 1  # of a token: rows hold numbers of 32 bits
_LOOK_S = 0.05  # how often memory is looked at while a batch is tokenised


class Encoder:
    """Makes examples of drafts with one tokenizer, and counts the rows that had to be cut."""

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        masked: bool,
        guard: Guard | None = None,
        most_in_tree: int | None = None,
    ) -> None:
        self.tokenizer, self.max_length, self.masked = tokenizer, max_length, masked
        self.most_in_tree = most_in_tree  # PackedExamples has it
        self.endings: tuple[tuple[int, ...], ...] = ()  # label words of several tokens
        self.guard = guard or ReadingGuard()
        with reading("The model's tokenizer", any_kind=True):
            self.prefix, self.suffix = special_ids(tokenizer)
            special = (tokenizer.eos_token_id, tokenizer.mask_token_id)
            _check_ids([(*self.prefix, *self.suffix, *(i for i in special if i is not None))])
            self.begin = "".join(tokenizer.convert_ids_to_tokens(list(self.prefix)))
        self.cut, self.windows = 0, Windows()

    def follow_with(self, endings: tuple[tuple[int, ...], ...]) -> None:
        """Let the rows to come be prompts that one of these label words follows. Raises UsageError for long words."""
        longest = max(map(len, endings), default=0)
        if longest + len(self.prefix) > self.max_length:
            raise UsageError(
                f"--max-length {self.max_length} leaves no room for a label word of {longest} tokens: give "
                f"{longest + len(self.prefix) + 1} or more"
            )
        self.endings = endings

    def ids(
        self, texts: Sequence[str], offsets: bool = False, wheres: Sequence[str] = ()
    ) -> Iterator[tuple[list[int], Any]]:
        """(token ids, character offsets or None) of each text, without special tokens; ``wheres`` are their places.

        Raises DoesNotFit, and EdgezoError where the tokenizer fails.
        """
        for start, stop in _batches(texts):
            batch = list(texts[start:stop])
            where = wheres[start] if wheres else "a text"
            encoded = self._bounded(
                batch,
                where,
                add_special_tokens=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                return_offsets_mapping=offsets,
                verbose=False,
            )
            ids = encoded["input_ids"]
            _check_ids(ids)
            spans = encoded["offset_mapping"] if offsets else [None] * len(ids)
            yield from zip(ids, spans, strict=True)

    def _bounded(self, texts: list[str], where: str, **options: Any) -> Any:
        """What the tokenizer makes of a batch, while memory and processor time are looked at."""
        item = f"tokenising from {where} on"
        each_bytes = ASCII_BYTES if all(map(str.isascii, texts)) else OTHER_BYTES
        self.guard.check(each_bytes * sum(map(len, texts)), item)
        outcome = _Outcome(None, None)

        def work() -> None:
            nonlocal outcome
            try:
                outcome = _Outcome(self.tokenizer(texts, **options), None)
            except BaseException as problem:
                outcome = _Outcome(None, problem)

        thread = threading.Thread(target=work, daemon=True)
        begun_s = time.process_time()
        thread.start()
        while thread.is_alive():
            thread.join(_LOOK_S)
            if not thread.is_alive():
                break
            self.guard.check(item=item)
            if time.process_time() - begun_s > MOST_BATCH_CPU_S:
                raise EdgezoError(
                    f"{item} takes more than {MOST_BATCH_CPU_S:g} s of processor time, where a tenth of a second is "
                    "usual. The tokenizer of the model is at fault: fetch the model again, or give another one."
                )
        if outcome.problem is not None:
            with reading(f"The model's tokenizer fails {item}: the text", any_kind=True):
                raise outcome.problem
        return outcome.encoded

    def examples(self, drafts: Iterable[Draft], split: str, notes: list[str]) -> PackedExamples:
        """The examples of all drafts that have a token to predict. Notes how many rows were cut or left out."""
        packed = PackedExamples((), self.endings, self.most_in_tree)
        n_rows, left_out = 0, 0
        self.cut, self.windows = 0, Windows()
        for some in _groups(drafts):
            n_rows += sum(len(draft.pieces) for draft in some)
            for example in self.some_examples(some):
                if all(row.score_at for row in example.rows):
                    packed.append(example)
                else:
                    left_out += 1
            self.guard.check(item=f"keeping the tokens of the rows up to {some[-1].where}")
        if self.windows.texts:
            notes.append(
                f"{self.windows.texts} long {split} texts cut into {self.windows.count} windows of up to "
                f"{self.max_length} tokens (--max-length)"
            )
        if self.cut:
            notes.append(
                f"{self.cut} of {n_rows} {split} rows cut to {self.max_length} tokens "
                "(--max-length)"
            )
        if left_out:
            notes.append(f"{left_out} {split} rows left out: no token to predict")
        return packed

    def some_examples(self, drafts: Sequence[Draft]) -> Iterator[Example]:
        """One example for each draft, or for each of its windows, whether it predicts something or not."""
        if drafts and drafts[0].windows:
            yield from self._window_examples(drafts)
            return
        pieces = [piece for draft in drafts for piece in draft.pieces]
        wheres = [draft.where for draft in drafts for _ in draft.pieces]
        make = self._span_rows if all(piece.spans for piece in pieces) else self._label_rows
        rows = make(pieces, wheres)
        for draft in drafts:
            options = () if draft.fields is None else draft.options
            yield Example(
                tuple(next(rows) for _ in draft.pieces), draft.label, draft.fields, options
            )

    # -- very long texts ----------------------------------------------------------------------------------

    def clipped(self, piece: Piece, where: str) -> Piece:
        """The piece, or of a very long one the part that gives the row of the whole.

        No number of characters is enough for every tokenizer: some make one token of any number of them, or none. So
        parts are tried, each about twice as long as the one before, until two give the same row. A part of
        ``MOST_CHARS`` on each side is taken as it is. Each is longer by a prime number: tokens of a fixed length,
        which depend on where a part begins, then differ.
        """
        size = max(WHOLE_CHARS, WHOLE_TIMES * self.max_length)
        if len(piece.text) <= size and len(piece.after or "") <= size:
            return piece
        part, size = _part(piece, size // 2), size // 2
        row = self._row_of(part, where)
        while size < MOST_CHARS:
            size += _prime_above(size)
            larger = _part(piece, size)
            if not larger.clipped:
                return piece
            if (row_of_larger := self._row_of(larger, where)) == row:
                break
            part, row = larger, row_of_larger
        return part

    def _row_of(self, piece: Piece, where: str) -> Row:
        """The row of one piece, tokenised alone."""
        (ids, offsets), *_ = self.ids([piece.text], bool(piece.spans), [where])
        if piece.spans:
            return self._span_row(piece, ids, offsets)[0]
        (after, _), *_ = self.ids([piece.after or ""], False, [where])
        return self._label_row(ids, after)[0]

    # -- rows that predict some of their characters -------------------------------------------------------

    def _span_rows(self, pieces: Sequence[Piece], wheres: Sequence[str]) -> Iterator[Row]:
        encoded = self.ids([piece.text for piece in pieces], True, wheres)
        for piece, (ids, offsets) in zip(pieces, encoded, strict=True):
            row, cut = self._span_row(piece, ids, offsets)
            self.cut += cut or piece.clipped
            yield row

    def _span_row(self, piece: Piece, ids: list[int], offsets: Any) -> tuple[Row, bool]:
        """The row of a piece, and whether it was cut: before its first scored token, and only then at its end.

        A text may have far more tokens than the row, so only those that bound it and those in it are looked at.
        """
        end_id = self.tokenizer.eos_token_id
        if not piece.bare and (written := self._begins_with_prefix(ids)):
            ids, offsets = ids[written:], offsets[written:]
        ends = piece.ends and end_id is not None and ids[-1:] != [end_id]

        def scored(i: int) -> bool:
            if i == len(offsets):
                return True  # the end token
            first, last = offsets[i]
            # A token of no characters (the mark of a word's start in some vocabularies) counts as one character.
            last = max(last, first + 1)
            return any(first < end and last > start for start, end in piece.spans)

        ids = [*ids, end_id] if ends else ids
        prefix = () if piece.bare else self.prefix
        first_scored = next(filter(scored, range(len(ids))), len(ids))
        stop = next(filter(scored, reversed(range(len(ids)))), -1) + 1  # nothing reads what follows
        room = self.max_length + 1 - len(prefix)  # the last token is predicted, not read
        start = max(0, min(stop - room, first_scored - (0 if prefix else 1)))
        cut, stop = stop > room, min(stop, start + room)
        tokens = [*prefix, *ids[start:stop]]
        places = (len(prefix) + i - start for i in range(start, stop) if scored(i))
        targets = [place for place in places if place > 0]  # nothing stands before the first token
        row = Row(
            array("i", tokens[:-1]),
            _compact([i - 1 for i in targets]),
            array("i", [tokens[i] for i in targets]),
        )
        return row, cut

    def _window_examples(self, drafts: Sequence[Draft]) -> Iterator[Example]:
        """The examples of texts: each token is predicted once, and later windows begin with the token before."""
        texts, wheres = [draft.pieces[0].text for draft in drafts], [d.where for d in drafts]
        for draft, (ids, offsets) in zip(drafts, self.ids(texts, True, wheres), strict=True):
            [piece] = draft.pieces
            row, cut = self._span_row(piece, ids, offsets)
            rows = list(self._window_rows(piece, ids, offsets)) if cut else [row]
            self.windows.add(draft.where, len(rows), piece.clipped)
            for row in rows:
                yield Example((row,), draft.label, draft.fields)

    def _window_rows(self, piece: Piece, ids: list[int], offsets: Any) -> Iterator[Row]:
        """The rows of a text that has too many tokens for one: about equally long, cut where it does least harm."""
        written = self._begins_with_prefix(ids)
        ids, offsets = ids[written:], offsets[written:]
        ends, end_id = [last for _, last in offsets], self.tokenizer.eos_token_id
        if piece.ends and end_id is not None and ids[-1:] != [end_id]:
            ids = [*ids, end_id]
            ends.append(len(piece.text) + 1)
        room, at = self.max_length - len(self.prefix), 0  # beside the token before the first
        while at < len(ids):
            left = len(ids) - at
            size = -(-left // -(-left // room))
            stop = min(len(ids), at + room, at + size + size // 4)
            if stop < len(ids):
                low = at + max(1, size * 3 // 4)
                place = best_cut(piece.text, ends[low - 1], ends[stop - 1])
                stop = bisect_right(
                    ends, place, low, stop
                )  # a token may begin with the space before its word
            before = ids[at - 1 : at] if at else []
            tokens = [*self.prefix, *before, *ids[at:stop]]
            first = max(1, len(tokens) - (stop - at))
            score_at, score_ids = range(first - 1, len(tokens) - 1), array("i", tokens[first:])
            yield Row(array("i", tokens[:-1]), score_at, score_ids)
            at = stop

    def _begins_with_prefix(self, ids: list[int]) -> int:
        """How many tokens at the beginning of a text are those that the tokenizer would put there once more."""
        at, size = 0, len(self.prefix)
        while size and ids[at : at + size] == list(self.prefix):
            at += size
        return at

    def begins_inside(self, piece: Piece) -> bool:
        """Whether what is to be predicted begins with the token that begins a text."""
        starts = (piece.text[start:].lstrip() for start, _ in piece.spans if start)
        return bool(self.begin) and not piece.bare and any(s.startswith(self.begin) for s in starts)

    def tidy(self, piece: Piece) -> Piece:
        """The piece without white space before a begin token, or behind an end token, that its text has already."""
        begin, end, text = self.begin, self.tokenizer.eos_token, piece.text
        first = len(text) - len(text.lstrip())
        if piece.bare or not begin or not text.startswith(begin, first):
            first = 0
        stop = len(text.rstrip())
        if not piece.ends or not end or not text.endswith(end, 0, stop):
            stop = len(text)
        spans = tuple((max(0, a - first), min(stop, b) - first) for a, b in piece.spans)
        return replace(piece, text=text[first:stop], spans=spans)

    # -- rows that predict a label word -------------------------------------------------------------------

    def _label_rows(self, pieces: Sequence[Piece], wheres: Sequence[str]) -> Iterator[Row]:
        """Rows that end with the prompt; for a masked model, the prompt, the mask and the text after it."""
        befores = self.ids([piece.text for piece in pieces], False, wheres)
        afters = self.ids([piece.after or "" for piece in pieces], False, wheres)
        for piece, (before, _), (after, _) in zip(pieces, befores, afters, strict=True):
            row, cut = self._label_row(before, after)
            self.cut += cut or piece.clipped
            yield row

    def _label_row(self, before: list[int], after: list[int]) -> tuple[Row, bool]:
        """The row of a prompt and the text after the mask, and whether it was cut."""
        before = before[self._begins_with_prefix(before) :]
        if self.suffix and after[-len(self.suffix) :] == list(self.suffix):
            after = after[: -len(self.suffix)]
        around = [*self.prefix, self.tokenizer.mask_token_id, *self.suffix]
        room = self.max_length - (len(around) if self.masked else len(self.prefix))
        # The last token of a label word is predicted, not read.
        room -= max((len(ending) - 1 for ending in self.endings), default=0)
        cut = len(before) + len(after) > room
        after = after[: max(room - len(before), room // 2)]
        before = before[max(0, len(before) - max(0, room - len(after))) :]
        ids = [*self.prefix, *before]
        if self.masked:
            ids += [self.tokenizer.mask_token_id]
        score_at = (len(ids) - 1,) if ids else ()
        if self.masked:
            ids += [*after, *self.suffix]
        return Row(array("i", ids), score_at, ()), cut


@dataclass
class Windows:
    """Counts texts that were cut into windows. Consecutive parts from one place are one text."""

    texts: int = 0
    count: int = 0
    _where: str = ""
    _of_text: int = 0

    def add(self, where: str, n: int, is_part: bool) -> None:
        """Count the ``n`` windows of a text, or of a part of it."""
        is_first = where != self._where or not is_part
        if is_first:
            self._where, self._of_text = where, 0
        before, self._of_text = self._of_text, self._of_text + n
        if self._of_text > 1:
            self.texts += before < 2
            self.count += n + (before if before < 2 else 0)


def parts(piece: Piece) -> Iterator[Piece]:
    """A text that is predicted as a whole, in pieces that are tokenised one by one. The end is that of the last."""
    if len(piece.text) <= ENCODE_CHARS:
        yield piece
        return
    texts, chars = text_parts(piece.text, ENCODE_CHARS), 0
    for text in texts:
        chars += len(text)
        ends = piece.ends and chars == len(piece.text)
        yield Piece(text, ((0, len(text)),), ends=ends, clipped=True)


class _Outcome(NamedTuple):
    """What a thread came to."""

    encoded: Any
    problem: BaseException | None


def _part(piece: Piece, size: int) -> Piece:
    """``size`` characters of a piece on each side of where prediction begins; ``clipped`` if it has more."""
    text, after = piece.text, piece.after
    first = min((start for start, _ in piece.spans), default=len(text))
    start, stop = max(0, first - size), min(len(text), first + size)
    spans = [(max(a, start) - start, min(b, stop) - start) for a, b in piece.spans]
    inside = stop == len(text)
    return replace(
        piece,
        text=text[start:stop],
        spans=tuple((a, b) for a, b in spans if a < b),
        ends=piece.ends and inside,
        after=None if after is None else after[:size],
        clipped=start > 0 or not inside or len(after or "") > size,
    )


def _prime_above(number: int) -> int:
    """The smallest prime that is larger."""
    while True:
        number += 1
        if all(number % factor for factor in range(2, math.isqrt(number) + 1)):
            return number


def _groups(drafts: Iterable[Draft]) -> Iterator[list[Draft]]:
    """Consecutive drafts, few enough that their texts take little memory."""
    group, chars = list[Draft](), 0
    for draft in drafts:
        group.append(draft)
        chars += sum(len(piece.text) for piece in draft.pieces)
        if len(group) == ENCODE_ROWS or chars > ENCODE_CHARS:
            yield group
            group, chars = [], 0
    if group:
        yield group


def _batches(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive texts that are tokenised together."""
    start, chars = 0, 0
    for i, text in enumerate(texts):
        if i > start and (i - start == ENCODE_ROWS or chars + len(text) > ENCODE_CHARS):
            yield start, i
            start, chars = i, 0
        chars += len(text)
    if start < len(texts):
        yield start, len(texts)


def _check_ids(rows: Sequence[Sequence[int]]) -> None:
    """Raise EdgezoError where a token's number is larger than any vocabulary."""
    largest = max((max(row) for row in rows if row), default=0)
    if largest > MOST_ID:
        raise EdgezoError(
            f"The model's tokenizer has a token with the number {largest:,}, and no vocabulary is so large. "
            "Its tokenizer.json is damaged: fetch the model again."
        )


def _compact(positions: list[int]) -> Sequence[int]:
    """Ascending positions as a range where they follow each other, else as an array."""
    if positions and positions[-1] - positions[0] == len(positions) - 1:
        return range(positions[0], positions[-1] + 1)
    return array("i", positions)


def special_ids(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that the tokenizer puts before and after a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return tuple(whole[:start]), tuple(whole[start + len(plain) :])
    return (), ()
