"""Mails become texts: the subject and what its sender wrote, of a mailbox (mbox) or of one mail (.eml).

A mailbox is read line by line, and of each mail at most ``MOST_BYTES`` are kept: text comes first, and what follows is
mostly attachments. Only parts of plain text are read; nothing else of a mail is looked at.
"""

from __future__ import annotations

import email
import re
from collections.abc import Iterator
from contextlib import suppress
from email.errors import MessageError
from email.header import decode_header, make_header
from email.message import Message
from typing import BinaryIO

from edgezo.data.row_files import Record, Remarks
from edgezo.machine.foreign import FAULTS
from edgezo.machine.process_memory import Guard

MOST_BYTES = 1 << 20  # of one mail
_LINE_BYTES = 1 << 16  # of a line
_SUBJECT_CHARS = 1000
_FAULTS: tuple[type[Exception], ...] = (*FAULTS, MessageError)
_MAIL_TIMES = 6  # copies of a mail while it is taken apart
_BEGINS = re.compile(rb"From \S+.*\d{4}")


def is_mailbox(start: bytes) -> bool:
    """Whether a file that begins so is a mailbox."""
    return _BEGINS.match(start) is not None


def texts(
    file: BinaryIO, name: str, boxed: bool, remarks: Remarks, guard: Guard
) -> Iterator[Record]:
    """A row for each mail with text. ``boxed``: the file is a mailbox, else one mail."""
    for number, raw in enumerate(_mails_of(file) if boxed else [file.read(MOST_BYTES)], 1):
        where = f"{name}, mail {number}" if boxed else name
        guard.check(_MAIL_TIMES * len(raw), where)
        try:
            text = _text_of(email.message_from_bytes(raw))
        except _FAULTS:
            remarks.add("mails left out, since they cannot be read", where)
            continue
        if text is None:
            remarks.add("mails left out, since they have no plain text", where)
        else:
            yield Record(where, {"text": text})


def _mails_of(file: BinaryIO) -> Iterator[bytes]:
    """The bytes of each mail of a mailbox, which begins with a line ``From SENDER DATE`` behind an empty one."""
    kept, is_kept, after_empty, begins = bytearray(), False, True, True
    while piece := file.readline(_LINE_BYTES):
        if begins and after_empty and _BEGINS.match(piece):
            if is_kept:
                yield bytes(kept)
            kept, is_kept = bytearray(), True
        elif len(kept) + len(piece) <= MOST_BYTES:
            kept += piece
        after_empty = begins and not piece.strip()
        begins = piece.endswith(b"\n")
    if is_kept:
        yield bytes(kept)


def _text_of(mail: Message) -> str | None:
    """The subject and the plain text of a mail, without what it quotes of others; None without such text."""
    parts = [part for part in mail.walk() if part.get_content_type() == "text/plain"]
    bodies = [_body_of(part) for part in parts if part.get_content_disposition() != "attachment"]
    body = "\n\n".join(text for text in bodies if text)
    if not body:
        return None
    subject = str(mail.get("Subject", ""))[:_SUBJECT_CHARS]
    with suppress(*_FAULTS):  # a subject that is not in order stays as it is
        subject = str(make_header(decode_header(subject)))
    subject = " ".join(subject.split())
    return f"{subject}\n\n{body}" if subject else body


def _body_of(part: Message) -> str:
    """The text of a part. Quoted lines begin with ``>``; in a mailbox a line of its own may begin with ``>From``."""
    raw = part.get_payload(decode=True)
    assert isinstance(raw, bytes)
    try:
        text = raw.decode(part.get_content_charset("utf-8"), "replace")
    except LookupError:  # no encoding is called so
        text = raw.decode("utf-8", "replace")
    lines = (re.sub("^>(?=From )", "", line) for line in text.replace("\0", "").splitlines())
    return "\n".join(line.rstrip() for line in lines if not line.startswith(">")).strip()
