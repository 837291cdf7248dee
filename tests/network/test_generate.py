"""Greedy generation: the tokens that transformers' ``generate`` writes, on either side of a probe."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import reference
import tiny_models
import torch
from workshop import (
    KEY,
    PART_WINDOW,
    WINDOW,
    Case,
    Workshop,
    of,
    official_module,
    settle,
)

from edgezo.data.tasks import Generation
from edgezo.machine.process_memory import Heap
from edgezo.network.generate import generate
from edgezo.network.key_values import KeyValues
from edgezo.network.model import Model

pytestmark = pytest.mark.usefixtures("one_thread")

SIGMA = 0.05  # large enough for the sides to write different texts
MOST = 9
CAUSAL = tuple(f for f in tiny_models.FAMILIES if f != "roberta")
PROMPTS = [
    torch.randint(5, 300, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in (7, 12, 3, 1, 9)
]


def written(module: Any, prompt: Sequence[int], end: int) -> list[int]:
    """What transformers writes after a prompt, the end token included."""
    ids = torch.tensor([prompt])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids_and_answer = module.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=MOST,
            eos_token_id=end,
            pad_token_id=0,
        )
    return ids_and_answer[0, len(prompt) :].tolist()


def twin_of(case: Case) -> reference.Twin:
    return reference.Twin(official_module(case), kind="completion", label_ids=())


def two_sides(model: Model, end: int, **more: Any) -> list[list[list[int]]]:
    return generate(
        model,
        PROMPTS,
        Generation(MOST),
        lambda ids: ids[-1] == end,
        sides=2,
        probe=lambda batch: model.probe(batch, KEY, SIGMA),
        **more,
    )


# A random model with tied tables repeats one token; with untied ones it writes texts.
PLAIN = (
    *(of(f, "norms", kind="completion", tied=False) for f in CAUSAL),
    of("llama", "norms", kind="completion"),
    *(of(f, "norms", kind="completion", changes=WINDOW) for f in ("mistral", "phi3")),
    of("qwen2", "norms", kind="completion", changes=PART_WINDOW),
    *(
        of("gemma2", "norms", kind="completion", tied=False, changes=((name, 2.0),))
        for name in ("final_logit_softcapping", "attn_logit_softcapping")
    ),
)


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_every_family_writes_what_transformers_writes(case: Case, workshop: Workshop) -> None:
    model, twin = workshop.model(case), twin_of(case)
    twin.load(reference.explicit_weights(model))
    whole = [written(twin.module, prompt, -1) for prompt in PROMPTS]
    assert len({tuple(text) for text in whole}) > 1
    end = whole[0][MOST // 2]  # a token that comes up ends some of the texts early
    wanted = [written(twin.module, prompt, end) for prompt in PROMPTS]
    for most_tokens in (None, 10):
        texts = generate(
            model, PROMPTS, Generation(MOST), lambda ids: ids[-1] == end, most_tokens=most_tokens
        )
        assert texts == [wanted]


PROBED = (
    *(of(f, "lowrank+norms+scales", kind="completion", tied=False) for f in CAUSAL),
    *(
        of(f, "full", d, kind="completion", tied=False)
        for f, d in (
            ("llama", "signs"),
            ("gpt2", "gaussian"),
            ("gemma2", "shared"),
            ("opt", "lowrank"),
        )
    ),
    *(of(f, "full", kind="completion") for f in ("llama", "phi3")),
    of("llama", "lowrank", "shared", kind="completion"),
)


@pytest.mark.parametrize("case", PROBED, ids=str)
def test_each_example_writes_along_its_own_direction_on_each_side(
    case: Case, workshop: Workshop
) -> None:
    model, twin = workshop.model(case), twin_of(case)
    settle(model)
    wanted: list[list[list[int]]] = [[], []]
    end = -1
    for slot, prompt in enumerate(PROMPTS):
        for side, sign in enumerate((1, -1)):
            twin.load(reference.explicit_weights(model, KEY, slot, sign * SIGMA))
            wanted[side].append(written(twin.module, prompt, end))
    assert wanted[0] != wanted[1]
    assert two_sides(model, end) == wanted
    # An end token ends its text, and the other texts go on as before.
    end = wanted[0][1][2]
    cut = [[t[: t.index(end) + 1] if end in t else t for t in side] for side in wanted]
    assert two_sides(model, end) == cut
    assert two_sides(model, end, most_tokens=10) == cut


def test_an_example_s_text_does_not_depend_on_who_is_beside_it(workshop: Workshop) -> None:
    model = workshop.model(of("llama", "full", kind="completion"))
    whole = two_sides(model, -1)
    for slots in ([1, 3], [4], [2, 0]):
        texts = generate(
            model,
            [PROMPTS[slot] for slot in slots],
            Generation(MOST),
            lambda ids: False,
            sides=2,
            probe=lambda batch: model.probe(batch, KEY, SIGMA),
            slots=slots,
        )
        assert texts == [[side[slot] for slot in slots] for side in whole]


def test_what_either_side_writes_and_reads_again_is_touched(workshop: Workshop) -> None:
    model = workshop.model(of("llama", "full", kind="completion", tied=False))
    model.context.touched = []
    texts = two_sides(model, -1)
    touched = model.take_touched(len(PROMPTS))
    for slot, prompt in enumerate(PROMPTS):
        # The last token of a text is not read.
        read = {*prompt, *texts[0][slot][:-1], *texts[1][slot][:-1]}
        assert set(touched[slot].tolist()) == read


@pytest.mark.parametrize("most", [1, 2])
def test_short_texts_take_no_more_than_they_need(most: int, workshop: Workshop) -> None:
    model = workshop.model(of("gpt2", "norms", kind="completion"))
    texts = generate(model, PROMPTS, Generation(most), lambda ids: False)
    whole = generate(model, PROMPTS, Generation(MOST), lambda ids: False)
    assert texts == [[text[:most] for text in whole[0]]]


def test_a_model_in_bf16_writes_the_same_however_prompts_are_split(workshop: Workshop) -> None:
    case = replace(of("llama", "norms", kind="completion"), precision="bf16")
    model = workshop.model(case, torch.bfloat16)
    texts = [
        generate(model, PROMPTS, Generation(MOST), lambda ids: False, most_tokens=most)
        for most in (1, 1)
    ]
    assert texts[0] == texts[1] and all(len(text) == MOST for text in texts[0][0])


def test_keys_and_values_are_as_large_as_planned() -> None:
    kept = KeyValues(6, 11, Heap().apart)
    module = torch.nn.Linear(1, 1)
    kept.expect(torch.arange(6), (3,) * 6)
    kept.store(module, torch.ones(18, 2, 4), torch.ones(18, 2, 4))
    assert [part.shape for part in kept._kept[module]] == [(6, 2, 11, 4)] * 2


def test_the_exact_head_s_change_is_in_what_is_written(workshop: Workshop) -> None:
    case = of("gemma2", "norms+head", kind="completion", tied=False)
    model, twin = workshop.model(case), twin_of(case)
    exact = model.exact
    assert exact is not None and exact.basis is not None
    generator = torch.Generator().manual_seed(1)
    exact.delta.copy_(torch.randn(exact.delta.shape, generator=generator))
    weights = reference.explicit_weights(model)
    weights["lm_head.weight"] += (exact.delta @ exact.basis).double()
    twin.load(weights)
    wanted = [written(twin.module, prompt, -1) for prompt in PROMPTS]
    assert generate(model, PROMPTS, Generation(MOST), lambda ids: False) == [wanted]
