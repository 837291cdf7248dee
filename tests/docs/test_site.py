"""The site builds without a warning and without the network, and names only what there is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import click
import pytest
from pages import ROOT, inline, links, pages

FOLDERS = ("edgezo", "tests", "docs", "scripts", "benchmarks", "models")
# Attributes by which a page makes a reader's browser fetch something.
FETCHED = {
    ("link", "href"),
    ("script", "src"),
    ("img", "src"),
    ("iframe", "src"),
    ("source", "src"),
    ("object", "data"),
    ("image", "href"),
    ("use", "href"),
}
# Options on the pages that are not edgezo's.
OTHER_PROGRAMS = {
    *("--strict", "--max-restarts", "--nnodes", "--logdir"),
    *("--run-config", "--node-config", "--insecure", "--enable-supernode-auth"),  # Flower's
}


def all_options() -> set[str]:
    """Options of every command, and of the scripts in benchmarks/ and scripts/fleet/."""
    from edgezo.cli.main import cli

    names: set[str] = set()

    def collect(command: click.Command) -> None:
        names.update(name for p in command.params for name in (*p.opts, *p.secondary_opts))
        for below in getattr(command, "commands", {}).values():
            collect(below)

    collect(cli)
    for script in [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "scripts/fleet").glob("*.py")]:
        names.update(
            re.findall(r'add_argument\(\s*"(--[\w-]+)"', script.read_text(encoding="utf-8"))
        )
    return {*names, "--help"}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = [
        link
        for link in links(page)
        if not link.startswith("#")
        and not (page.parent / link.partition("#")[0]).exists()
        and not (page.parent == ROOT / "docs" and (ROOT / link.partition("#")[0]).exists())
    ]
    assert not broken, f"{page.name}: {broken}"


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_paths_and_options_that_a_page_names_are_there(page: Path) -> None:
    paths, options = [], []
    known = all_options() | OTHER_PROGRAMS
    for text in inline(page):
        if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./-]*", text) and not (ROOT / text).exists():
            paths.append(text)
        options += [
            word for word in re.findall(r"(?<![\w-])--[a-z][\w-]*", text) if word not in known
        ]
    assert not paths, f"{page.name} names {paths}, which are not there"
    assert not options, f"{page.name} names {options}, which no command has"


def test_every_threat_names_tests_that_there_are() -> None:
    lines = (ROOT / "SECURITY.md").read_text(encoding="utf-8").splitlines()
    rows = [
        line.split(" | ") for line in lines if line.startswith("| ") and "| tests |" not in line
    ]
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(rows) > 15
    for row in rows:
        names = re.findall(r"`((?:tests/|test_)[\w/.]+)`", row[-1])
        assert names, row
        for name in names:
            there = (ROOT / name).exists() if "/" in name else f"def {name}(" in code
            assert there, f"{name} is no test"


def test_every_preset_is_on_the_page_of_methods() -> None:
    from edgezo.zo.presets import FIRST_ORDER, PRESETS

    text = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `([\w-]+)` \| (.*) \|$", text, re.M))
    for name, preset in PRESETS.items():
        for word in (preset.paper, preset.directions, preset.credit, "+".join(preset.train)):
            assert word in table[name], f"{name}: {word}"
    for name, row in FIRST_ORDER.items():
        assert f"`{name}` ({row.paper})" in text, name


def test_every_task_is_on_the_page_of_data() -> None:
    from edgezo.data.tasks import TASKS

    named = {text for text in inline(ROOT / "docs/data.md")}
    assert set(TASKS) <= named | {"example"} and any("--task example" in text for text in named)


def test_every_option_of_finetune_is_on_the_page_of_options() -> None:
    from edgezo.cli.main import cli

    text = (ROOT / "docs/options.md").read_text(encoding="utf-8")
    options = {name for p in cli.commands["finetune"].params for name in p.opts if name[:2] == "--"}
    assert not {name for name in options - {"--help"} if not re.search(rf"{name}(?![\w-])", text)}


# ------------------------------------------------------------------------------------- the site


class Fetched(HTMLParser):
    """What a page makes a browser fetch by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.places += [value or "" for name, value in attrs if (tag, name) in FETCHED]
        self.places += re.findall(r"url\(([^)]*)\)", dict(attrs).get("style") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="scripts/docs installs what the site takes")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert not re.search("warning|error", said, re.I), said
    return folder


def test_every_page_is_in_the_navigation(site: Path) -> None:
    navigation = (site / "index.html").read_text(encoding="utf-8").split('class="md-content"')[0]
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix(".html").as_posix()
        assert f'href="{name}"' in navigation, name


def test_a_reader_fetches_nothing_from_elsewhere(site: Path) -> None:
    built = list(site.rglob("*.html"))
    assert built
    for page in built:
        parser = Fetched()
        parser.feed(page.read_text(encoding="utf-8"))
        away = [place for place in parser.places if re.match(r"\s*['\"]?(\w+:)?//", place)]
        assert not away, f"{page.name}: {away}"
    for sheet in [*site.rglob("*.css"), *site.rglob("*.svg")]:
        text = sheet.read_text(encoding="utf-8")
        assert not re.search(r"(url\(|@import|(xlink:)?href=)\s*['\"]?https?://", text), sheet.name


def test_figures_are_text_and_follow_light_and_dark() -> None:
    for figure in (ROOT / "docs/figures").glob("*.svg"):
        text = figure.read_text(encoding="utf-8")
        assert "prefers-color-scheme" in text and text.count("<text") > 5, figure.name
        assert len(text) < 100_000, f"{figure.name} has {len(text)} bytes"
