"""A fine-tune as one small file, and the base with it: ``edgezo export --format journal`` and ``edgezo apply``.

The file is a zip archive, nothing in it compressed, of the files of a run that its weights can be made from:

    edgezo.json            what it is: format, base and its SHA-256, steps, the digest of the trained weights
    config.toml            the settings of the run
    journal.bin            a record for each step
    probe.safetensors      the linear probe, where there is one
    head.safetensors       what no seed can rebuild, where there is any: the exact head, for example
    parent/...             the same of the run that it goes on from, where there is one (parent.py)

Anybody with the base makes the fine-tuned model of it, bit for bit. The file is checked when it is written, by making
the weights, and again when it is applied.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgezo.errors import EdgezoError, UsageError
from edgezo.machine.files import atomic_path, atomic_write, to_json, user_path
from edgezo.machine.foreign import MOST_CONFIG_BYTES, parse_json, reading
from edgezo.machine.open_files import files_inside
from edgezo.machine.ownership import check_new_file
from edgezo.plan.config import RunConfig
from edgezo.run.directory import PARENT_NAMES, RunFiles
from edgezo.run.evaluate import brought_back, replay
from edgezo.run.summary import check_same_end, takes_roots
from edgezo.run.summary_file import saved_summary, unfinished
from edgezo.weights.saved import saved_sha256

FORMAT, KIND = 1, "edgezo fine-tune"
_MANIFEST = "edgezo.json"
_NOT_SHIPPED: dict[str, Any] = {"out": None, "began_in": None, "threads": None, "profile": False}
_AS_OF = (1980, 1, 1, 0, 0, 0)  # the time that entries have: the same run gives the same file
_ASK_AGAIN = "Ask for the file again: edgezo export RUN --format journal makes it."


def ship(run: RunFiles, cfg: RunConfig, out: Path) -> dict[str, Any]:
    """Write run ``run``, as it stands now, to the new file ``out``. Raises EdgezoError for a run that is damaged."""
    check_new_file(out)
    with brought_back(run, cfg) as rebuilt:
        digest = saved_sha256(rebuilt.model.saved())
        if saved_summary(run).get("steps") == rebuilt.steps and not takes_roots(cfg):
            check_same_end(run, cfg, rebuilt.model, digest)
        about: dict[str, Any] = {
            "kind": KIND,
            "format": FORMAT,
            "base": cfg.model if not user_path(cfg.model).exists() else Path(cfg.model).name,
            "base_sha256": rebuilt.planned.opened.files.content_hash,
            "run_id": rebuilt.of_run,
            "steps": rebuilt.steps,
            "trained": list(cfg.train),
            "trained_sha256": digest,
        }
    entries = {
        _MANIFEST: (to_json(about) + "\n").encode(),
        run.config.name: replace(cfg, **_NOT_SHIPPED).to_toml().encode(),
        **{name: file.read_bytes() for name, file in _shipped_files(run).items()},
    }
    with atomic_path(out, lock=True) as temporary:
        with zipfile.ZipFile(temporary, "x", zipfile.ZIP_STORED) as archive:
            for name, data in entries.items():
                archive.writestr(zipfile.ZipInfo(name, _AS_OF), data)
    return {
        **about,
        "out": str(out),
        "run": str(run.path),
        "size_bytes": out.stat().st_size,
        "notes": unfinished(run, cfg, about["steps"]),
    }


def _shipped_files(run: RunFiles) -> dict[str, Path]:
    """The files of a run that are shipped, by their names in the archive, beside its configuration."""
    files = {file.name: file for file in (run.journal, run.probe, run.snapshot) if file.exists()}
    of_parent = sorted(files_inside(run.parent.path, PARENT_NAMES))
    return files | {f"{run.parent.path.name}/{n}": run.parent.path / n for n in of_parent}


def _may_ship(name: str) -> bool:
    """Whether a shipped file may have an entry of this name."""
    run = RunFiles(Path())
    if name in (_MANIFEST, *(str(f) for f in (run.config, run.journal, run.probe, run.snapshot))):
        return True
    folder, _, inside = name.rpartition("/")
    return folder == run.parent.path.name and PARENT_NAMES.fullmatch(inside) is not None


def apply(file: Path, base: str, out: Path) -> dict[str, Any]:
    """Make the weights of a shipped fine-tune over the model ``base``; ``out`` becomes what ``edgezo replay`` writes.

    Raises EdgezoError for a file that is damaged or none of edgezo's, BaseMismatch for another base.
    """
    entries = _entries(file)
    about = _about(file, entries)
    with tempfile.TemporaryDirectory(prefix="edgezo-apply-") as folder, _naming(file, folder):
        run = RunFiles(Path(folder))
        for name, data in entries.items():
            if name != _MANIFEST:
                (run.path / name).parent.mkdir(exist_ok=True)
                atomic_write(run.path / name, data)
        path = user_path(base)
        cfg = replace(run.read_config(), model=str(path.resolve()) if path.exists() else base)
        atomic_write(run.config, cfg.to_toml().encode())

        def check(digest: str) -> None:
            if digest != about["trained_sha256"] and not takes_roots(cfg):
                raise EdgezoError(
                    f"{file} gives other weights than it was made from: their digest is {digest[:12]}..., and the file "
                    f"says {about['trained_sha256'][:12]}... It was changed. {_ASK_AGAIN}"
                )

        result = replay(run.path, out, check)
    result |= {"run": str(file), "base": base}
    atomic_write(out / "replay.json", (to_json(result) + "\n").encode())
    return result


@contextmanager
def _naming(file: Path, folder: str) -> Iterator[None]:
    """Inside, an error about a file in ``folder``, where ``file`` is unpacked, names ``file``."""
    try:
        yield
    except EdgezoError as problem:
        shown = str(problem).replace(f"{folder}/", f"{file}: ").replace(folder, str(file))
        problem.args = (shown,)
        if isinstance(problem, UsageError):
            problem.problems = (shown,)
        raise


def _entries(file: Path) -> dict[str, bytes]:
    """The files in a shipped one, by name. Nothing is written to disk, and no name in it leads anywhere."""
    if not file.is_file():
        raise UsageError(f"there is no file {file}")
    with reading(file, _ASK_AGAIN, any_kind=True), zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        names = [info.filename for info in infos]
        if len(set(names)) != len(names) or not all(map(_may_ship, names)):
            raise EdgezoError(
                f"{file} is an archive of other files than a fine-tune has. {_ASK_AGAIN}"
            )
        size = file.stat().st_size
        if any(i.compress_type != zipfile.ZIP_STORED or i.file_size > size for i in infos):
            raise EdgezoError(
                f"{file} is compressed, which edgezo writes no fine-tune as. {_ASK_AGAIN}"
            )
        return {info.filename: archive.read(info) for info in infos}


def _about(file: Path, entries: Mapping[str, bytes]) -> dict[str, Any]:
    """What a file says of itself. Raises EdgezoError for another kind of file or format."""
    with reading(f"{file}: {_MANIFEST}", _ASK_AGAIN):
        raw = entries[_MANIFEST]
        if len(raw) > MOST_CONFIG_BYTES:
            raise ValueError("it is too large")
        about = parse_json(raw.decode("utf-8"))
        if about["kind"] != KIND or not isinstance(about["trained_sha256"], str):
            raise ValueError("it is no fine-tune")
        if about["format"] != FORMAT:
            raise EdgezoError(
                f"{file} has the format {json.dumps(about['format'])}, and this version reads {FORMAT}. "
                "Update edgezo."
            )
        return dict(about)
