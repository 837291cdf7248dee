"""Conversations: pieces as they are written, turns that are remembered, sampling with a seed, two models beside."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Bench, make_model
from test_runs import run_of

import edgezo as package
from edgezo.cli.chat import WIDE, page
from edgezo.errors import UsageError
from edgezo.machine.interrupts import stopping
from edgezo.network.sampling import Sampler
from edgezo.plan.plan import PlanDoesNotFit
from edgezo.run import predict
from edgezo.run.chat import Talk
from edgezo.run.predict import predictor_with_room, use_request

pytestmark = pytest.mark.usefixtures("one_thread")
LARGE = {"step": 0.5, "sigma": 0.05}


@pytest.fixture(scope="module")
def run(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "run"
    run_of(bench, folder, kind="messages", train="lowrank", **LARGE)
    return folder


def says(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    text = "".join(f"{line}\n" for line in lines)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def test_a_conversation_goes_on(run: Path) -> None:
    with package.load(run, max_new_tokens=5) as used:
        talk = Talk(used)
        pieces = list(talk.answer("a warm film"))
        assert len(pieces) > 1, "pieces come as they are written"
        first = talk.last
        assert first == "".join(pieces).strip() == used.generate(talk.turns[:1])
        list(talk.answer("a cold film"))
        assert talk.last == used.generate(talk.turns[:3])
        # What was said before is a part of the prompt.
        assert len(used.prompt_ids(talk.turns[:3])) > len(used.prompt_ids(talk.turns[2:3]))


def test_a_conversation_that_is_too_long_loses_its_oldest_turns(run: Path) -> None:
    with package.load(run, max_new_tokens=3, max_length=48) as used:
        turns = [{"role": "user", "content": f"film number {i} is warm"} for i in range(9)]
        ids = used.prompt_ids(turns)
        text = used.asker.how.tokenizer.decode(list(ids))
        assert len(ids) <= 48 and "number 8" in text and "number 0" not in text
        assert text.startswith("<|im_start|>"), "no turn is cut in its middle"


def test_an_answer_can_be_stopped(run: Path) -> None:
    with package.load(run, max_new_tokens=8) as used:
        talk = Talk(used)
        asked = iter([False, True])
        assert len(list(talk.answer("a warm film", lambda: next(asked)))) == 2
        assert [turn["role"] for turn in talk.turns] == ["user", "assistant"]
        list(talk.answer("and then?"))  # the conversation goes on
        assert len(talk.turns) == 4


def test_an_answer_with_as_many_tokens_as_it_may_have_says_so(
    run: Path, edgezo: Any, edgezo_json: Any, monkeypatch: Any
) -> None:
    with package.load(run, max_new_tokens=5) as used:
        talk = Talk(used)
        for line in ("a warm film", "a cold film"):
            writing = used.write([*talk.turns, {"role": "user", "content": line}])
            list(writing)
            list(talk.answer(line))
            assert talk.most_written == (0 if writing.ended else 5)
        asked = iter([True])
        list(talk.answer("a warm film", lambda: next(asked)))
        assert talk.most_written == 0, "who stops an answer knows that it was cut"
    says(monkeypatch, "a warm film")
    code, _, err = edgezo("chat", run, "--max-new-tokens", 1)
    assert code == 0 and "cut at 1 token," in err and "--max-new-tokens" in err
    says(monkeypatch, "a warm film")
    code, made = edgezo_json("chat", run, "--max-new-tokens", 1)
    assert code == 0 and made["turns"][0]["cut"] == [str(run)]


def test_ctrl_c_inside_an_answer_ends_nothing() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stopping() as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped()
    assert signal.getsignal(signal.SIGINT) == before


def test_the_command_answers_each_line(
    run: Path, bench: Bench, edgezo: Any, monkeypatch: Any
) -> None:
    says(monkeypatch, "a warm film", "", "a cold film")
    code, out, err = edgezo("chat", run, "--max-new-tokens", 4)
    assert code == 0, err
    with package.load(run, max_new_tokens=4) as used:
        talk = Talk(used)
        for line in ("a warm film", "a cold film"):
            list(talk.answer(line))
    assert talk.turns[1]["content"] in out and talk.turns[3]["content"] in out


def test_two_models_answer_side_by_side(
    run: Path, bench: Bench, edgezo_json: Any, monkeypatch: Any
) -> None:
    says(monkeypatch, "a warm film")
    code, made = edgezo_json("chat", run, "--compare", bench.model, "--max-new-tokens", 6)
    assert code == 0
    (turn,) = made["turns"]
    assert list(turn["answers"]) == [str(bench.model), str(run)]
    question = [{"role": "user", "content": "a warm film"}]
    for name, answer in turn["answers"].items():
        with package.load(name, max_new_tokens=6) as used:
            assert used.generate(question) == answer
    assert len(set(turn["answers"].values())) == 2, "training has changed the answer"


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def shown_on(monkeypatch: pytest.MonkeyPatch, width: int) -> list[str]:
    """The lines that a terminal of so many columns was given, frame after frame."""
    given = Terminal()
    monkeypatch.setattr(sys, "stdout", given)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    with page(["base", "run"]) as show:
        for place, pieces in enumerate((["It ", "was\x1b[2J", " long"], ["It is", " short"])):
            for piece in pieces:
                show(place, piece)
    without_colours = re.sub(r"\x1b\[[0-9;]*m", "", given.getvalue())
    frames = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", without_colours)
    return [" ".join(line.split()) for line in frames.splitlines() if line.strip()]


def test_a_wide_terminal_has_both_answers_beside_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = shown_on(monkeypatch, WIDE)
    assert "base run" in lines and lines[-1] == r"It was\x1b[2J long It is short", lines
    assert r"It was\x1b[2J long It is" in lines, "pieces are shown as they come"
    lines = shown_on(monkeypatch, WIDE - 1)
    assert lines == [r"[base] It was\x1b[2J long", "[run] It is short"]


def turns(*lines: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": line} for line in lines]


def test_a_run_is_compared_with_its_base_in_the_same_precision(
    run: Path, bench: Bench, edgezo_json: Any, edgezo: Any, monkeypatch: Any
) -> None:
    says(monkeypatch, "a warm film")
    code, made = edgezo_json("chat", run, "--compare", "--max-new-tokens", 6)
    assert code == 0
    answers = made["turns"][0]["answers"]
    assert list(answers) == [str(bench.model), str(run)]
    with package.load(bench.model, max_new_tokens=6, precision="fp32") as base:
        assert answers[str(bench.model)] == base.generate(turns("a warm film"))
    code, _, err = edgezo("chat", bench.model, "--compare")
    assert code == 2 and "--compare MODEL" in err


def test_sampling_has_a_seed(run: Path) -> None:
    with package.load(run, max_new_tokens=12) as used:
        chances = {"temperature": 2.0, "top_p": 0.9}
        once, again, other = (used.generate("a film", seed=s, **chances) for s in (1, 1, 2))
        assert once == again != other
        greedy = used.generate("a film")
        assert used.generate("a film", temperature=1e-4) == greedy
        assert used.generate("a film", temperature=2.0, top_p=1e-6) == greedy


def test_tokens_are_drawn_by_their_probability() -> None:
    logits = np.log(np.array([[0.1, 0.4, 0.2, 0.3]], np.float32))
    sampler = Sampler(1.0, 1.0, seed=3)
    counts = Counter(int(sampler(logits)[0]) for _ in range(4000))
    for token, share in enumerate((0.1, 0.4, 0.2, 0.3)):
        assert counts[token] / 4000 == pytest.approx(share, abs=0.03)
    # The smallest set with 0.65 together is tokens 1 and 3, drawn as 4 to 3.
    sampler = Sampler(1.0, 0.65, seed=3)
    counts = Counter(int(sampler(logits)[0]) for _ in range(4000))
    assert set(counts) == {1, 3} and counts[1] / counts[3] == pytest.approx(4 / 3, rel=0.15)
    # At half the temperature shares are squared: 0.16 to 0.09.
    sampler = Sampler(0.5, 0.65, seed=3)
    counts = Counter(int(sampler(logits)[0]) for _ in range(4000))
    assert counts[1] / counts[3] == pytest.approx(16 / 9, rel=0.15)


def test_numbers_without_a_meaning_are_refused(run: Path, edgezo: Any) -> None:
    for arguments, why in (
        (("--temperature", -1), "--temperature -1"),
        (("--top-p", 0, "--temperature", 1), "--top-p 0"),
        (("--top-p", 1.5, "--temperature", 1), "--top-p 1.5"),
    ):
        code, out, err = edgezo("chat", run, *arguments)
        assert code == 2 and why in err and out == "", err
    with pytest.raises(UsageError):
        Sampler(float("nan"), 1.0, 0)


def test_a_model_without_a_chat_template_completes_lines(
    tmp_path: Path, edgezo: Any, monkeypatch: Any
) -> None:
    model = make_model(tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    says(monkeypatch, "a warm film")
    code, out, err = edgezo("chat", model, "--max-new-tokens", 4, "--max-mem", "8GB")
    assert code == 0, err
    with package.load(model, max_new_tokens=4) as used:
        assert used.generate("a warm film") in out


def test_a_conversation_is_as_long_as_the_cap_has_room_for(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, room = predict.predictor, 512

    @contextmanager
    def within(target: str, cfg: Any, note: Any) -> Iterator[Any]:
        if cfg.max_length > room:
            raise PlanDoesNotFit(f"{cfg.max_length} tokens", 1, ())
        with real(target, cfg, note) as used:
            yield used

    monkeypatch.setattr(predict, "predictor", within)
    notes: list[str] = []
    cfg = use_request(str(run), {"max_new_tokens": 3})
    with predictor_with_room(
        str(run), cfg, (2048, 1024, 512), notes.append, "a conversation"
    ) as used:
        assert used.asker.encoder.max_length <= room
    assert notes[-1] == "a conversation may have 512 tokens: the cap has no room for 2,048"
    with (
        pytest.raises(PlanDoesNotFit, match="1024 tokens"),
        predictor_with_room(str(run), cfg, (2048, 1024), notes.append, "a conversation"),
    ):
        pass
