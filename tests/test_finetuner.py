"""The ZO Fine-tuner: published files are read and never run, scales are those of its formulas, runs keep their bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from edgezo.finetuner import Finetuner
from edgezo.loader import ModelFiles, build_meta


def make_finetuner(files: ModelFiles, path: Path, **about: Any) -> str:
    """A finetuner with drawn networks for a model's parameters, each of its own mind."""
    names = [name for name, _ in build_meta(files).named_parameters()]
    found = Finetuner.plain(names, seed=5)
    generator = torch.Generator().manual_seed(6)
    found.weights[2].copy_(torch.randn(found.weights[2].shape, generator=generator) / 10)
    found.save(path, about)
    return str(path)
