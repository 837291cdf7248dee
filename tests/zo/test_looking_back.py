"""Rules whose state is made anew from past steps have the bits of those that keep it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from preset_trials import Maker

from edgezo.weights.recent import Recent
from edgezo.weights.saved import saved_sha256, saved_tensors
from edgezo.weights.store import WeightStore
from edgezo.zo.recipe import Recipe

STEPS = 4


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    return Maker(tmp_path_factory.mktemp("model"))


def digest(store: WeightStore) -> str:
    return saved_sha256(saved_tensors(store))


@pytest.mark.parametrize(("rule", "train"), [("momentum", "full"), ("adam", "lowrank")])
def test_a_state_made_anew_has_the_bits_of_one_that_is_kept(
    rule: str, train: str, maker: Maker
) -> None:
    kept = maker.trial("grzo", train=train, rule=rule, weight_decay=0.01)
    made = maker.model(replace(kept.cfg, rule=f"replayed-{rule}"))
    recipes = kept.run(STEPS)
    recipes[1] = Recipe(1, 0 * recipes[1].coefficients, 0.0)  # a skipped step changes no state
    again = maker.model(kept.cfg)
    for recipe in recipes:
        again.store.apply([recipe])
        made.store.apply([recipe])
    assert digest(made.store) == digest(again.store)
    assert not any(trainable.state for trainable in made.store.trainables.values())
    at_once = maker.model(replace(kept.cfg, rule=f"replayed-{rule}"))
    at_once.store.apply(recipes)
    assert digest(at_once.store) == digest(again.store)


def test_steps_that_are_not_at_hand_come_from_the_journal(maker: Maker) -> None:
    trial = maker.trial("adamezo")
    recipes = trial.run(STEPS)

    def history(first: int, stop: int) -> Iterator[Recipe]:
        yield from recipes[first:stop]

    resumed = maker.model(trial.cfg)
    resumed.store.history = history
    resumed.store.replay(2)
    resumed.store.recent = Recent()  # as a block that was elsewhere finds it
    resumed.store.apply(recipes[2:])
    assert digest(resumed.store) == digest(trial.model.store)


def test_only_the_steps_that_a_rule_looks_back_on_are_kept_at_hand() -> None:
    recent = Recent()
    steps = [Recipe(step, np.ones(2, np.float32), 0.0) for step in range(40)]
    for step in steps:
        recent.add([step], 16)
    assert [r.step for r in recent.before(40, 16, None)] == list(range(24, 40))
    assert recent.before(0, 16, None) == []
    assert [r.step for r in recent.before(7, 3, lambda first, stop: steps[first:stop])] == [4, 5, 6]
