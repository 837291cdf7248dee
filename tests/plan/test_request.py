"""Requests: merging, validation, and the two written forms."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgezo.errors import UsageError
from edgezo.plan import fields
from edgezo.plan import request as config
from edgezo.plan.config import RunConfig
from edgezo.plan.field import parse_duration
from edgezo.plan.fields import FIELDS, GROUPS
from edgezo.plan.request import from_toml, make_config
from edgezo.zo import presets
from edgezo.zo.presets import PRESETS

BASE = {"model": "m", "task": "sst2"}
# The order of the settings in config.toml, and what a journal's header holds for BASE.
ORDER = (
    "model data task data_root template labels label_field max_mem_bytes steps for_s estimator directions mask credit "
    "rule train blocks states state_rows precision rounding residency device engine provider rank keep refresh "
    "candidates samples finetuner short_tokens short_lr batch_size micro_batch max_length objective max_new_tokens "
    "step step_auto sigma schedule weight_decay weight_decay_to head_lr held_out seed eval_every eval_limit "
    "snapshot_every threads when max_temp max_cpu log_to profile out text_end written_at began_in speaker "
    "skip_bad_rows row_rules probe_reads parent parent_steps parent_sha256 eval_rows"
).split()
CANONICAL = (
    '{"batch_size":null,"began_in":null,"blocks":"all","candidates":8,"credit":"group","data":null,"data_root":null,'
    '"device":"auto","directions":"signs","engine":"torch","estimator":"default","eval_every":0,"eval_limit":null,"eval_rows":null,'
    '"finetuner":null,"for_s":null,"head_lr":2.0,"held_out":null,"keep":0.25,"label_field":"label",'
    '"labels":null,"log_to":"none","mask":"none","max_cpu":null,"max_length":512,"max_mem_bytes":null,"max_new_tokens":null,"max_temp":null,'
    '"micro_batch":null,"model":"m","objective":"loss","out":null,"parent":null,"parent_sha256":null,"parent_steps":0,'
    '"precision":null,"probe_reads":"five","profile":false,"provider":"cpu",'
    '"rank":8,"refresh":50,"residency":null,"rounding":null,"row_rules":2,"rule":"sgd","samples":1,"schedule":"linear",'
    '"seed":0,"short_lr":0.0001,"short_tokens":null,"sigma":0.002,"skip_bad_rows":false,"snapshot_every":25,"speaker":null,"state_rows":null,'
    '"states":null,"step":0.1,'
    '"step_auto":false,"steps":400,"task":"sst2","template":null,"text_end":"yes","threads":null,"train":["lowrank",'
    '"head","probe"],"weight_decay":0.0,"weight_decay_to":"zero","when":"always","written_at":null}'
)


def problems_of(*layers: dict, **options: bool) -> str:
    with pytest.raises(UsageError) as caught:
        make_config(*layers, **options)
    return "\n".join(caught.value.problems)


TYPES = {"int": int, "bytes": int, "float": float, "duration": float, "bool": bool}


def test_every_setting_of_a_request_is_in_the_table_with_its_type():
    """A setting may be None where it has no default and no preset decides it."""
    hints = get_type_hints(RunConfig)
    assert set(FIELDS) == set(hints)
    for name, field in FIELDS.items():
        kind = tuple[str, ...] if field.kind == "train" else TYPES.get(field.kind, str)
        optional = field.default is None and not (field.required or field.of_preset)
        assert hints[name] == (kind | None if optional else kind), name
    assert fields.flag("max_mem_bytes") == "--max-mem"
    assert fields.flag("micro_batch") == "--micro-batch"


def test_every_setting_but_what_a_run_writes_is_shown_once_with_help_and_a_value():
    shown = [field for group in GROUPS.values() for field in group.fields]
    assert [field.name for field in shown] == [
        name for name in FIELDS if name not in fields.SET_BY_RUN
    ]
    for field in shown:
        assert field.help[-1] in ".)", field.name
        value = field.example if field.usual is None else field.usual
        assert field.read(value) is not None, field.name


def test_a_configuration_stands_in_journals_letter_by_letter():
    assert list(make_config(BASE).to_dict()) == ORDER
    assert make_config(BASE).canonical_json() == CANONICAL


def test_defaults_train_low_rank_factors_and_the_head_by_grzo_with_signs():
    cfg = make_config(BASE)
    assert (cfg.estimator, cfg.directions) == ("default", "signs")
    assert cfg.train == ("lowrank", "head", "probe")
    assert cfg.steps == fields.DEFAULT_STEPS
    assert cfg.precision is None and cfg.batch_size is None and cfg.max_mem_bytes is None


def of_estimator(name: str) -> dict[str, str]:
    """A request that names an estimator alone."""
    file = {"finetuner": "f"} if name in PRESETS and PRESETS[name].mask == "block" else {}
    return {**BASE, "estimator": name, **file}


PARTS_OF = {
    **dict.fromkeys(PRESETS, ("lowrank",)),
    **dict.fromkeys(("qzo", "qzo-grzo"), ("scales",)),
    **dict.fromkeys(
        (
            *("vote", "qes", "lozo", "lozo-m", "lo-grzo", "lo-grzo-strict", "zo-muon", "subzero"),
            *("sparse-mezo", "sparse-grzo", "quzo", "qu-grzo", "agzo", "ag-grzo"),
            *("zo-finetuner", "zo-finetuner-grzo"),
        ),
        ("full",),
    ),
    "lora": ("lora",),
    "addax": ("lowrank",),
}


@pytest.mark.parametrize("name", presets.ESTIMATORS)
def test_an_estimator_that_is_named_alone_trains_its_own_parts_and_no_readout(name):
    cfg = make_config(of_estimator(name))
    assert cfg.train == PARTS_OF[name] == presets.preset_of(name).train
    assert not cfg.parts.readout and not cfg.parts.head
    below = make_config({}, of_estimator(name), {"rank": 4})
    assert below.train == cfg.train
    assert from_toml(cfg.to_toml()) == config.completed(cfg.to_dict()) == cfg


def test_where_nothing_is_named_the_default_is_trained_and_it_can_be_named():
    cfg, grzo = make_config(BASE), PRESETS[presets.DEFAULT_PRESET]
    assert cfg == make_config({**BASE, "estimator": "default"})
    assert cfg.train == presets.DEFAULT_TRAIN == ("lowrank", "head", "probe")
    for name in fields.OF_PRESET:
        assert name == "train" or getattr(cfg, name) == getattr(grzo, name), name
    scored = make_config({**BASE, "objective": "accuracy"})
    assert (scored.estimator, scored.train) == ("default", ("lowrank",))


@pytest.mark.parametrize("name", [None, "default", "grzo", "mezo", "fzoo", "lozo", "addax"])
@pytest.mark.parametrize("train", ["lowrank", "lowrank+head", "lowrank+head+probe", "probe"])
def test_train_overrides_what_an_estimator_and_the_default_train(name, train):
    asked = {**BASE, "estimator": name, "train": train}
    if name == "addax" and train not in ("lowrank", "lowrank+head"):
        assert "it trains lowrank, or lowrank+head" in problems_of(asked)
        return
    for layers in ((asked,), ({"train": train}, {**BASE, "estimator": name})):
        assert "+".join(make_config(*layers).train) == train


@pytest.mark.parametrize("estimator", ["grzo", "mezo", "addax"])
def test_a_journal_of_an_earlier_version_keeps_the_parts_that_it_records(estimator):
    parts = ["lowrank", "head"] if estimator == "addax" else ["lowrank", "head", "probe"]
    saved = {**make_config(of_estimator(estimator)).to_dict(), "train": parts}
    assert config.completed(saved).to_dict() == saved
    assert config.as_estimator(config.completed(saved), "default").train == presets.DEFAULT_TRAIN


@pytest.mark.parametrize("name", PRESETS)
def test_every_row_of_the_table_is_a_request_that_means_something(name):
    row, base = PRESETS[name], {**BASE, "estimator": name}
    base |= {"finetuner": "f"} if row.mask == "block" else {}
    cfg = make_config(base)
    for field in fields.OF_PRESET:
        assert getattr(cfg, field) == getattr(row, field)
    of_matrices = row.mask == "sparse" or presets.DIRECTIONS[row.directions].guided
    other = {} if of_matrices else {"train": "scales+norms"}
    assert make_config({}, {**base, **other}).estimator == name


def test_choices_by_hand_make_the_row_that_has_a_name():
    by_hand = {"directions": "shared", "credit": "mean", "train": "lowrank"}
    cfg, mezo = make_config({**BASE, **by_hand}), make_config({**BASE, "estimator": "mezo"})
    for field in fields.OF_PRESET:
        assert getattr(cfg, field) == getattr(mezo, field)


def test_a_configuration_of_an_earlier_version_is_completed_by_its_row():
    saved = make_config({**BASE, "estimator": "mezo"}).to_dict()
    new = ("mask", "credit", "rule", "keep", "refresh", "candidates")
    old = {k: v for k, v in saved.items() if k not in new}
    assert config.completed(old).to_dict() == saved
    assert make_config({}, old).to_dict() == saved


def test_higher_layers_win_and_none_means_not_said():
    cfg = make_config({**BASE, "rank": None, "seed": 3}, {"rank": 4, "seed": 5}, {"rank": 16})
    assert (cfg.rank, cfg.seed) == (4, 3)


def test_a_higher_layer_replaces_the_lower_layers_alternative():
    cfg = make_config({"model": "m", "data": "d.jsonl", "for_s": "90s"}, {"task": "x", "steps": 5})
    assert (cfg.data, cfg.task, cfg.steps, cfg.for_s) == ("d.jsonl", None, None, 90.0)


def test_all_problems_are_reported_together():
    text = problems_of(
        {"data": "d", "task": "t", "steps": "zero", "sigma": -1, "precision": "int3", "modle": "m"}
    )
    for part in (
        "--model is missing",
        "exclude each other",
        "--steps",
        "--sigma",
        "int3",
        "'model'",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"directions": "shared"}, "one direction per example"),
        ({"estimator": "mezo", "directions": "signs"}, "one direction for the whole batch"),
        ({"credit": "mean"}, "one direction for the whole batch"),
        (
            {"estimator": "mezo", "credit": "group"},
            "--credit group: the credit compares one direction",
        ),
        ({"mask": "sparse"}, "--train full"),
        ({"mask": "quantized"}, "use --directions gaussian or shared"),
        ({"mask": "hessian"}, "along one direction of the whole batch"),
        ({"rule": "centred"}, "two halves of ZO-AdaMU"),
        ({"directions": "lowrank", "rule": "adam"}, "second moments cannot follow"),
        ({"keep": 0.5}, "no effect"),
        ({"refresh": 5}, "no effect"),
        ({"candidates": 5}, "no effect"),
        ({"train": "full", "rule": "adam", "residency": "disk"}, "beside the weights"),
        ({"train": "full", "precision": "int4"}, "codes are frozen"),
        (
            {"estimator": "quzo", "precision": "int8", "rounding": "plane"},
            "use --rounding stochastic",
        ),
        ({"train": "full", "precision": "bf16", "rounding": "anchored"}, "needs --precision int8"),
        ({"train": "full", "precision": "int8", "residency": "disk"}, "stay in memory"),
        (
            {"train": "full", "precision": "int8", "rounding": "anchored", "rule": "momentum"},
            "state of --rule momentum",
        ),
        (
            {"estimator": "agzo", "precision": "int8", "rounding": "anchored"},
            "--directions activation-shared are not in the journal",
        ),
        (
            {"estimator": "quzo", "precision": "int8", "rounding": "anchored"},
            "depends on the codes",
        ),
        ({"train": "full+lowrank"}, "already hold"),
        ({"train": "full", "rounding": "plane", "precision": "fp32"}, "exact"),
        ({"rounding": "plane"}, "--train full"),
        ({"batch_size": 4, "micro_batch": 8}, "more than --batch-size 4"),
        ({"steps": 5, "for_s": 5}, "exclude each other"),
        ({"train": "head", "sigma": 0.01}, "perturbs nothing"),
        ({"train": "full", "rank": 4}, "no effect"),
        ({"train": "lowrank", "head_lr": 0.01}, "no effect"),
        ({"train": "lowrank+tail"}, "'tail' is not one of"),
        ({"max_mem_bytes": "12 bananas"}, "--max-mem"),
        ({"seed": 1.5}, "whole number"),
        ({"profile": "yes"}, "true or false"),
        ({"step": "nan"}, "finite"),
        ({"step": 10**400}, "--step: needs a finite number"),
        ({"steps": -(10**400)}, "--steps: needs a whole number"),
        ({"max_mem_bytes": 10**400}, "needs a whole number"),
    ],
)
def test_meaningless_requests_are_refused_with_the_reason(asked, reason):
    assert reason in problems_of({**BASE, **asked})


def test_a_choice_by_hand_beside_auto_is_refused_with_the_reason():
    for axis in ({"directions": "shared"}, {"credit": "mean"}):
        (name,) = axis
        text = problems_of({**BASE, "estimator": "auto", **axis})
        assert f"--{name} has no effect here: --estimator auto decides it" in text


def test_two_roundings_are_for_a_plane_below_dense_weights_too():
    asked = {**BASE, "estimator": "quzo", "precision": "bf16", "rounding": "plane"}
    # What such a run's own file says when it is resumed.
    assert make_config(asked).rounding == "plane"


def test_what_a_lower_layer_says_in_vain_is_ignored():
    assert make_config({**BASE, "train": "full"}, {"rank": 4}).train == ("full",)


def test_parts_to_train_have_one_order_and_no_repeats():
    assert make_config({**BASE, "train": "head+lowrank+head"}).train == ("lowrank", "head")


def test_a_plan_needs_no_data_but_a_model():
    assert make_config({"model": "m"}, need_data=False).task is None
    assert "--data or --task" in problems_of({"model": "m"})


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("120s", 120), ("1.5 m", 90), (" 2h", 7200), (".5s", 0.5)]
)
def test_durations_are_read_as_people_write_them(text, seconds):
    assert parse_duration(text) == seconds


@given(st.text(max_size=12))
def test_a_duration_is_read_or_refused_but_never_crashes(text):
    try:
        assert parse_duration(text) >= 0
    except ValueError as error:
        assert "120s" in str(error)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 2**63 - 1),
            "steps": st.integers(1, 10**6),
            "rank": st.integers(1, 256),
            "sigma": st.floats(1e-9, 1.0),
            "step": st.floats(1e-12, 100),
            "weight_decay": st.floats(0, 1),
            "batch_size": st.integers(1, 1024),
            "template": st.text(min_size=1).filter(str.strip),
            "max_mem_bytes": st.integers(1, 10**15),
            "threads": st.integers(1, 64),
        },
    )
)
def test_a_request_survives_toml_and_its_json_is_canonical(asked):
    cfg = make_config({}, {**BASE, **asked})
    assert from_toml(cfg.to_toml()) == cfg
    text = cfg.canonical_json()
    assert list(json.loads(text)) == sorted(FIELDS)
    assert from_toml(cfg.to_toml()).canonical_json() == text


def test_a_file_may_use_the_flags_spelling():
    layer = config.parse_toml('model = "m"\ntask = "t"\nmax-mem = "2GB"\nfor = "10m"', "x")
    cfg = make_config({}, layer)
    assert (cfg.max_mem_bytes, cfg.for_s) == (2_000_000_000, 600.0)


def test_a_file_that_is_no_toml_is_named_with_the_place(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("model = \n")
    with pytest.raises(UsageError, match=r"a\.toml is not valid TOML.*line 1"):
        config.read_settings(path)
    with pytest.raises(UsageError, match="no_such"):
        config.read_settings(tmp_path / "no_such.toml")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="UTF-8"):
        config.read_settings(path)


def test_config_planner_and_footprint_import_nothing_heavy():
    code = (
        "import sys, edgezo.plan.request, edgezo.plan.planner, edgezo.plan.footprint\n"
        "bad = {'torch', 'transformers', 'psutil', 'click', 'numpy', 'rich'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
