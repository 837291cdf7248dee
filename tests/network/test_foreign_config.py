"""A foreign config chooses no code: only fields of the architecture are believed, and no package is asked for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from conftest import Bench
from fuzz.readers import HOSTILE_FIELDS
from transformers import AutoConfig, AutoTokenizer

from edgezo.errors import EdgezoError
from edgezo.network.foreign_config import CONFIG_FIELDS, build_config, read_config
from edgezo.network.loader import FAMILIES, load_tokenizer, open_model

# Configs as they are published, with all that they say beside the architecture.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "smollm2": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "hidden_size": 576,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536,
        "is_llama_config": True,
        "max_position_embeddings": 8192,
        "num_attention_heads": 9,
        "num_hidden_layers": 30,
        "num_key_value_heads": 3,
        "pretraining_tp": 1,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers.js_config": {"dtype": "q4"},
        "vocab_size": 49152,
    },
    "llama 3.2": {
        "model_type": "llama",
        "eos_token_id": [128001, 128008, 128009],
        "head_dim": 64,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "vocab_size": 128256,
    },
    "qwen2.5 with windows": {
        "model_type": "qwen2",
        "hidden_size": 896,
        "num_hidden_layers": 4,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_window_layers": 2,
        "sliding_window": 32768,
        "use_sliding_window": True,
    },
    "gemma 2": {
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
    "gemma 3": {
        "model_type": "gemma3",
        "mm_tokens_per_image": 256,
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152},
    },
    "phi 3 of long texts": {
        "model_type": "phi3",
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {
            "long_factor": [1.07] * 48,
            "short_factor": [1.1] * 48,
            "type": "longrope",
        },
    },
    "opt": {"model_type": "opt", "prefix": "</s>", "activation_dropout": 0.0, "ffn_dim": 3072},
    "gpt2": {
        "model_type": "gpt2",
        "n_ctx": 1024,
        "summary_type": "cls_index",
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "roberta": {"model_type": "roberta", "max_position_embeddings": 514, "type_vocab_size": 1},
}
# What a config object has that is not of the architecture.
_BESIDE = {
    *("architectures", "dtype", "transformers_version", "_name_or_path", "id2label", "label2id"),
    *("auto_map", "is_llama_config", "rope_interleaved", "transformers.js_config", "prefix"),
    *("activation_dropout", "task_specific_params", "n_ctx", "cache_implementation"),
}


def architecture(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in _BESIDE}


def write_config(folder: Path, values: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder / "config.json"


@pytest.mark.parametrize("name", _PUBLISHED)
def test_a_published_config_says_what_it_says_to_transformers(name: str, tmp_path: Path) -> None:
    file = write_config(tmp_path, _PUBLISHED[name])
    theirs = AutoConfig.from_pretrained(str(tmp_path))
    theirs = theirs.text_config if theirs.model_type == "gemma3" else theirs
    ours = read_config(file)
    assert type(ours) is type(theirs) and architecture(ours) == architecture(theirs)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_family_has_a_list_that_is_enough_for_it(family: str, tmp_path: Path) -> None:
    tiny_models.make(family, tmp_path)
    theirs = AutoConfig.from_pretrained(str(tmp_path))
    assert architecture(read_config(tmp_path / "config.json")) == architecture(theirs)
    assert set(CONFIG_FIELDS) == set(FAMILIES)


# Fields that are refused, because what they ask for is not what edgezo would compute.
REFUSED = {
    *("hidden_act", "rope_scaling", "model_type", "quantization_config"),
}


@pytest.mark.parametrize("field", sorted(HOSTILE_FIELDS))
def test_a_field_that_chooses_code_is_left_out_or_refused(
    field: str, bench: Bench, tmp_path: Path
) -> None:
    sound = json.loads((bench.model / "config.json").read_text())
    changed = sound | {field: HOSTILE_FIELDS[field]}
    if field in REFUSED:
        with pytest.raises(EdgezoError):
            build_config(changed, tmp_path)
        return
    config = build_config(changed, tmp_path)
    assert config.to_dict() == build_config(sound, tmp_path).to_dict()
    assert config._attn_implementation is None and not hasattr(config, "quantization_config")


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "xielu"},
        {"rope_scaling": {"rope_type": "evil"}},
        {"rope_parameters": {"rope_type": "default", "import": "evil"}},
        {"rope_scaling": {"type": "linear", "factor": {"a": 1}}},
        {"partial_rotary_factor": 1e9},
        {"hidden_size": True},
        {"hidden_size": 1e400},
        {"eos_token_id": [[1]]},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"quantization_config": "bitsandbytes"},
    ],
)
def test_a_field_that_is_not_of_its_kind_is_refused(
    changes: dict[str, Any], bench: Bench, tmp_path: Path
) -> None:
    sound = json.loads((bench.model / "config.json").read_text())
    with pytest.raises(EdgezoError):
        build_config(sound | changes, tmp_path)


def test_a_field_that_a_newer_class_knows_is_refused_unless_it_has_its_default(
    tmp_path: Path,
) -> None:
    sound = {"model_type": "gpt2"}
    build_config(sound | {"add_cross_attention": False}, tmp_path)
    with pytest.raises(EdgezoError, match="add_cross_attention, which edgezo does not know"):
        build_config(sound | {"add_cross_attention": True}, tmp_path)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("hidden_size", 1 << 20),
        ("vocab_size", 1 << 30),
        ("intermediate_size", 10**9),
        ("num_hidden_layers", 10**8),
        ("head_dim", 10**9),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 10**6),
        ("num_hidden_layers", 0),
    ],
)
def test_a_size_that_no_tensor_has_is_refused_before_anything_of_it_is_made(
    name: str, size: int, bench: Bench, tmp_path: Path
) -> None:
    shutil.copytree(bench.model, tmp_path / "model")
    values = json.loads((bench.model / "config.json").read_text())
    write_config(tmp_path / "model", values | {name: size})
    with pytest.raises(EdgezoError, match=r"no tensor has that size|cannot be read|valid config"):
        open_model(tmp_path / "model")


def test_a_table_of_positions_that_is_not_there_is_refused(tmp_path: Path) -> None:
    model = tiny_models.make("gpt2", tmp_path / "model")
    values = json.loads((model / "config.json").read_text())
    write_config(
        model, values | {"n_positions": tiny_models.VOCAB}
    )  # an axis, but of another table
    with pytest.raises(EdgezoError, match="a table of 300 positions"):
        open_model(model)


def test_a_key_that_occurs_twice_is_named(bench: Bench, tmp_path: Path) -> None:
    shutil.copytree(bench.model, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(file.read_text().replace("{", '{"hidden_size": 8,', 1))
    with pytest.raises(EdgezoError, match="'hidden_size' occurs twice"):
        open_model(tmp_path / "model")


# ---------------------------------------------------------------------------------------------
# Tokenizers


def test_a_tokenizer_is_that_of_transformers(bench: Bench) -> None:
    theirs, ours = AutoTokenizer.from_pretrained(bench.model), load_tokenizer(bench.model)
    texts = ["a film", " naïve ☃ \U0001f600", "<|im_start|>user\nhi<|im_end|>"]
    assert [ours(t)["input_ids"] for t in texts] == [theirs(t)["input_ids"] for t in texts]
    assert ours.chat_template == theirs.chat_template
    assert ours.special_tokens_map == theirs.special_tokens_map | {"pad_token": theirs.eos_token}


def test_settings_of_a_tokenizer_choose_no_class_no_code_and_no_file(
    bench: Bench, tmp_path: Path
) -> None:
    sound = load_tokenizer(bench.model)
    shutil.copytree(bench.model, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    values = json.loads(file.read_text())
    (tmp_path / "model" / "evil.py").write_text(
        "raise SystemExit('code of the checkpoint was run')"
    )
    values |= {
        "auto_map": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]},
        "tokenizer_class": "evil.Tokenizer",
        "fast_tokenizer_files": ["../other/tokenizer.json"],
        "tokenizer_file": "/etc/passwd",
        "vocab_file": "/etc/passwd",
        "init_inputs": ["/etc/passwd"],
        "name_or_path": "owner/model",
        "unknown": {"a": 1},
    }
    file.write_text(json.dumps(values))
    ours = load_tokenizer(tmp_path / "model")
    assert ours("a film")["input_ids"] == sound("a film")["input_ids"]
    known = {*sound.init_kwargs, "tokenizer_file"}
    assert set(ours.init_kwargs) <= known


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"a": 1, "a": 2}', '{"chat_template": "\\ud800"}', "[" * 100_000]
)
def test_damaged_settings_of_a_tokenizer_are_an_error_of_edgezo(
    content: str, bench: Bench, tmp_path: Path
) -> None:
    shutil.copytree(bench.model, tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text(content)
    with pytest.raises(EdgezoError):
        load_tokenizer(tmp_path / "model")


# ---------------------------------------------------------------------------------------------
# Packages that a config could reach

# Each ends the process when it is imported. kernels is imported by transformers itself: it ends the process when it is
# asked for a kernel.
PACKAGES = (
    *("flash_attn", "flash_attn_3", "flash_attn_interface", "hub_kernels", "bitsandbytes", "xielu"),
    *(
        "auto_gptq",
        "gptqmodel",
        "awq",
        "aqlm",
        "eetq",
        "compressed_tensors",
        "evil",
        "fla",
        "natten",
    ),
    *("xformers", "deepspeed", "triton_kernels", "causal_conv1d", "mamba_ssm", "fugashi"),
)
ASKED = 97
KERNELS = f"""
import os, sys
def _fails(name):
    def asked(*args, **more):
        sys.stderr.write(f"kernels.{{name}} was asked for {{args}}\\n")
        sys.stderr.flush()
        os._exit({ASKED})
    return asked
class Anything:
    def __init__(self, *args, **more): pass
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    if "kernel_" in name or name == "register_kernel_mapping" or name == "use_kernelized_func":
        return (lambda *args, **more: None) if name.startswith("reg") else lambda *a, **b: lambda f: f
    return _fails(name) if name[0].islower() else Anything
"""
TRIES = """
import json, shutil, sys
from pathlib import Path
from fuzz.readers import HOSTILE_FIELDS
from edgezo.errors import EdgezoError
from edgezo.network import loader
from edgezo.plan.request import make_config
from edgezo.run.train import finetune

settings, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
sound = json.loads((folder / "config.json").read_text())
accepted = []
for field, value in HOSTILE_FIELDS.items():
    (folder / "config.json").write_text(json.dumps(sound | {field: value}))
    try:
        loader.build_meta(loader.open_model(folder))
        loader.load_tokenizer(folder)
        accepted.append(field)
    except EdgezoError:
        pass
hostile = {field: HOSTILE_FIELDS[field] for field in accepted}
(folder / "config.json").write_text(json.dumps(sound | hostile))
summary = finetune(make_config(settings))
print(json.dumps([len(accepted), summary["steps"]]))
"""


@pytest.fixture(scope="module")
def traps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages that are installed, as far as anybody can tell, and end the process that uses them."""
    folder = tmp_path_factory.mktemp("traps")
    for name in PACKAGES:
        (folder / name).mkdir()
        text = f"import os, sys\nsys.stderr.write('{name} was imported\\n')\nsys.stderr.flush()\nos._exit({ASKED})\n"
        (folder / name / "__init__.py").write_text(text)
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text(KERNELS)
    # A version that the installed transformers takes.
    from transformers.utils import import_utils

    kernels = getattr(import_utils, "KERNELS_MIN_VERSION", "0.12.0")
    for name, version in ((name, "2.9") for name in PACKAGES):
        _describe(folder, name, version)
    _describe(folder, "kernels", kernels)
    return folder


def _describe(folder: Path, name: str, version: str) -> None:
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def python(traps: Path, code: str, *args: str) -> subprocess.CompletedProcess[str]:
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(traps), str(tests), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("field", ["attn_implementation", "hidden_act"])
def test_the_traps_close_on_whoever_believes_a_config(
    field: str, traps: Path, bench: Bench, tmp_path: Path
) -> None:
    shutil.copytree(bench.model, tmp_path / "model")
    values = json.loads((bench.model / "config.json").read_text())
    write_config(tmp_path / "model", values | {field: HOSTILE_FIELDS[field]})
    code = (
        "import sys; from transformers import AutoConfig, AutoModelForCausalLM\n"
        "AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1]))"
    )
    done = python(traps, code, str(tmp_path / "model"))
    assert done.returncode == ASKED, done.stderr


def test_hostile_configs_load_and_step_without_asking_any_package(
    traps: Path, bench: Bench, tmp_path: Path
) -> None:
    shutil.copytree(bench.model, tmp_path / "model")
    settings = bench.settings(
        "label", model=str(tmp_path / "model"), steps=1, out=str(tmp_path / "run")
    )
    done = python(traps, TRIES, json.dumps(settings), str(tmp_path / "model"))
    assert done.returncode == 0, done.stderr
    accepted, steps = json.loads(done.stdout.splitlines()[-1])
    assert (accepted, steps) == (len(HOSTILE_FIELDS) - len(REFUSED), 1)
