"""``edgezo models`` and ``edgezo estimators``: what there is to choose from."""

from __future__ import annotations

import click

from edgezo.cli.options import emit, json_option


@click.command()
@json_option
def models(as_json: bool) -> None:
    """List the models that come with a card."""
    from edgezo.cli import tables
    from edgezo.network.cards import cards

    every = list(cards().values())
    rows = [
        {
            "name": card.name,
            "family": card.family,
            "kind": card.kind,
            "parameters": card.parameters,
            "sources": [str(source) for source in card.sources],
            "settings": card.settings,
        }
        for card in every
    ]
    emit(as_json, {"models": rows}, tables.models_table(every))


@click.command(short_help="List the estimators, each with its equation and cost.")
@json_option
def estimators(as_json: bool) -> None:
    """List the estimators: equation, forward passes, state and noise of each."""
    from edgezo.cli import tables
    from edgezo.zo import presets

    every = [presets.preset_of(presets.DEFAULT), *presets.PRESETS.values()]
    described = [preset.describe() for preset in every]
    described += [preset.describe() for preset in presets.FIRST_ORDER.values()]
    emit(as_json, {"estimators": described}, tables.estimators_list(described))
