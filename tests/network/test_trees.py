"""Options of an example as a tree: every loss, prediction and gradient is that of the options as whole rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from workshop import KEY, SIGMA

from edgezo.data.batches import Example, collate, evaluation_batches, micro_batches
from edgezo.data.packed import PackedExamples
from edgezo.data.trees import Row, followed, tree_behind, tree_of
from edgezo.network.assemble import ModelSpec, assemble
from edgezo.network.loader import open_model
from edgezo.network.model import Model

pytestmark = pytest.mark.usefixtures("one_thread")

# Of several lengths, with shared tokens, one inside another, and two that are equal.
WORDS = ((7, 8, 9), (7, 8, 10, 11), (7,), (12, 7), (12, 7), (12, 13, 14, 15, 16), (7, 8, 9, 17))
CAUSAL = tuple(f for f in tiny_models.FAMILIES if f != "roberta")
WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    "phi3": {"sliding_window": 6},
}
ORIGINAL = 32


def prompts(*lengths: int) -> list[Row]:
    generator = np.random.default_rng(sum(lengths))
    drawn = (generator.integers(4, tiny_models.VOCAB, n).tolist() for n in lengths)
    return [Row(ids, (len(ids) - 1,), ()) for ids in drawn]


def examples_of(*lengths: int) -> list[Example]:
    """One example with the same words as all others, and one with options of its own, for each length of a prompt."""
    made = []
    for number, prompt in enumerate(prompts(*lengths)):
        made.append(Example((prompt,), number % len(WORDS), endings=WORDS))
        own = tuple(followed(prompt, word) for word in WORDS[number % 2 : number % 2 + 3])
        made.append(Example(own, number % 3))
    return made


def apart(examples: list[Example]) -> list[Example]:
    """The examples with their options as whole rows, the slow way."""
    return [replace(example, apart=True) for example in examples]


def model_of(
    folder: Path, family: str, *train: str, precision: str = "fp32", **changes: Any
) -> Model:
    path = tiny_models.make(family, folder / family, **changes)
    spec = ModelSpec(
        precision=precision, train=train or ("head",), directions="signs", seed=0, kind="choice"
    )
    return assemble(open_model(path), spec)


def tried(
    model: Model, examples: list[Example], sides: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    batch = collate(examples, range(len(examples)))
    probe = model.probe(batch, KEY, SIGMA) if sides > 1 else None
    losses = model.losses(batch, probe, sides=sides)
    model.take_touched(len(examples))
    return losses


def assert_same(model: Model, examples: list[Example], atol: float = 2e-5) -> None:
    """Plain and on both sides of a perturbation, all at once and one by one."""
    for sides in (1, 2) if model.store.trainables else (1,):
        losses, predicted = tried(model, examples, sides)
        slow, slow_predicted = tried(model, apart(examples), sides)
        assert torch.allclose(losses, slow, atol=atol)
        sure = (losses - slow).abs().max() == 0 or atol < 1e-3
        assert not sure or torch.equal(predicted, slow_predicted)
    alone = torch.cat([tried(model, [example])[0][0] for example in examples])
    assert torch.allclose(tried(model, examples)[0][0], alone, atol=atol)


# --------------------------------------------------------------------------------------- the forward


@pytest.mark.parametrize("kernels", ("1", "0"))
@pytest.mark.parametrize("family", CAUSAL)
def test_a_tree_gives_the_losses_of_its_rows(
    family: str, kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEZO_KERNELS", kernels)
    assert_same(model_of(tmp_path, family, "full"), examples_of(1, 5, 20, 9))


@pytest.mark.parametrize("family", sorted(WINDOWED))
def test_a_window_counts_positions_in_the_row(family: str, tmp_path: Path) -> None:
    model = model_of(tmp_path, family, "lowrank", "norms", **WINDOWED[family])
    assert_same(model, examples_of(3, 7, 20))


@pytest.mark.parametrize("scaling", ("dynamic", "longrope", "yarn", "linear"))
def test_rows_are_rotated_as_alone(scaling: str, tmp_path: Path) -> None:
    table: dict[str, Any] = {"rope_type": scaling, "rope_theta": 10000.0, "factor": 4.0}
    if scaling in ("longrope", "yarn"):
        table["original_max_position_embeddings"] = ORIGINAL
    if scaling == "longrope":
        table |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    limits = {"max_position_embeddings": ORIGINAL, "rope_parameters": table}
    model = model_of(tmp_path, "llama", **limits)
    most = ORIGINAL if scaling in ("dynamic", "longrope") else None
    packed = PackedExamples((), WORDS, most)
    for prompt in prompts(
        5, ORIGINAL - 4, ORIGINAL - 3, 40
    ):  # the third has words on both sides of the switch
        packed.append(Example((prompt,), 2))
    assert [example.apart for example in packed] == [
        False,
        False,
        most is not None,
        most is not None,
    ]
    assert_same(model, list(packed))


@pytest.mark.parametrize("family", ("llama", "gemma2"))
def test_in_bf16_a_tree_is_as_near_as_rows_are(family: str, tmp_path: Path) -> None:
    examples = examples_of(6, 30)
    exact = tried(model_of(tmp_path / "fp32", family), examples)[0]
    model = model_of(tmp_path / "bf16", family, precision="bf16")
    error, slow = (tried(model, e)[0] - exact for e in (examples, apart(examples)))
    assert error.abs().max() < 2 * slow.abs().max() + 0.02


@pytest.mark.parametrize(("train", "tied"), (("head", False), ("head", True), ("lora", False)))
def test_gradients_are_those_of_the_rows(train: str, tied: bool, tmp_path: Path) -> None:
    model = model_of(tmp_path, "gemma2" if tied else "llama", train, tied=tied)
    examples = examples_of(5, 12)
    (part,) = model.learned.values()
    moved = []
    for group in (examples, apart(examples)):
        before = {name: tensor.clone() for name, tensor in part.trained().items()}
        model.losses(collate(group, range(len(group))), learn=0.25)
        part.update(0.1)
        after = part.trained()
        moved.append({name: after[name] - before[name] for name in before})
        part.load(
            {n: torch.zeros_like(t) for n, t in part.tensors().items()} | part_start(part, before)
        )
    assert any(change.abs().max() > 0 for change in moved[0].values())
    for name, change in moved[0].items():
        assert torch.allclose(change, moved[1][name], atol=1e-4)


def part_start(part: Any, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a part's snapshot has of the tensors that it trains."""
    return {name: tensor for name, tensor in before.items() if name in part.tensors()}


# --------------------------------------------------------------------------------------- trees


tokens = st.integers(4, 6)  # few, so that many rows begin alike
words_of = st.lists(
    st.lists(tokens, min_size=1, max_size=5).map(tuple), min_size=2, max_size=6
).map(tuple)


@given(st.lists(tokens, min_size=1, max_size=6), words_of)
def test_a_tree_has_each_prefix_once_and_every_row(prompt: list[int], words: Any) -> None:
    row = Row(prompt, (len(prompt) - 1,), ())
    rows = [followed(row, word) for word in words]
    tree = tree_behind(row, words)
    prefixes = {tuple(r.ids[: n + 1]) for r in rows for n in range(len(r.ids))}
    assert len(tree.ids) == len(prefixes)
    way = [[at] for at in range(len(tree.ids))]
    for at, parent in enumerate(tree.parents):
        way[at] = [*way[parent], at] if at else [at]
    assert {tuple(tree.ids[at] for at in steps) for steps in way} == prefixes
    assert tree.depths.tolist() == [len(steps) - 1 for steps in way]
    assert [np.flatnonzero(seen).tolist() for seen in tree.seen] == way[tree.trunk :]
    assert way[tree.trunk - 1] == list(range(tree.trunk))
    predicted = [[] for _ in words]
    for token, option in zip(tree.part_tokens, tree.part_options, strict=True):
        steps = way[tree.read_at[tree.states[token]]]
        predicted[option].append(([tree.ids[at] for at in steps], tree.targets[token]))
    whole = [[*prompt, *word] for word in words]
    n = len(prompt)
    assert predicted == [[(w[:at], w[at]) for at in range(n, len(w))] for w in whole]
    pairs = list(zip(tree.states, tree.targets, strict=True))
    assert len(set(pairs)) == len(pairs) and list(tree.states) == sorted(tree.states)
    of_rows = tree_of(rows)
    assert of_rows is None or (of_rows.ids, of_rows.parents) == (tree.ids, tree.parents)


def test_rows_that_share_little_stay_apart() -> None:
    short, long = Row([4, 5, 6], (2,), (7,)), Row([4, *range(10, 40)], (30,), (7,))
    assert tree_of([short, long]) is None
    assert (
        tree_of([Row([4, 5], (1,), (7,)), Row([5, 5], (1,), (7,))]) is None
    )  # nor without a shared token
    alike = [followed(Row(range(10, 40), (29,), ()), word) for word in WORDS]
    made = tree_of(alike)
    assert made is not None and len(made.ids) < sum(len(row.ids) for row in alike) / 5


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.sampled_from([None, 20]))
def test_packed_examples_count_what_passes(lengths: list[int], most: int | None) -> None:
    for endings in (WORDS, ()):
        packed = PackedExamples((), endings, most)
        for prompt in prompts(*lengths):
            rows = (prompt,) if endings else tuple(followed(prompt, word) for word in WORDS[:3])
            packed.append(Example(rows, 1))
        batches = [collate([example], [0]) for example in packed]
        assert packed.token_counts().tolist() == [len(batch.ids) for batch in batches]
        assert packed.token_counts().tolist() == [example.tokens for example in packed]
        assert packed.scored_counts().tolist() == [len(batch.score_index) for batch in batches]
        rows_of = [row for example in packed for row in example.whole_rows]
        assert packed.longest_row() == max(len(row.ids) for row in rows_of)
        used = [token for row in rows_of for token in (*row.ids, *row.score_ids)]
        assert packed.largest_id() == max(used)
        alone = packed.prompts()
        if endings:
            assert [example.rows for example in alone] == [example.rows for example in packed]
            assert alone.token_counts().tolist() == lengths
            assert [example.whole_rows for example in alone] == [e.rows for e in packed]
        else:
            assert alone is packed


def test_micro_batches_are_cut_by_what_passes() -> None:
    examples = examples_of(10, 20, 30)
    parts = micro_batches(examples, 6, 60)
    assert all(sum(examples[i].tokens for i in part) <= 60 or len(part) == 1 for part in parts)
    assert sorted(i for part in evaluation_batches(examples) for i in part) == list(range(6))
