"""Standard streams in any state: a command says one line, and ends with a documented code."""

from __future__ import annotations

import io
import json
import os
import pwd
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import forks
import pytest
from conftest import Bench

from edgezo.cli.options import echo_json
from edgezo.machine import streams

CODES = {0, 1, 2, 3, 4, 5, 130}
ENDS = ("there", "closed", "full", "unread")  # of an output
CHILD = """
import os, sys
closed = {closed}
for number in closed:
    os.close(number)
for number in closed:
    setattr(sys, ("stdin", "stdout", "stderr")[number], None)
from edgezo.__main__ import main
sys.argv = ["edgezo", *{args}]
main()
"""


def command(args: list[str], *, stdin: str, stdout: str, stderr: str) -> tuple[int, bytes, bytes]:
    """(exit code, standard output, standard error) of a command whose streams are in these states."""
    names = ("stdin", "stdout", "stderr")
    states = dict(zip(names, (stdin, stdout, stderr), strict=True))
    closed = [n for n, name in enumerate(names) if states[name] == "closed"]
    opened = {name: _open(state) for name, state in states.items()}
    with subprocess.Popen(
        [sys.executable, "-c", CHILD.format(closed=closed, args=args)], **opened
    ) as child:
        out, err = child.communicate()
    for file in opened.values():
        if file >= 0:
            os.close(file)
    return child.returncode, out or b"", err or b""


def _open(state: str) -> int:
    if state == "full":
        return os.open("/dev/full", os.O_WRONLY)
    if state == "unread":
        reading, writing = os.pipe()
        os.close(reading)
        return writing
    return subprocess.PIPE


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    "stdin, stdout, stderr",
    [
        ("closed", "there", "there"),
        ("there", "closed", "there"),
        ("there", "there", "closed"),
        ("closed", "closed", "closed"),
        ("there", "full", "there"),
        ("there", "unread", "there"),
        ("there", "full", "full"),
        ("closed", "unread", "unread"),
    ],
)
@pytest.mark.parametrize("args", [["models", "--json"], ["plan", "--model", "no-such", "--json"]])
def test_a_stream_in_any_state_gives_no_traceback(
    args: list[str], stdin: str, stdout: str, stderr: str
) -> None:
    code, out, err = command(args, stdin=stdin, stdout=stdout, stderr=stderr)
    assert b"Traceback" not in out + err
    assert code == (0 if args[0] == "models" and stdout == "there" else 1)
    if stdout == "there":
        assert isinstance(json.loads(out), dict)
    elif stdout in ("full", "closed") and stderr == "there":
        assert err.startswith(b"edgezo: standard output: ") and err.count(b"\n") == 1


def _stream(number: int, encoding: str = "utf-8") -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(streams.Output(number, "w", closefd=False)),
        encoding=encoding,
        errors="backslashreplace",
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "koi8-r", "utf-16", "utf-8"])
@pytest.mark.parametrize("text", ["é☃\U0001f600", "\ud83d\ude00 \udcff \x85", "ж\u2028\x1b[2J\x00"])
def test_json_is_json_in_every_encoding(
    encoding: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    with _stream(file, encoding) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        echo_json({"text": text})
    os.close(file)
    written = (tmp_path / "out").read_bytes().decode(encoding)
    assert json.loads(written)["text"].encode("utf-16", "surrogatepass") == text.encode(
        "utf-16", "surrogatepass"
    )


# ---------------------------------------------------------------------------------------------
# Environments: a seeded sample of their product, each command in a fork of a process that has edgezo imported

UNSET = None
# None of them can be written to outside of the test's own folder.
PLACES = (UNSET, "~nobody-here/x", "relative", "/proc/nowhere", "/dev/null", "/proc/\udcff")
SIZES = (UNSET, "", "0", "1", "7", "80", "abc", "-5", "²", "9" * 30)
VARIABLES: dict[str, tuple[str | None, ...]] = {
    "HOME": PLACES,
    "XDG_CACHE_HOME": PLACES,
    "EDGEZO_CACHE": PLACES,
    "TMPDIR": PLACES,
    "COLUMNS": SIZES,
    "LINES": SIZES,
    "TERM": (UNSET, "", "dumb", "xterm-256color", "no such terminal", "\udcff"),
    "NO_COLOR": (UNSET, "1"),
    "FORCE_COLOR": (UNSET, "1"),
    "TTY_COMPATIBLE": (UNSET, "x"),
    "COLORTERM": (UNSET, "truecolor", "\udcff"),
    "LANG": (UNSET, "xx", "C", "de_DE.ISO-8859-1"),
    "EDGEZO_PARENT": (UNSET, "", "abc", "-1"),
    "EDGEZO_KERNELS": (UNSET, "", "0"),
    "HF_HOME": PLACES,
    "LOCALAPPDATA": PLACES,
}
ENCODINGS = ("utf-8", "ascii", "latin-1", "cp1252", "koi8-r", "utf-16")
FOLDERS = ("there", "there", "there", "removed", "read-only", "no text")
ODD_TEXT = "é☃\U0001f600\u2028\x1b[2J"


def _nobody(number: int) -> object:
    raise KeyError(number)


def _in_environment(args: list[str], output: Path, case: dict[str, object]) -> None:
    """Run a command as ``case`` has it; what it prints goes to files in ``output``."""
    for name, value in {"HF_HUB_OFFLINE": "1", "HOME": str(output), **case["variables"]}.items():  # type: ignore[dict-item]
        os.environ.pop(name, None)
        if value is not UNSET:
            os.environ[name] = value
    tempfile.tempdir = None  # it is asked for anew
    pwd.getpwuid = _nobody  # type: ignore[assignment]  # without HOME there is no home
    folder = output / os.fsdecode(b"od\xff")
    folder.mkdir()
    os.chdir({"read-only": "/proc", "there": output}.get(str(case["folder"]), folder))
    if case["folder"] == "removed":
        folder.rmdir()
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        _put(number, str(case[name]), output / name)
        stream = None
        if case[name] != "closed":
            stream = open(
                number, "w" if number else "r", encoding=str(case["encoding"]), closefd=False
            )
        setattr(sys, name, stream)
    sys.argv = ["edgezo", *args]
    from edgezo.__main__ import main

    main()


def _put(number: int, state: str, file: Path) -> None:
    if state == "closed":
        os.close(number)
        return
    here = _open(state)
    if here < 0:
        here = os.open(file, os.O_RDWR | os.O_CREAT)
    os.dup2(here, number)


COMMANDS = (
    ["models"],
    ["models", "--json"],
    ["--help"],
    ["plan", "--model", "smollm2-135m-instruct", "--json"],
    ["plan", "--model", "smollm2-135m-instruct"],
    ["plan", "--model", f"no/such-{ODD_TEXT}"],
    ["plan", "--model", "~nobody-here/model", "--json"],
    ["plan", "--model", "owner/name", "--data", "~nobody-here/rows.jsonl"],
    ["plan", "--model", "x" * 70_000],
    ["finetune", "--model", "\udcff", "--json"],
    ["finetune", "--model", "{model}", "--data", "{rows}", "--show-batch", "--json"],
    ["finetune", "--model", "{model}", "--data", "{rows}", "--show-batch"],
    ["finetune", "--model", "{model}", "--data", "{rows}", "--dry-run"],
    ["finetune", "--model", "{model}", "--data", "{rows}", "--steps", "1", "--batch-size", "2"],
    ["eval", "--model", "{model}", "--data", "{rows}", "--json"],
)


def _case(seed: int) -> tuple[list[str], dict[str, object]]:
    chance = random.Random(seed)
    odd = chance.sample(sorted(VARIABLES), chance.randint(1, 6))  # the others are as they were
    case: dict[str, object] = {"variables": {name: chance.choice(VARIABLES[name]) for name in odd}}
    case |= {"encoding": chance.choice(ENCODINGS), "folder": chance.choice(FOLDERS)}
    case |= {"stdin": chance.choice(("there", "closed"))}
    case |= {name: chance.choice(("there", "there", *ENDS)) for name in ("stdout", "stderr")}
    return COMMANDS[seed % len(COMMANDS)], case


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("first", range(0, 30, 15))
def test_no_environment_gives_a_traceback(first: int, bench: Bench, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{i} {ODD_TEXT}"}) + "\n" for i in range(4)))
    for seed in range(first, first + 15):
        args, case = _case(seed)
        args = [arg.format(model=bench.model, rows=rows) for arg in args]
        if "--steps" in args:
            args += ["--out", str(tmp_path / f"run-{seed}")]
        output = tmp_path / str(seed)
        output.mkdir()
        process = forks._CONTEXT.Process(target=_in_environment, args=(args, output, case))
        process.start()
        process.join()
        out, err = (
            (output / name).read_bytes() if (output / name).exists() else b""
            for name in ("stdout", "stderr")
        )
        shown = f"{seed}: {args} {case} {process.exitcode} {out[-300:]!r} {err[-900:]!r}"
        assert process.exitcode in CODES, shown
        assert b"Traceback" not in (out + err).replace(b"\0", b""), shown
        if case["stdout"] == "there" and "--json" in args:
            assert isinstance(json.loads(out.decode(str(case["encoding"]))), dict), shown
        elif case["stderr"] == "there" and process.exitcode not in (0, 2):
            message = err.decode(str(case["encoding"]))
            assert case["stdout"] == "unread" or "edgezo: " in message, shown
