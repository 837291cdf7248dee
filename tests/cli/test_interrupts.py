"""Ctrl-C and SIGTERM at any moment: 130 and no traceback. Children end with their parent, and output never fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Bench

from edgezo.cli import main as cli
from edgezo.cli.options import encodable, printable
from edgezo.errors import UsageError
from edgezo.machine import children, interrupts

# Runs the command line, and sends itself a signal when a module is imported, or a file opened.
STRUCK = """
import os, signal, sys
event, what, number, swallow = sys.argv[1:5]
del sys.argv[1:5]
struck = False

def hook(name, args):
    global struck
    if not struck and name == event and str(args[0]).endswith(what):
        struck = True
        os.kill(os.getpid(), int(number))
        if swallow == "destructor":
            class Late:
                def __del__(self):
                    for _ in range(1000): pass
            Late()
        elif swallow == "except":
            try:
                for _ in range(1000): pass
            except BaseException: pass
sys.addaudithook(hook)
from edgezo.__main__ import main
main()
"""


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A shell lets jobs in the background ignore Ctrl-C, and they pass that on: here it is heard in any case."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def struck(
    event: str, what: str, number: int, *args: object, swallow: str = "no", **options: object
) -> subprocess.CompletedProcess[str]:
    """The command line with these arguments, which gets a signal at this moment."""
    return subprocess.run(
        [sys.executable, "-c", STRUCK, event, what, str(int(number)), swallow, *map(str, args)],
        capture_output=True,
        text=True,
        **options,  # type: ignore[call-overload]
    )


def assert_interrupted(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr and "ignored" not in done.stderr
    assert "interrupted" in done.stderr


MODEL_CODE = f"modeling_llama.{sys.implementation.cache_tag}.pyc"
MOMENTS = (
    *(("import", "click.core", n) for n in (signal.SIGINT, signal.SIGTERM)),
    *(("import", module, signal.SIGINT) for module in ("torch._C", "transformers")),
    *(("open", file, signal.SIGINT) for file in (MODEL_CODE, "label.jsonl")),
    ("open", "model.safetensors", signal.SIGTERM),
)


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: f"{moment[1]}-{moment[2].name}")
def test_a_signal_while_a_command_starts_ends_it(
    moment: tuple[str, str, int], bench: Bench
) -> None:
    command = ("eval", *bench.arguments(steps=None, batch_size=None, micro_batch=None))
    assert_interrupted(struck(*moment, *command))


@pytest.mark.parametrize("swallow", ["destructor", "except"])
def test_a_signal_that_something_swallows_ends_the_command_all_the_same(swallow: str) -> None:
    done = struck("import", "edgezo.network.cards", signal.SIGINT, "models", swallow=swallow)
    assert done.returncode == 130 and "Traceback" not in done.stderr


def test_a_signal_that_the_parent_lets_it_ignore_is_ignored() -> None:
    done = struck(
        "import",
        "edgezo.network.cards",
        signal.SIGINT,
        "models",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert done.returncode == 0 and "smollm2" in done.stdout


def test_a_second_signal_ends_at_once_and_a_run_in_process_leaves_handlers_as_they_were() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), interrupts.raising():
        signal.raise_signal(signal.SIGTERM)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert interrupts.asked()
    interrupts._asked = False
    code = (
        "import signal\n"
        "from edgezo.machine import interrupts\n"
        "interrupts.listen()\n"
        "with interrupts.raising():\n"
        "    try:\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "    except KeyboardInterrupt:\n"
        "        signal.raise_signal(signal.SIGINT)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr == "edgezo: interrupted\n"


def test_what_an_interrupt_became_on_its_way_is_an_interrupt(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def main(**more: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise SystemError("returned a result with an exception set") from error

    monkeypatch.setattr(cli.cli, "main", main)
    try:
        assert cli.run(["models"]) == 130
    finally:
        interrupts._asked = False
    assert capsys.readouterr().err == "edgezo: interrupted\n"


# ---------------------------------------------------------------------------------------------
# Children


WAITING = "import edgezo, sys; print(1, flush=True); sys.stdin.read()"
PARENT = """
import os, signal, subprocess, sys
from edgezo.machine import children
command = children.command("edgezo.data.chat_rendering") if {templates} else [sys.executable, "-c", {waiting!r}]
child = subprocess.Popen(
    command, env=children.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[{pipe}]
)
child.stdin.write(b'{{"template": "x", "special_tokens": {{}}}}\\n')
child.stdin.flush()
child.stdout.readline()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("templates", [True, False])
def test_a_child_ends_with_its_parent_however_that_ends(templates: bool) -> None:
    # The parent starts a child that waits, and kills itself. Then the child has the only writing end of a pipe.
    reading, writing = os.pipe()
    code = PARENT.format(templates=templates, waiting=WAITING, pipe=writing)
    done = subprocess.run([sys.executable, "-c", code], pass_fds=[writing])
    os.close(writing)
    assert done.returncode == -signal.SIGKILL
    assert os.read(reading, 1) == b""  # the end of the pipe: nobody is left who could write
    os.close(reading)


def test_a_child_whose_parent_has_ended_already_does_not_begin() -> None:
    env = os.environ | {children.PARENT: "1999999999"}
    code = "import edgezo; print('begun')"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")


# ---------------------------------------------------------------------------------------------
# Output


def edgezo_process(*args: str | bytes, **options: object) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "edgezo", *args],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options},  # type: ignore[call-overload]
    )


def test_a_standard_output_that_is_full_is_an_error_with_a_way_out() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with open("/dev/full", "wb") as full:
        done = edgezo_process("models", stdout=full)
    assert done.returncode == 1
    message = done.stderr.decode()
    assert message.startswith("edgezo: standard output: No space left")
    assert "Free some space" in message and message.count("\n") == 1


def test_a_bare_error_of_the_system_says_where_and_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, words in (
        (OSError(28, "No space left on device"), "A temporary file: No space left"),
        (OSError(28, "No space left on device", "/tmp/x"), "/tmp/x: No space"),
        (PermissionError(13, "Permission denied", "/there/x"), "Check that it exists"),
        (OSError("odd"), "odd. Check the files"),
    ):

        def main(error: OSError = error, **more: object) -> None:
            raise error

        monkeypatch.setattr(cli.cli, "main", main)
        assert cli.run(["models"]) == 1
        assert words in capsys.readouterr().err


def test_an_argument_that_is_no_text_is_refused_and_shown(bench: Bench) -> None:
    done = edgezo_process("eval", "--model", b"\xff\xfe", "--json")
    assert done.returncode == 2
    shown = json.loads(done.stdout)
    assert "\\udcff" in shown["error"] and "not UTF-8 text" in shown["error"]
    done = edgezo_process("eval", "--model", b"\xff")
    assert done.returncode == 2 and rb"the argument \udcff is not UTF-8" in done.stderr


def test_what_is_printed_holds_no_commands_to_a_terminal_and_can_always_be_encoded() -> None:
    assert printable("a\x1b[2J\x00b\ud800\n\tü☃\U0001f600") == (
        "a\\x1b[2J\\x00b\\ud800\n\tü☃\U0001f600"
    )
    text = json.dumps({"a": "\ud800ü\U0001f600"}, ensure_ascii=False)
    assert json.loads(encodable(text)) == {"a": "\ud800ü\U0001f600"}


def test_an_output_that_has_no_letters_for_a_text_gets_escapes() -> None:
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = edgezo_process("eval", "--task", "example", "--model", "☃", env=env)
    assert done.returncode == 1 and rb"no model '\u2603'" in done.stderr


def test_usage_errors_are_not_interrupts() -> None:
    with pytest.raises(UsageError):
        cli._check_text(["a", "\udcff"])
    cli._check_text(["a", "ü", "\U0001f600"])
