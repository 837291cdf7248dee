"""The server speaks OpenAI's form: its own client is answered as the run answers, and errors are of that form."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import Bench
from test_runs import run_of

import edgezo as package
from edgezo.cli.serve import LOOPBACK
from edgezo.errors import DoesNotFit

httpx2 = pytest.importorskip("httpx2")
pytest.importorskip("uvicorn", reason="pip install 'edgezo[serve]' brings uvicorn and Starlette")

from edgezo.run.http_server import MOST_BODY_BYTES, serving  # noqa: E402
from edgezo.run.openai_form import CompletionQuestion, Refused  # noqa: E402
from edgezo.run.serving import MOST_WAITING, Desk, Job, UpTo  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
LARGE = {"step": 0.5, "sigma": 0.05}
MOST = 8  # tokens that a server writes


@contextmanager
def served(target: Path, api_key: str | None = None) -> Iterator[tuple[Any, str]]:
    """(the run in memory, the address of its server) until the end of the block."""
    with (
        package.load(target, max_new_tokens=MOST, max_length=128) as used,
        socket.create_server(("127.0.0.1", 0)) as listening,
    ):
        desk = Desk(used)
        worker = threading.Thread(target=desk.work)
        worker.start()
        with serving(desk, listening, LOOPBACK, api_key):
            yield used, f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        worker.join()


@pytest.fixture(scope="module")
def writer(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "writer"
    run_of(bench, folder, kind="messages", train="lowrank", **LARGE)
    return folder


@pytest.fixture(scope="module")
def server(writer: Path) -> Iterator[tuple[Any, str]]:
    with served(writer) as made:
        yield made


http = httpx2.Client()


@pytest.fixture(scope="module", autouse=True)
def closed() -> Iterator[None]:
    yield
    http.close()


def post(url: str, body: Any, **headers: str) -> Any:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return http.post(url, content=content, headers={"content-type": "application/json", **headers})


def client(address: str, key: str = "none") -> Any:
    openai = pytest.importorskip("openai", reason="pip install 'edgezo[dev]' brings its client")
    return openai.OpenAI(base_url=address, api_key=key, max_retries=0)


QUESTION = [{"role": "user", "content": "a warm film"}]


def test_openais_client_is_answered_as_the_run_answers(server: Any) -> None:
    used, address = server
    asked = client(address)
    (model,) = asked.models.list().data
    assert (model.id, model.owned_by) == ("writer", "edgezo")
    assert asked.models.retrieve("writer").id == "writer"

    made = asked.chat.completions.create(model="writer", messages=QUESTION, max_tokens=5)
    wanted = list(used.write(QUESTION, 5))
    assert made.choices[0].message.content == "".join(wanted)
    assert made.usage.prompt_tokens == len(used.prompt_ids(QUESTION))
    assert made.usage.completion_tokens == 5 and made.choices[0].finish_reason == "length"

    made = asked.completions.create(model="writer", prompt=["a film", "a cold film"])
    assert [choice.text for choice in made.choices] == [
        "".join(used.write(prompt)) for prompt in ("a film", "a cold film")
    ]
    assert made.model == "writer" and made.usage.completion_tokens <= 2 * MOST


def test_a_stream_has_the_pieces_as_they_are_written(server: Any) -> None:
    used, address = server
    options = {"include_usage": True}
    parts = list(
        client(address).chat.completions.create(
            model="writer", messages=QUESTION, stream=True, stream_options=options
        )
    )
    *written, last, counted = parts
    assert [part.choices[0].delta.content for part in written] == list(used.write(QUESTION))
    assert last.choices[0].finish_reason in ("stop", "length") and len({p.id for p in parts}) == 1
    assert counted.choices == [] and counted.usage.completion_tokens > 0
    streamed = client(address).completions.create(model="writer", prompt="a film", stream=True)
    assert "".join(p.choices[0].text for p in streamed) == "".join(used.write("a film"))


def test_chance_has_a_seed_and_a_stop_ends(server: Any) -> None:
    used, address = server

    def text(**more: Any) -> str:
        body = {"prompt": "a film", **more}
        return str(post(f"{address}/completions", body).json()["choices"][0]["text"])

    chance = {"temperature": 2.0, "top_p": 0.9}
    assert text(seed=1, **chance) == text(seed=1, **chance) != text(seed=2, **chance)
    assert text(seed=1, **chance).strip() == used.generate("a film", seed=1, **chance)
    assert text(**chance) != text(**chance), "without a seed, answers differ"
    greedy = text()
    assert text(stop=greedy[3:5]) == greedy[: greedy.find(greedy[3:5])]
    made = post(f"{address}/completions", {"prompt": "a film", "stop": [greedy[3:5], "x"]}).json()
    assert made["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("pieces", "stops", "wanted"),
    [
        (["ab", "cd"], (), ["ab", "cd"]),
        (["a", "b", "c", "d"], ("bc",), ["a"]),
        (["a", "b", "x"], ("bc",), ["a", "bx"]),
        (["ab", "ab"], ("abc", "bb"), ["ab", "ab"]),
        (["one\n", "\ntwo"], ("\n\n",), ["one"]),
        (["xyz"], ("z", "y"), ["x"]),
        (["stop"], ("stop",), []),
    ],
)
def test_nothing_of_a_stop_is_given_out(
    pieces: list[str], stops: tuple[str, ...], wanted: list[str]
) -> None:
    given = UpTo(pieces, stops)
    assert list(given) == wanted
    assert given.stopped == ("".join(wanted) != "".join(pieces))


def test_errors_are_of_openais_form(server: Any) -> None:
    _, address = server
    chat, completions = f"{address}/chat/completions", f"{address}/completions"
    for answer, status, why in (
        (post(completions, {}), 400, "prompt: Field required"),
        (post(completions, {"prompt": [1, 2]}), 400, "prompt"),
        (post(completions, {"prompt": "a", "n": 2}), 400, "n: Input should be 1"),
        (post(completions, {"prompt": "a", "max_tokens": 0}), 400, "max_tokens"),
        (post(completions, {"prompt": "a", "temperature": -1}), 400, "temperature"),
        (post(completions, {"prompt": "a", "top_p": 0}), 400, "top_p"),
        (post(completions, b"{"), 400, "Invalid JSON"),
        (post(completions, {"prompt": "long " * 500}), 400, "more than 128 tokens"),
        (post(chat, {"messages": []}), 400, "messages"),
        (post(chat, {"messages": [{"role": "me", "content": "a"}]}), 400, "messages.0.role"),
        (post(chat, {"messages": QUESTION, "tools": [{}]}), 400, "tools"),
        (post(completions, {"prompt": "a"}, **{"content-type": "text/plain"}), 415, "json"),
        (post(completions, b" " * (MOST_BODY_BYTES + 1)), 413, "1,048,576 bytes"),
        (post(completions, {"prompt": "a"}, host="evil.example:8000"), 403, "--api-key"),
        (http.get(f"{address}/models/other"), 404, "this is writer"),
        (http.get(f"{address}/nothing"), 404, "GET /v1/nothing"),
        (http.get(chat), 405, "GET"),
    ):
        error = answer.json()["error"]
        assert answer.status_code == status and why in error["message"], error
        assert set(error) == {"message", "type", "param", "code"}


def test_a_conversation_in_parts_loses_its_oldest_turns_where_it_is_too_long(server: Any) -> None:
    used, address = server
    turns = [{"role": "user", "content": f"film number {i} is warm"} for i in range(30)]
    parts = [
        {
            **turn,
            "content": [
                {"type": "text", "text": t} for t in (turn["content"][:4], turn["content"][4:])
            ],
        }
        for turn in turns
    ]
    made = post(f"{address}/chat/completions", {"messages": parts}).json()
    assert made["choices"][0]["message"]["content"] == "".join(used.write(turns))
    assert made["usage"]["prompt_tokens"] <= 128


def test_only_who_has_the_key_is_answered(writer: Path) -> None:
    with served(writer, "secret") as (_, address):
        refused = http.get(f"{address}/models")
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"
        assert post(f"{address}/completions", {"prompt": "a"}).status_code == 401
        assert client(address, "secret").models.list().data[0].id == "writer"
        named = {"authorization": "Bearer secret", "host": "my-board.local"}
        assert http.get(f"{address}/models", headers=named).status_code == 200


@pytest.mark.parametrize("train", ["lowrank", "lowrank+probe"])
def test_a_run_that_tells_labels_apart_answers_with_a_label(
    bench: Bench, train: str, tmp_path: Path
) -> None:
    run_of(bench, tmp_path / "run", train=train, **LARGE)
    with served(tmp_path / "run") as (used, address):
        (wanted,) = used.predict(["film 3 is grim"])
        del wanted["row"]
        rows = ["film 3 is grim", '{"text": "film 3 is grim"}']
        made = post(f"{address}/completions", {"prompt": rows}).json()
        for choice in made["choices"]:
            assert choice["text"] == wanted["label"] and choice["edgezo"] == wanted
        assert made["usage"]["prompt_tokens"] > 8 and made["usage"]["completion_tokens"] == 0
        turn = {"role": "user", "content": rows[0]}
        made = client(address).chat.completions.create(model="run", messages=[turn])
        assert made.choices[0].message.content == wanted["label"]
        refused = post(f"{address}/completions", {"prompt": '{"other": "film"}'})
        assert refused.status_code == 400 and "text" in refused.json()["error"]["message"]


def test_the_line_is_bounded_and_a_request_without_room_is_refused(
    writer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with package.load(writer, max_new_tokens=MOST) as used:
        desk, ends = Desk(used), list[Any]()
        for _ in range(MOST_WAITING):
            desk.add(Job(CompletionQuestion(prompt="a"), ends.append))
        with pytest.raises(Refused, match="ask again later") as refused:
            desk.add(Job(CompletionQuestion(prompt="a"), ends.append))
        assert refused.value.status == 429
        desk.close()
        desk.work()
        assert [end.status for end in ends] == [503] * MOST_WAITING, "everybody gets an end"
        with pytest.raises(Refused, match="ending"):
            desk.add(Job(CompletionQuestion(prompt="a"), ends.append))

        def full(*args: Any, **more: Any) -> None:
            raise DoesNotFit("more than --max-mem")

        desk, ends = Desk(used), []
        monkeypatch.setattr(used.guard, "check", full)
        desk.add(Job(CompletionQuestion(prompt="a"), ends.append))
        desk._line.put(None)
        desk.work()
        assert [(end.status, end.code) for end in ends] == [(503, "memory")]


def test_an_answer_that_nobody_waits_for_ends(writer: Path) -> None:
    with package.load(writer, max_new_tokens=MOST) as used:
        desk, parts = Desk(used), list[Any]()
        job = Job(CompletionQuestion(prompt="a film"), parts.append)
        job.give = lambda part: (parts.append(part), job.gone.set())
        desk.add(job)
        desk._line.put(None)
        desk.work()
        assert len(parts) == 1 and desk.answered == 0


@pytest.fixture
def serve_until(edgezo: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The command; a thread asks ``then`` at its address, and then comes Ctrl-C."""

    def command(*arguments: object, then: Callable[[str], None]) -> Any:
        threads = []

        def note(text: str) -> None:
            if (match := re.search(r"answers at (\S+)", text)) is not None:
                threads.append(threading.Thread(target=ask, args=(match[1],)))
                threads[0].start()

        def ask(address: str) -> None:
            try:
                then(address)
            finally:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr("edgezo.cli.serve.note", note)
        made = edgezo("serve", *arguments, "--port", 0)
        for thread in threads:
            thread.join()
        return made

    return command


def test_the_command_answers_until_ctrl_c(writer: Path, serve_until: Any) -> None:
    answers = []

    def then(address: str) -> None:
        body = {"prompt": "a film", "max_tokens": 3}
        answers.append(post(f"{address}/completions", body).json()["choices"][0]["text"])

    code, out, err = serve_until(writer, "--max-new-tokens", 4, "--json", then=then)
    assert code == 0, err
    made = json.loads(out)
    assert made["answered"] == 1 and made["model"] == str(writer)
    with package.load(writer, max_new_tokens=4) as used:
        assert answers == ["".join(used.write("a film", 3))]


def test_other_machines_are_answered_only_with_a_key(writer: Path, edgezo: Any) -> None:
    code, out, err = edgezo("serve", writer, "--host", "0.0.0.0")
    assert code == 2 and "--api-key" in err and out == ""


def test_a_port_that_is_taken_is_named(writer: Path, edgezo: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = edgezo("serve", writer, "--port", port)
    assert code == 1 and f"127.0.0.1 port {port}" in err and "another --port" in err


def test_what_is_missing_is_named_with_its_command(
    writer: Path, edgezo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "edgezo.run.http_server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, err = edgezo("serve", writer)
    assert code == 1 and "needs uvicorn: pip install 'edgezo[serve]'" in err
