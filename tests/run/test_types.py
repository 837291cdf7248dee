"""A user's script over the Python API passes mypy --strict, and one that uses it wrongly does not."""

from __future__ import annotations

from pathlib import Path

import pytest

import edgezo

ROOT = Path(edgezo.__file__).parents[1]
# As where edgezo is installed, problems of its own modules are not those of a script. What the large libraries declare
# is left out, so that the test takes seconds.
SETTINGS = """
[mypy]
strict = true
mypy_path = {root}
cache_dir = {root}/.mypy_cache/scripts
follow_imports = silent
[mypy-torch.*,transformers.*,rich.*,onnx.*,tokenizers.*,safetensors.*,accelerate.*,huggingface_hub.*,click.*,jinja2.*]
follow_imports = skip
"""
SCRIPT = '''
"""A user's script."""

from collections.abc import Iterator
from pathlib import Path

import edgezo
from edgezo.errors import DoesNotFit
from edgezo.run.progress import Silent


class Quiet(Silent):
    def note(self, text: str) -> None:
        print(text)


def rows() -> Iterator[dict[str, str | int]]:
    yield {"text": "a warm film", "label": 1}


def main(model: str) -> float:
    cfg: edgezo.RunConfig = edgezo.make_config({"model": model, "task": "example"})
    old = edgezo.finetune(cfg, progress=Quiet())
    try:
        run: edgezo.Run = edgezo.finetune(
            model,
            rows(),
            validation=[{"text": "a cold film", "label": 0}],
            labels={0: "bad", 1: "good"},
            template="{text} It was",
            max_mem="900MB",
            steps=60,
            batch_size=8,
        )
    except DoesNotFit as problem:
        raise SystemExit(str(problem)) from None
    figures: dict[str, object] = run.evaluate(Path("rows.jsonl"))
    labels: list[str] = [str(answer["label"]) for answer in run.predict(["a warm film"])]
    page: Path = run.report
    with edgezo.load(run, max_mem_bytes="900MB") as used:
        text: str = used.generate("The film")
    print(figures, labels, page, text, old.directory, edgezo.Run.open("runs/mine").summary)
    return float(run["eval_after"]["value"])
'''
WRONG = """
import edgezo

run = edgezo.finetune("smollm2-135m-instruct", "rows.jsonl", steps="60")
run.predikt(["a warm film"])
"""


def test_a_script_passes_strict_types_and_a_wrong_one_does_not(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    assert (ROOT / "edgezo" / "py.typed").is_file()
    (tmp_path / "mypy.ini").write_text(SETTINGS.format(root=ROOT))
    for name, text in (("script", SCRIPT), ("wrong", WRONG)):
        (tmp_path / f"{name}.py").write_text(text)
    found, problems, code = api.run(
        [
            "--config-file",
            str(tmp_path / "mypy.ini"),
            *(str(tmp_path / f"{n}.py") for n in ("script", "wrong")),
        ]
    )
    lines = found.splitlines()
    assert code == 1 and not problems and len(lines) == 3, found
    assert "wrong.py:4" in lines[0] and '"steps"' in lines[0]
    assert "wrong.py:5" in lines[1] and '"predikt"' in lines[1]
