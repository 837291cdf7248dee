"""What reads a case of the fuzz lane, and the cases of settings, rows and templates.

    gguf, safetensors, index, shards, pickled   weights and finetuners (cases.py)
    configs, tokenizers, vocabularies, toml     settings of models, tokenizers and edgezo: kinds of values, names
                                                of code, depth, keys twice
    rows                                        JSONL, JSON and CSV: the suffix of a case's name says which
    templates                                   chat templates: programs that write, count and call without end

``READERS`` has for each form what makes a case and what reads one: it returns whether the case was accepted, and raises
nothing but EdgezoError.
"""

from __future__ import annotations

import json
import random
import shutil
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from fuzz.cases import (
    INTEGERS,
    TEXTS,
    Case,
    damaged,
    gguf_case,
    index_case,
    odd,
    pickled_case,
    rarely,
    safetensors_case,
    shards_case,
    sound_model,
    written,
)

# ---------------------------------------------------------------------------------------------
# Settings

# Fields that choose code, files or machines where they are believed.
HOSTILE_FIELDS: dict[str, Any] = {
    "attn_implementation": "owner/kernel",
    "_attn_implementation": "owner/kernel",
    "_attn_implementation_internal": "owner/kernel",
    "experts_implementation": "owner/kernel",
    "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    "trust_remote_code": True,
    "torch_dtype": "hub",
    "dtype": "_dynamo",
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "kernel_config": {"RMSNorm": "owner/kernel:layer"},
    "use_kernels": True,
    "_name_or_path": "owner/model",
    "name_or_path": "/etc",
    "configuration_files": ["config.5.0.0.json"],
    "transformers_weights": "../evil.bin",
    "per_layer_config": {"0": {"hidden_size": 10**6}},
    "num_labels": 10**9,
    "id2label": {"0": "a"},
    "architectures": ["EvilModel"],
    "output_attentions": True,
    "is_decoder": True,
    "hidden_act": "xielu",
    "rope_scaling": {"rope_type": "owner/rope", "factor": 2.0},
    "text_config": {"attn_implementation": "owner/kernel"},
    "model_type": "mamba",
    "tokenizer_class": "evil.Tokenizer",
    "pruned_heads": {"0": [0]},
    "chunk_size_feed_forward": 1,
    "layer_types": ["owner/attention"],
}


def _configs(rng: random.Random) -> Case:
    values = json.loads((sound_model() / "config.json").read_text(encoding="utf-8"))
    name = rng.choice("hostile odd sizes written rope missing family".split())
    numbers = [key for key, value in values.items() if type(value) in (int, float)]
    match name:
        case "hostile":
            for key in rng.sample(sorted(HOSTILE_FIELDS), rng.choice((1, 1, 2, 6))):
                values[key] = HOSTILE_FIELDS[key]
        case "odd":
            values[rng.choice(sorted(values))] = odd(rng)
        case "sizes":
            for key in rng.sample(numbers, rng.choice((1, 2))):
                values[key] = rng.choice((*INTEGERS, -1, 10**30))
        case "written":
            return name, written(rng, values)
        case "rope":
            key = rng.choice(("rope_scaling", "rope_parameters"))
            kinds = ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "su", "evil")
            table = {"rope_type": rng.choice(kinds), rng.choice(("factor", "rope_theta")): odd(rng)}
            values[key] = rng.choice((table, {"full_attention": table}, odd(rng)))
            values["partial_rotary_factor"] = rng.choice((None, 0.5, 1e9, -1, 0))
        case "missing":
            del values[rng.choice(sorted(values))]
        case "family":
            import tiny_models

            values["model_type"] = rng.choice((*tiny_models.FAMILIES, "gemma3", "bert", 3, None))
            values["text_config"] = rng.choice((None, {}, dict(values), odd(rng)))
    return name, json.dumps(values).encode("utf-8", "surrogatepass")


def _tokenizers(rng: random.Random) -> Case:
    values = json.loads((sound_model() / "tokenizer_config.json").read_text(encoding="utf-8"))
    hostile: dict[str, Any] = {
        "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]},
        "tokenizer_class": rng.choice(("evil.T", "BertJapaneseTokenizer", "MistralCommonBackend")),
        "fast_tokenizer_files": ["tokenizer.1.0.json", "../tokenizer.json"],
        "tokenizer_file": "/etc/passwd",
        "vocab_file": "/etc/passwd",
        "init_inputs": ["/etc/passwd"],
        "tokenizer_object": "evil",
        "sp_model_kwargs": {"x": 1},
        "chat_template": rng.choice(("{{ 1", "{% for %}", [{"name": 1}], 3, "\ud800")),
        "added_tokens_decoder": {"x": {}, "0": {"content": 3}, "99999999": {"content": "<x>"}},
        "model_max_length": 10**30,
        "extra_special_tokens": {"a": {"b": "c"}},
        "fix_mistral_regex": True,
    }
    name = rng.choice("hostile odd written".split())
    if name == "hostile":
        values |= {key: hostile[key] for key in rng.sample(sorted(hostile), rng.choice((1, 2, 5)))}
    elif name == "odd":
        values[rng.choice(sorted({*values, "bos_token", "padding_side"}))] = odd(rng)
    else:
        return name, written(rng, values)
    return name, json.dumps(values).encode("utf-8", "surrogatepass")


@cache
def _sound_vocabulary() -> Any:
    return json.loads((sound_model() / "tokenizer.json").read_text(encoding="utf-8"))


def _vocabularies(rng: random.Random) -> Case:
    """tokenizer.json: what the library in Rust parses."""
    values = json.loads(json.dumps(_sound_vocabulary()))
    name = rng.choice("part model merges vocabulary added written type".split())
    model = values["model"]
    match name:
        case "part":
            values[rng.choice(sorted(values))] = odd(rng)
        case "model":
            model[rng.choice(sorted(model))] = odd(rng)
        case "merges":
            merges = model["merges"]
            wrong = (
                ["a"],
                "a",
                ["a", "b", "c"],
                ["absent", "x"],
                [],
                "",
                ["\ud800", "a"],
                merges[:1],
            )
            merges[rng.randrange(len(merges))] = rng.choice(wrong)
        case "vocabulary":
            token = rng.choice(sorted(model["vocab"]))
            model["vocab"][token] = rng.choice((*INTEGERS, -1, 3.5, "1", None))
        case "added":
            token = rng.choice(values["added_tokens"] or [{}])
            token[rng.choice(("id", "content", "special", "x"))] = odd(rng)
        case "written":
            return name, written(rng, values)
        case "type":
            place = values[rng.choice(("pre_tokenizer", "decoder", "post_processor", "model"))]
            pattern = {"Regex": rng.choice(("(a+)+$", "(?:a|a)*b", "[", "(" * 500, "\\p{L}+"))}
            more = {
                "type": rng.choice(("Split", "Sequence", "Unigram", "Evil")),
                "pattern": pattern,
            }
            if isinstance(place, dict):
                place |= more | {"behavior": "Isolated", "invert": False}
    return name, json.dumps(values).encode("utf-8", "surrogatepass")


def _toml(rng: random.Random) -> Case:
    lines = ['model = "smollm2-135m"', "steps = 3", 'task = "example"', "batch_size = 4"]
    name = rng.choice("flip depth keys dotted odd".split())
    match name:
        case "flip":
            return name, damaged(rng, "\n".join(lines).encode())
        case "depth":
            n = rarely(rng, 100_000, 10, 100, 2000)
            lines.append(rng.choice(("x = " + "[" * n, "x = " + "{a=" * n, "[" * n + "a")))
        case "keys":
            lines.append(rng.choice(lines))
        case "dotted":
            lines.append(".".join("a" * rarely(rng, 100_000, 3, 100, 2000)) + " = 1")
        case "odd":
            lines.append(f"steps2 = {json.dumps(odd(rng))}")
    return name, "\n".join(lines).encode("utf-8", "surrogatepass")


# ---------------------------------------------------------------------------------------------
# Rows and templates


def _row(rng: random.Random) -> dict[str, Any]:
    """A row of one of the kinds, at times with a field that is another thing."""
    text = rng.choice(TEXTS) + rng.choice(("a film", "", "b")) * rng.choice((1, 3, 40))
    turns = [{"role": r, "content": text} for r in ("user", "assistant") * rng.choice((1, 1, 20))]
    row = rng.choice(
        (
            {"text": text},
            {"text": text, "label": rng.choice((0, 1, "good", 1.0, True, None))},
            {"prompt": text, "completion": rng.choice(TEXTS) or "x"},
            {"prompt": text, "chosen": "a", "rejected": rng.choice(("b", "a", ""))},
            {"prompt": text, "completion": "x", "label": rng.choice((True, False, "up", 1))},
            {"messages": turns},
        )
    )
    row = dict(row)
    if rng.random() < 0.15:
        row[rng.choice(sorted(row))] = odd(rng)
    if rng.random() < 0.1:
        row[rng.choice(TEXTS)] = odd(rng)
    return row


def _rows(rng: random.Random) -> Case:
    kind = _row(rng)
    rows = [kind if rng.random() < 0.8 else _row(rng) for _ in range(rng.choice((1, 2, 5, 30)))]
    name = rng.choice("lines lines array csv damaged long many".split())
    match name:
        case "lines" | "damaged":
            data = b"\n".join(written(rng, row) for row in rows)
            return f"{name}.jsonl", damaged(rng, data) if name == "damaged" else data
        case "array":
            return f"{name}.json", written(rng, rows)
        case "csv":
            names = rng.choice(
                (("text", "label"), ("text", "text"), ("prompt", "completion"), ("",))
            )
            cells = [[rng.choice(TEXTS) for _ in names] for _ in rows]
            lines = [names, *cells]
            quoted = rng.choice((lambda c: c, lambda c: '"' + c.replace('"', '""') + '"'))
            text = rng.choice(("\n", "\r\n", "\r")).join(",".join(map(quoted, r)) for r in lines)
            data = text.encode()
            return f"{name}.csv", damaged(rng, data) if rng.random() < 0.3 else data
        case "long":
            size = rarely(rng, 300_000, 1000, 10_000)
            text = rng.choice(("a", "word ", "\U0001f600", "\n", "\u3042", "[]")) * size
            row = json.dumps({"text": text[:size]}) if rng.random() < 0.7 else "[" * size
            return f"{name}.jsonl", "\n".join([row] * 2).encode()
        case "many":
            row = rng.choice(("{}", '{"":0}', "x", "[]", '{"text":"a b"}', ""))
            return f"{name}.jsonl", f"{row}\n".encode() * rarely(rng, 20_000, 100)
    raise AssertionError(name)


def _templates(rng: random.Random) -> Case:
    n = rarely(rng, rng.choice((99_999, 10**9, 3 * 10**9)), 3, 12, 60)
    writers = (
        f"{{{{ 'x' * {n} }}}}",
        f"{{{{ [0] * {n} }}}}",
        f"{{{{ 'x'|center({n}) }}}}",
        f"{{{{ 'x'.ljust({n}) }}}}",
        f"{{{{ '%{n}d' % 1 }}}}",
        f"{{{{ '{{:{n}}}'.format(1) }}}}",
        f"{{{{ 10 ** {n} }}}}",
        f"{{{{ [1]|tojson(indent={n}) }}}}",
        f"{{{{ 'a\nb'|indent({n}) }}}}",
        f"{{% for i in range({n}) %}}{{% for j in range({n}) %}}{{% endfor %}}{{% endfor %}}",
        f"{{{{ range({n})|join('x' * {n}) }}}}",
        f"{{{{ ('x' * {min(n, 10**5)})|replace('x', 'y' * {min(n, 10**5)}) }}}}",
        "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}"
        f"{{{{ m({min(n, 9 if n < 2000 else 40)}) }}}}",
        f"{{% set ns = namespace(t='x') %}}{{% for i in range({60 if n > 60 else 12}) %}}"
        "{% set ns.t = ns.t ~ ns.t %}{% endfor %}{{ ns.t }}",
        "{{ messages[0].content.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ raise_exception('no') }}",
        "{% import 'os' as os %}",
        "{% include '/etc/passwd' %}",
        f"{{{{ lipsum({n}) }}}}",
        "{% if true %}" * min(n, 3000) + "{% endif %}" * min(n, 3000),
    )
    sound = "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
    name = rng.choice("writer writer flip joined".split())
    if name == "flip":
        return name, damaged(rng, sound.encode())
    if name == "joined":
        return name, (sound + rng.choice(writers) + rng.choice(writers)).encode()
    return name, rng.choice(writers).encode()


# ---------------------------------------------------------------------------------------------
# Readers


class FuzzReader(NamedTuple):
    """Cases of one form, and what reads one of them in a folder: whether it was accepted."""

    make: Callable[[random.Random], Case]
    read: Callable[[str, bytes, Path], bool]
    share: int  # of the cases of a long run, beside those of the other kinds


def _model_with(folder: Path, **files: bytes) -> Path:
    """The sound model's directory in ``folder``, with other files in place of some: config__json and so on."""
    model = folder / "model"
    model.mkdir(exist_ok=True)
    given = {name.replace("__", "."): data for name, data in files.items()}
    for file in sound_model().iterdir():
        place = model / file.name
        place.unlink(missing_ok=True)
        if file.name not in given:
            place.symlink_to(file)
    for name, data in given.items():
        (model / name).write_bytes(data)
    return model


def _load(path: Path) -> bool:
    """Open a model, build its module and read every tensor. Raises EdgezoError."""
    from edgezo.network import loader

    files = loader.open_model(path)
    names = loader.source_names(files, loader.build_meta(files))
    for stored in names.values():
        files.source.read(stored)
    return True


def read_gguf(name: str, data: bytes, folder: Path) -> bool:
    file = folder / "model.gguf"
    file.write_bytes(data)
    _load(file)
    if zlib.crc32(data) % 20 == 0:  # a twentieth of a second each
        from edgezo.network.loader import load_tokenizer

        load_tokenizer(file)
    return True


def read_safetensors(name: str, data: bytes, folder: Path) -> bool:
    from edgezo.weights.safetensors_file import SafetensorsSource

    (folder / "model.safetensors").write_bytes(data)
    source = SafetensorsSource(folder)
    for stored in source.names:
        source.read(stored)
        if source.shape(stored):
            source.read(stored, rows=slice(0, min(1, source.shape(stored)[0])))
    return True


def read_index(name: str, data: bytes, folder: Path) -> bool:
    from edgezo.weights.safetensors_file import SafetensorsSource

    (folder / "model.safetensors.index.json").write_bytes(data)
    shard = folder / "model-1.safetensors"
    if not shard.exists():
        shutil.copyfile(sound_model() / "model.safetensors", shard)
    SafetensorsSource(folder)
    return True


def read_shards(name: str, data: bytes, folder: Path) -> bool:
    from edgezo.weights.safetensors_file import SafetensorsSource

    weights, *files = json.loads(data)
    index = json.dumps({"metadata": {}, "weight_map": weights})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    for number, file in enumerate(files, 1):
        (folder / f"model-{number}.safetensors").write_bytes(bytes.fromhex(file))
    source = SafetensorsSource(folder)
    for stored in source.names:
        source.read(stored)
    return True


def read_pickled(name: str, data: bytes, folder: Path) -> bool:
    from edgezo.run.pickled import read_networks

    (folder / "f.pth").write_bytes(data)
    return bool(read_networks(folder / "f.pth"))


def read_configs(name: str, data: bytes, folder: Path) -> bool:
    return _load(_model_with(folder, config__json=data))


def read_tokenizers(name: str, data: bytes, folder: Path) -> bool:
    from edgezo.network.loader import load_tokenizer

    which = "special_tokens_map__json" if name.endswith("odd") else "tokenizer_config__json"
    tokenizer = load_tokenizer(_model_with(folder, **{which: data}))
    return len(tokenizer("a film")["input_ids"]) >= 0


def read_vocabularies(name: str, data: bytes, folder: Path) -> bool:
    """Load it, and tokenise as rows are."""
    from edgezo.data.dataset import DataRequest, load_dataset
    from edgezo.network.loader import load_tokenizer

    rows = folder / "rows.jsonl"
    if not rows.exists():
        rows.write_text("".join(json.dumps({"text": "aaaa " * n}) + "\n" for n in (2, 30, 300)))
    tokenizer = load_tokenizer(_model_with(folder, tokenizer__json=data))
    load_dataset(DataRequest(data=str(rows)), tokenizer)
    return True


def read_toml(name: str, data: bytes, folder: Path) -> bool:
    from edgezo.plan.request import make_config, read_settings

    (folder / "c.toml").write_bytes(data)
    make_config({}, read_settings(folder / "c.toml"))
    return True


@cache
def byte_tokenizer() -> Any:
    """A tokenizer without a chat template: templates have cases of their own."""
    import tokenizers_fixture

    tokenizer = tokenizers_fixture.byte_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def read_rows(name: str, data: bytes, folder: Path) -> bool:
    from edgezo.data.dataset import DataRequest, load_dataset
    from edgezo.machine.process_memory import ReadingGuard, rss_bytes

    file = folder / f"rows.{name.rpartition('.')[2]}"
    file.write_bytes(data)
    guard = ReadingGuard(rss_bytes() + 250_000_000)
    load_dataset(DataRequest(data=str(file)), byte_tokenizer(), guard=guard)
    return True


def read_templates(name: str, data: bytes, folder: Path) -> bool:
    """As ChatTemplates has it, but in a fork."""
    from fuzz.forked import run_forked

    from edgezo.errors import EdgezoError

    questions = [
        {
            "template": data.decode("utf-8", "replace"),
            "special_tokens": {"eos_token": "</s>"},
            "tokens": ["</s>"],
            "now": "2026-01-02T03:04:05",
        },
        {
            "messages": [
                {"role": "user", "content": "a film", "mood": "dark"},
                {"role": "assistant", "content": "good"},
            ],
            "variables": {"tools": []},
            "learned": [1],
        },
    ]
    (folder / "in").write_text("".join(json.dumps(q) + "\n" for q in questions), encoding="utf-8")
    run_forked("templates", folder, [])
    answers = (folder / "out").read_text(encoding="utf-8").splitlines()
    if len(answers) < 2 or "error" in json.loads(answers[1]):
        raise EdgezoError("the template fails")
    return True


READERS: dict[str, FuzzReader] = {
    "gguf": FuzzReader(gguf_case, read_gguf, 20),
    "safetensors": FuzzReader(safetensors_case, read_safetensors, 20),
    "index": FuzzReader(index_case, read_index, 20),
    "shards": FuzzReader(shards_case, read_shards, 20),
    "vocabularies": FuzzReader(_vocabularies, read_vocabularies, 20),
    "pickled": FuzzReader(pickled_case, read_pickled, 20),
    "configs": FuzzReader(_configs, read_configs, 20),
    "tokenizers": FuzzReader(_tokenizers, read_tokenizers, 20),
    "toml": FuzzReader(_toml, read_toml, 20),
    "rows": FuzzReader(_rows, read_rows, 20),
    "templates": FuzzReader(_templates, read_templates, 20),
}
