"""Mistakes that users make on the command line and in settings files: each message names the way out.

What is wrong with files of a model, data or a run is in test_bad_input.py.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import Bench
from hypothesis import given
from hypothesis import strategies as st
from test_bad_input import assert_one_screen, flat

from edgezo.machine.foreign_yaml import parse_yaml
from edgezo.plan.request import make_config
from edgezo.run.train import finetune

pytestmark = pytest.mark.usefixtures("one_thread")


class Mistake(NamedTuple):
    """A command line; {ok} stands for a sound request, {run} for a finished run, {dir} for a folder."""

    code: int
    line: str
    names: str  # what the message says, a regular expression: the mistake and the way out


MISTAKES = {
    # sizes and times
    "a size without a unit": Mistake(2, "finetune {ok} --max-mem 2000", "did you mean 2000MB"),
    "gigabytes without a unit": Mistake(2, "finetune {ok} --max-mem 2", "did you mean 2GB"),
    "a size with a comma": Mistake(2, "finetune {ok} --max-mem 1,5GB", "1,5GB.*12GB"),
    "a size below zero": Mistake(2, "finetune {ok} --max-mem -2GB", "-2GB.*12GB"),
    "no memory": Mistake(2, "finetune {ok} --max-mem 0", "less than one byte.*12GB"),
    "a share of the memory": Mistake(2, "finetune {ok} --max-mem 50%", "50%.*700MB"),
    "an unknown unit": Mistake(2, "finetune {ok} --max-mem 2XB", "2XB.*12GB"),
    "a time of an unknown unit": Mistake(2, "finetune {timed} --for 2x", "2x.*1h30m"),
    "a time that may be minutes": Mistake(2, "finetune {timed} --for 1h30", "1h30.*1h30m"),
    "a time as a clock shows it": Mistake(2, "finetune {timed} --for 1:30", "1:30.*10m"),
    "a time below zero": Mistake(2, "finetune {timed} --for -5m", "-5m.*10m"),
    "no time": Mistake(2, "finetune {timed} --for 0", "--for: must be above 0"),
    "units in a wrong order": Mistake(2, "finetune {timed} --for 5m1h", "5m1h.*1h30m"),
    # numbers
    "no steps": Mistake(2, "finetune {ok} --steps 0", "--steps: must be at least 1"),
    "half a step": Mistake(2, "finetune {ok} --steps 1.5", "--steps: needs a whole number"),
    "steps in words": Mistake(2, "finetune {ok} --steps many", "--steps: needs a number, not 'many'"),
    "steps and time": Mistake(2, "finetune {ok} --for 5m", "--steps and --for exclude each other"),
    "an absurd step": Mistake(2, "finetune {ok} --step 1000", "--step: must be at most 100"),
    "a step below zero": Mistake(2, "finetune {ok} --step -1", "--step: must be above 0"),
    "a step that is no number": Mistake(2, "finetune {ok} --step nan", "--step: needs a finite number"),
    "an absurd sigma": Mistake(2, "finetune {ok} --sigma 2", "--sigma: must be at most 1"),
    "no threads": Mistake(2, "finetune {ok} --threads 0", "--threads: must be at least 1"),
    "threads in words": Mistake(2, "finetune {ok} --threads two", "--threads: needs a number, not 'two'"),
    "an empty batch": Mistake(2, "finetune {ok} --batch-size 0", "--batch-size: must be at least 1"),
    "a huge batch": Mistake(2, "finetune {ok} --batch-size 100000", "--batch-size: must be at most 1024"),
    "a micro-batch above the batch": Mistake(2, "finetune {ok} --micro-batch 8", "more than --batch-size 4"),
    "too short rows": Mistake(2, "finetune {ok} --max-length 4", "--max-length: must be at least 8"),
    "more than all rows held out": Mistake(2, "finetune {ok} --held-out 2", "--held-out: must be at most 0.9"),
    "a seed below zero": Mistake(2, "finetune {ok} --seed -1", "--seed: must be at least 0"),
    "an absurd rank": Mistake(2, "finetune {ok} --rank 4096", "--rank: must be at most 256"),
    "blocks below zero": Mistake(2, "finetune {ok} --blocks -1", "--blocks: must be at least 1"),
    "blocks in words": Mistake(2, "finetune {ok} --blocks ten", "--blocks: needs a number"),
    "an absurd rate": Mistake(2, "finetune {ok} --head-lr 1e6", "--head-lr: must be at most 1000"),
    # numbers, names and paths as people write them
    "thousands with a comma": Mistake(2, "finetune {ok} --steps 1,000", "did you mean 1000"),
    "thousands with a letter": Mistake(2, "finetune {ok} --steps 1k", "did you mean 1000"),
    "a decimal comma": Mistake(2, "finetune {ok} --step 0,1", r"did you mean 0\.1"),
    "a share in percent": Mistake(2, "finetune {ok} --held-out 10%", r"did you mean 0\.1"),
    "a share above one": Mistake(2, "finetune {ok} --held-out 10", "at most 0.9"),
    "a limit in words": Mistake(2, "finetune {ok} --eval-limit none", "a number or all"),
    "more blocks than there are": Mistake(2, "finetune {ok} --blocks 500", "Give 1 to 1, or all"),
    "a size in two words": Mistake(2, "finetune {ok} --max-mem 2 GB", "--max-mem 2GB"),
    "a time in two words": Mistake(2, "finetune {timed} --for 5 min", "--for 5min"),
    "a template without quotes": Mistake(2, "finetune {ok} --template {{text}} was", "in quotes"),
    "a choice in capitals": Mistake(2, "finetune {ok} --precision FP32", "did you mean 'fp32'"),
    "an estimator in capitals": Mistake(2, "finetune {ok} --estimator LoRA", "choices; did you mean 'lora'"),
    "one dash": Mistake(2, "finetune {ok} -steps 4", "two dashes: --steps"),
    "an underscore": Mistake(2, "finetune {ok} --max_length 64", "Did you mean '--max-length'"),
    "a model without its option": Mistake(2, "finetune {model} --data x.jsonl", "Did you mean --model"),
    "rows without their option": Mistake(2, "finetune rows.csv --model {model}", "Did you mean --data rows.csv"),
    "a model's address": Mistake(1, "plan --model https://huggingface.co/a/b", "Did you mean a/b"),
    "a folder without a model": Mistake(1, "finetune {ok} --model {dir}/empty", "Give the folder that has"),
    "a file of the model": Mistake(1, "finetune {ok} --model {model}/model.safetensors", "the model's directory"),
    "an address of rows": Mistake(2, "finetune {ok} --data https://a.org/rows.csv", "download the file"),
    "rows misspelt": Mistake(2, "finetune {ok} --data {dir}/row.csv", r"did you mean \S+rows.csv"),
    "rows of nothing": Mistake(2, "finetune {ok} --data {dir}/nothing.jsonl", "nothing.jsonl is empty"),
    "rows of a header": Mistake(2, "finetune {ok} --data {dir}/header.csv", "no rows in"),
    "a list named as lines": Mistake(2, "finetune {ok} --data {dir}/list.jsonl", "rename the file to list.json"),
    "rows in Latin-1": Mistake(2, "finetune {ok} --data {dir}/latin.csv", "save it as UTF-8"),
    "rows in UTF-16": Mistake(2, "finetune {ok} --data {dir}/utf16.csv", "save it as UTF-8"),
    "blank labels": Mistake(2, "finetune {ok} --data {dir}/blank.csv", "--skip-bad-rows"),
    "two kinds of rows": Mistake(2, "finetune {ok} --data {dir}/mixed.jsonl", "it has: prompt, completion"),
    "a task misspelt": Mistake(2, "finetune --model {model} --task exmaple", "did you mean 'example'"),
    "a task without its folder": Mistake(2, "finetune --model {model} --task sst2", "--data-root"),
    "a field misspelt": Mistake(2, "finetune {ok} --template '{{txt}} was'", "the rows have: label, text"),
    "labels with colons": Mistake(2, "finetune {ok} --labels 0:bad,1:good", "as in 0=bad,1=good"),
    "one label": Mistake(2, "finetune {ok} --labels 0=bad", "two or more"),
    "a word twice": Mistake(2, "finetune {ok} --labels 0=bad,1=bad", "give each another word"),
    "a label too few": Mistake(2, "finetune {ok} --labels 0=bad,2=good", "none of 0, 2"),
    "a run in place of a file": Mistake(1, "finetune {ok} --out {dir}/notes.txt", "a run needs a directory"),
    "a run that is not there": Mistake(2, "eval --model {dir}/none", "no run .*none here.*edgezo runs"),
    "a page about what is not there": Mistake(2, "report {dir}/none", "edgezo runs lists"),
    "a page about a model": Mistake(2, "report {model}", "no directory that edgezo made"),
    "a run removed that is not there": Mistake(2, "rm {dir}/none --yes", "edgezo runs lists"),
    "a folder of yours removed": Mistake(2, "rm {dir}/mine --yes", "Nothing was changed"),
    "more steps of nothing": Mistake(2, "finetune {ok} --more-steps 5", "--model RUN"),
    "an existing file of predictions": Mistake(2, "predict {run} {rows} --out {dir}/notes.txt", "exists"),
    "an existing export": Mistake(2, "export {run} --out {dir}/mine", "is there already"),
    "a type of another form": Mistake(2, "export {run} --format hf --dtype q8_0 --out {dir}/x", "--format gguf"),
    # manners
    "an unknown time of day": Mistake(2, "finetune {ok} --when night", "always, idle, plugged-in"),
    "half a name": Mistake(2, "finetune {ok} --when plugged", "did you mean 'plugged-in'"),
    "an absurd temperature": Mistake(2, "finetune {ok} --max-temp 500", "--max-temp: must be at most 120"),
    "a temperature in words": Mistake(2, "finetune {ok} --max-temp hot", "--max-temp: needs a number"),
    "no CPU": Mistake(2, "finetune {ok} --max-cpu 0", "--max-cpu: must be at least 1"),
    "more than the CPU": Mistake(2, "finetune {ok} --max-cpu 400", "--max-cpu: must be at most 100"),
    # choices
    "an unknown precision": Mistake(2, "finetune {ok} --precision int3", "bf16, fp16, int8, int4"),
    "a precision by another name": Mistake(2, "finetune {ok} --precision 4bit", "int8, int4"),
    "an unknown device": Mistake(2, "finetune {ok} --device gpu", "auto, cpu, cuda"),
    "an unknown estimator": Mistake(2, "finetune {ok} --estimator sgd", "grzo.*mezo"),
    "an estimator misspelt": Mistake(2, "finetune {ok} --estimator mezzo", "did you mean 'mezo'"),
    "a part misspelt": Mistake(2, "finetune {ok} --train lowrnak", "did you mean 'lowrank'"),
    "parts joined by a comma": Mistake(2, "finetune {ok} --train lowrank,head", r"join by \+"),
    "an unknown objective": Mistake(2, "finetune {ok} --objective acuracy", "accuracy, exact-match"),
    "a rank of nothing": Mistake(2, "finetune {ok} --train full --rank 4", "--rank has no effect"),
    "an unused finetuner": Mistake(2, "finetune {ok} --finetuner f", "only --mask block"),
    # names of options, commands and settings
    "an option misspelt": Mistake(2, "finetune {ok} --stpes 5", "Did you mean .*--steps"),
    "a command misspelt": Mistake(2, "fintune", "Did you mean 'finetune'"),
    "an option without its value": Mistake(2, "finetune {ok} --seed", "'--seed' requires an argument"),
    "a word too much": Mistake(2, "finetune {ok} now", "unexpected extra argument"),
    "a setting misspelt": Mistake(2, "finetune {ok} --config {dir}/typo.toml", "'max_men'; did you mean 'max_mem'"),
    "a size without a unit in a file": Mistake(2, "finetune {ok} --config {dir}/size.toml", "did you mean 2000MB"),
    "a setting of another type": Mistake(2, "finetune {ok} --config {dir}/type.toml", "--seed: needs a number"),
    "settings that are no TOML": Mistake(2, "finetune {ok} --config {dir}/broken.toml", "is not valid TOML.*line 1"),
    "settings that are not there": Mistake(2, "finetune {ok} --config {dir}/none.toml", "none.toml: No such file"),
    "settings that are a folder": Mistake(2, "finetune {ok} --config {dir}", "no regular file"),
    "a setting misspelt in YAML": Mistake(2, "finetune {ok} --config {dir}/typo.yaml", "did you mean 'steps'"),
    "a setting twice in YAML": Mistake(2, "finetune {ok} --config {dir}/twice.yaml", "'seed' occurs twice"),
    "an alias in YAML": Mistake(2, "finetune {ok} --config {dir}/alias.yaml", "write it out"),
    "an object in YAML": Mistake(2, "finetune {ok} --config {dir}/object.yaml", "line 1: .* makes an object"),
    "a list as YAML": Mistake(2, "finetune {ok} --config {dir}/list.yaml", "write one on each line"),
    "settings that are no YAML": Mistake(2, "finetune {ok} --config {dir}/broken.yml", "YAML: line 2: expected"),
    # what is missing, and what excludes each other
    "nothing": Mistake(2, "finetune", "--model is missing.*edgezo models.*--data or --task is missing"),
    "data and a task": Mistake(2, "finetune {ok} --task example", "--data and --task exclude each other"),
    "a root without a task": Mistake(2, "finetune {ok} --data-root {dir}", "--data-root .*--task"),
    "a plan of nothing": Mistake(2, "plan", "--model is missing"),
    "an evaluation of nothing": Mistake(2, "eval", "--model is missing"),
    "a resume of nothing": Mistake(2, "finetune --resume", "--resume needs --out RUN"),
    "a resume of an empty folder": Mistake(2, "finetune --resume --out {dir}/empty", "nothing to resume"),
    "a resume with other steps": Mistake(2, "finetune --resume --out {run} --steps 12", "--steps was 3"),
    "a run over a run": Mistake(2, "finetune {ok} --out {run}", "already holds a run.*--resume.*another --out"),
    "a run over a folder of yours": Mistake(2, "finetune {ok} --out {dir}/mine", "mine"),
    # rows
    "a template without braces": Mistake(2, "finetune {ok} --template plain", "plain.*{"),
    "a template that does not close": Mistake(2, "finetune {ok} --template '{{text'", "template"),
    "labels without values": Mistake(2, "finetune {ok} --labels good,bad", "0=bad,1=good|VALUE=WORD|value=word"),
    "another label field": Mistake(2, "finetune {ok} --label-field klass", "klass"),
    "rows as a spreadsheet": Mistake(2, "finetune {ok} --data {dir}/rows.xlsx", "save the table as CSV"),
    "rows as plain text": Mistake(2, "finetune {ok} --data {dir}/notes.txt", "jsonl"),
    "a folder without rows": Mistake(2, "finetune {ok} --data {dir}/empty", "train"),
    "a table without the label": Mistake(2, "finetune {ok} --data {dir}/rows.csv", "label"),
    # the other commands
    "a cap below the least": Mistake(3, "plan --model {model} --max-mem 30MB", r"--max-mem \d+MB"),
    "a model misspelt": Mistake(1, "plan --model smollm2-135m-instrct", "smollm2-135m-instruct"),
    "an evaluation of what is not there": Mistake(1, "eval --model {dir}/none {rows}", "none"),
    "a replay of what is not there": Mistake(1, "replay {dir}/none --out {dir}/copy", "none"),
    "a replay to nowhere": Mistake(2, "replay {run}", "--out"),
    "an unknown form": Mistake(2, "export {run} --format safetensors --out {dir}/x", "'hf', 'peft', 'gguf'"),
    "an unknown type": Mistake(2, "export {run} --dtype q4 --out {dir}/x", "'q8_0'"),
    "an export of what is not there": Mistake(1, "export {dir}/none --out {dir}/x", "none"),
    "predictions of nothing": Mistake(2, "predict {run}", "--data"),
    "predictions of what is not there": Mistake(2, "predict {run} --data {dir}/none.jsonl", "none.jsonl"),
    "predictions in an unknown form": Mistake(2, "predict {run} --data {dir}/other.jsonl --to xml", "'jsonl', 'csv'"),
    "predictions of other rows": Mistake(2, "predict {run} --data {dir}/other.jsonl", "text"),
    "a chat with a classifier": Mistake(2, "chat {run}", "edgezo predict"),
    "a comparison with no base": Mistake(2, "chat {model} --compare", "--compare MODEL"),
    "a server for everybody": Mistake(2, "serve {run} --host 0.0.0.0", "--api-key"),
    "a port that there is not": Mistake(2, "serve {run} --port 99999", "99999"),
    "a probe of one block that nothing fits": Mistake(
        2, "finetune {ok} --train lowrank --probe-reads one --out {dir}/x", "--train probe"
    ),
    "a temperature below zero": Mistake(2, "chat {model} --temperature -1", "temperature"),
    "an unknown shell": Mistake(2, "completion tcsh", "'bash', 'zsh', 'fish'"),
    "a doctor of something": Mistake(2, "doctor disk", "unexpected extra argument"),
    "tokens in words": Mistake(2, "bench memory --model {model} --tokens few", "--tokens 'few'.*4,16,64"),
    "a benchmark without a unit": Mistake(2, "bench memory --model {model} --max-mem 900", "did you mean 900MB"),
    "a shipped run that is none": Mistake(1, "apply {dir}/notes.txt --base {model} --out {dir}/x", "notes.txt"),
    "a finetuner that is not there": Mistake(1, "convert-finetuner {dir}/none.pth {dir}/x.safetensors", "none.pth"),
    "a finetuner of no tasks": Mistake(2, "meta-train --model {model} --out {dir}/f.safetensors", "--task|--data"),
}  # fmt: skip

FILES = {
    "typo.toml": 'max-men = "2GB"\n',
    "size.toml": "max-mem = 2000\n",
    "type.toml": 'seed = "one"\n',
    "broken.toml": "seed = \n",
    "typo.yaml": "step_s: 5\n",
    "twice.yaml": "seed: 1\nseed: 2\n",
    "alias.yaml": "template: &one '{text} It was'\nlabels: *one\n",
    "object.yaml": "seed: !!python/object/apply:os.system ['true']\n",
    "list.yaml": "- seed\n",
    "broken.yml": "seed: [1\n",
    "notes.txt": "a note\n",
    "rows.csv": "text,mark\na film,1\na book,0\n",
    "mine/diary.txt": "dear diary\n",
    "nothing.jsonl": "",
    "header.csv": "text,label\n",
    "list.jsonl": '[{"text": "a film", "label": 1}, {"text": "a book", "label": 0}]',
    "blank.csv": "text,label\na film,1\na book,\n",
    "mixed.jsonl": '{"text": "a film", "label": 1}\n{"prompt": "a", "completion": "b"}\n',
    "other.jsonl": json.dumps({"question": "what?"}) + "\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that are not what they ought to be."""
    folder = tmp_path_factory.mktemp("given")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "empty").mkdir()
    (folder / "rows.xlsx").write_bytes(b"PK\x03\x04" + bytes(100))
    for encoding in ("latin1", "utf16"):
        name = f"{encoding.removesuffix('1')}.csv"
        (folder / name).write_bytes("text,label\na caf\xe9,1\na bar,0\n".encode(encoding))
    return folder


@pytest.fixture(scope="module")
def run(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("finished") / "run"
    finetune(make_config(bench.settings(out=str(out), train="scales")))
    return out


def words(line: str, bench: Bench, folder: Path, run: Path) -> list[str]:
    """The arguments of a command line of the table."""
    places = {"dir": folder, "run": run, "model": bench.model}
    places |= {
        "ok": shlex.join(bench.arguments()),
        "timed": shlex.join(bench.arguments(steps=None)),
    }
    places |= {"rows": shlex.join(["--data", str(bench.data / "label.jsonl")])}
    return shlex.split(line.format(**places))


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_the_way_out_and_leaves_nothing(
    name, bench, folder, run, edgezo, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\n")))  # of a chat
    mistake = MISTAKES[name]
    before = sorted(folder.rglob("*"))
    code, out, err = edgezo(*words(mistake.line, bench, folder, run))
    assert code == mistake.code, err
    if "Error: " in err:  # click's
        assert out == "" and "Traceback" not in err
    else:
        assert_one_screen(out, err)
    assert re.search(mistake.names, flat(err)), err
    assert sorted(folder.rglob("*")) == before and not list(tmp_path.iterdir())


def test_there_are_many_and_json_has_them_too(
    bench, folder, run, edgezo_json, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    assert len(MISTAKES) >= 140
    for name in ("a size without a unit", "a setting misspelt in YAML", "a command misspelt"):
        mistake = MISTAKES[name]
        code, found = edgezo_json(*words(mistake.line, bench, folder, run))
        assert code == found["exit_code"] == mistake.code and re.search(
            mistake.names, found["error"]
        )


# What is allowed and hardly meant: (more arguments, what is said).
DOUBTFUL = [
    ("--threads 64", "--threads 64, but .* cores can be used"),
    ("--max-length 100000", r"--max-length 100000 is beyond the \d+ tokens"),
    ("--step 60", "--step 60 is 600 times the usual 0.1"),
    ("--sigma 0.5", "--sigma 0.5 .* about --sigma 0.002"),
    ("--estimator lora --train lora --step 1", "--step 1 is .* times the usual"),
]


@pytest.mark.parametrize(("more", "names"), DOUBTFUL)
def test_a_doubtful_value_is_named_and_let_through(more, names, bench, folder, run, edgezo):
    code, out, err = edgezo(*words(f"finetune {{ok}} --dry-run {more}", bench, folder, run))
    assert code == 0 and out and re.search("warning: " + names, flat(err)), err
    code, _, err = edgezo(*words("finetune {ok} --dry-run", bench, folder, run))
    assert code == 0 and "warning" not in err


@pytest.mark.parametrize("text", ["2min", "2m", "120s", "120", "0.5 min 90s", "2 Minutes"])
def test_times_are_read_as_people_write_them(text):
    assert make_config({"model": "m", "task": "example", "for": text}).for_s == 120


def test_settings_in_yaml_are_those_in_toml(tmp_path):
    from edgezo.plan.request import read_settings

    (tmp_path / "a.yaml").write_text(
        "# mine\nmodel: m\ndata: rows.jsonl\nfor: 1h30m\nstep: 1e-3\nseed: 7\nprofile: true\n"
        "text-end: no\nrank: null\ntrain: [lowrank, head]\nlabels: '0=no,1=yes'\n"
    )
    (tmp_path / "a.toml").write_text(
        'model = "m"\ndata = "rows.jsonl"\nfor = "1h30m"\nstep = 1e-3\nseed = 7\nprofile = true\n'
        'text-end = "no"\ntrain = ["lowrank", "head"]\nlabels = "0=no,1=yes"\n'
    )
    yaml, toml = (make_config(read_settings(tmp_path / f"a.{kind}")) for kind in ("yaml", "toml"))
    assert yaml == toml and yaml.for_s == 5400 and yaml.text_end == "no"


@given(st.text(max_size=40) | st.text("-:[]{}&*!'\"\n #ab1?|>", max_size=40))
def test_yaml_is_read_or_refused_but_never_crashes(text):
    try:
        assert isinstance(parse_yaml(text), dict)
    except ValueError as error:
        assert str(error)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_a_script_and_completions(shell, edgezo, monkeypatch, capsys):
    from edgezo.cli import main as cli

    code, out, _ = edgezo("completion", shell)
    assert code == 0 and "_EDGEZO_COMPLETE" in out and f"{shell}_complete" in out
    for line, offered in (
        ("edgezo fine", "finetune"),
        ("edgezo finetune --when pl", "plugged-in"),
        ("edgezo finetune --model smollm2-1", "smollm2-135m-instruct"),
    ):
        begun = line.split()
        monkeypatch.setenv("_EDGEZO_COMPLETE", f"{shell}_complete")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", begun[-1] if shell == "fish" else str(len(begun) - 1))
        capsys.readouterr()
        with pytest.raises(SystemExit):
            cli.run([])
        assert offered in capsys.readouterr().out
