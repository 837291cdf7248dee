"""docs/options.md and docs/settings-sample.toml are what the table of settings makes of them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from edgezo.cli.main import cli
from edgezo.cli.option_pages import options_page, settings_sample, write
from edgezo.plan.fields import FIELDS, SET_BY_RUN, flag
from edgezo.plan.request import make_config, read_layer

DOCS = Path(__file__).parents[2] / "docs"
SETTINGS = [name for name in FIELDS if name not in SET_BY_RUN]


@pytest.mark.parametrize("name", ["options.md", "settings-sample.toml"])
def test_a_page_is_up_to_date(name, tmp_path):
    write(tmp_path)
    written, wanted = (DOCS / name).read_text("utf-8"), (tmp_path / name).read_text("utf-8")
    assert written == wanted, "run: python -m edgezo.cli.option_pages docs/"


def uncommented() -> str:
    """The sample with every setting in force."""
    return re.sub(r"(?m)^#(?=\w)", "", settings_sample())


def test_the_sample_sets_nothing_until_a_setting_is_uncommented():
    assert tomllib.loads(settings_sample()) == {}
    layer, problems = tomllib.loads(uncommented()), []
    values = read_layer(layer, problems)
    assert not problems and list(values) == SETTINGS


def test_values_of_the_sample_are_the_defaults_where_there_are_any():
    values = read_layer(tomllib.loads(uncommented()), [])
    defaults = make_config({"model": values["model"]}, need_data=False).to_dict()
    for name, value in defaults.items():
        if name in SETTINGS and value is not None:
            assert values[name] == (tuple(value) if name == "train" else value), name


def test_finetune_has_an_option_for_every_setting_and_the_page_an_entry():
    page = options_page()
    options = {p.name: p.opts for p in cli.commands["finetune"].params}
    for name in SETTINGS:
        assert options[name] == [flag(name)]
        assert re.search(rf"(?m)^### `{flag(name)}\b", page), name
