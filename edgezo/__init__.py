"""edgezo fine-tunes a language model in about the memory it takes to run it: forward passes only.

>>> import edgezo
>>> run = edgezo.finetune("smollm2-135m-instruct", "rows.jsonl", max_mem="900MB")
>>> run.predict([{"text": "wake me at six"}])
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# The hub's client tells what runs it and asks which programs there are, unless this is set before its import.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# A process that another one of edgezo's has started ends with it.
if (_parent := os.environ.pop("EDGEZO_PARENT", "")).isdecimal():
    from edgezo.machine.children import end_with_parent

    end_with_parent(int(_parent))

__version__ = "0.1.0"
__all__ = ["Run", "RunConfig", "__version__", "finetune", "load", "make_config", "make_plan"]

if TYPE_CHECKING:
    from edgezo.plan.config import RunConfig
    from edgezo.plan.planner import make_plan
    from edgezo.plan.request import make_config
    from edgezo.run.api import Run, finetune
    from edgezo.run.predict import load

_HOMES = {
    "Run": "edgezo.run.api",
    "RunConfig": "edgezo.plan.config",
    "finetune": "edgezo.run.api",
    "load": "edgezo.run.predict",
    "make_config": "edgezo.plan.request",
    "make_plan": "edgezo.plan.planner",
}


def __getattr__(name: str) -> Any:
    """Import on first use: nothing here costs a program that only wants the version."""
    if name not in _HOMES:
        raise AttributeError(f"module 'edgezo' has no attribute {name!r}")
    import importlib
    import sys

    if name == "load" and "torch" not in sys.modules:
        # Before PyTorch is imported, as the command line does: it reads a part of the policy once.
        from edgezo.machine.process_memory import allocator_policy

        allocator_policy()
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
