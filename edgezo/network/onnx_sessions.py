"""Sessions of onnxruntime over the graphs of a trainable export: made when they are needed, and released.

Weights are mapped from their files and used as they lie there: packing them anew would take a second copy. Constants
are not folded, so that codes are expanded a matrix at a time, while it is multiplied.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgezo.errors import EdgezoError, UsageError
from edgezo.network.onnx_manifest import Manifest

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
    "nnapi": "NnapiExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "cuda": "CUDAExecutionProvider",
}
_INSTALL = "pip install 'edgezo[onnx]' brings it."


def runtime() -> Any:
    """The module onnxruntime. Raises EdgezoError where it is not installed."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as problem:
        raise EdgezoError(f"--engine onnx needs onnxruntime ({problem}).\n{_INSTALL}") from problem
    return onnxruntime


def check_provider(name: str) -> str:
    """onnxruntime's name of an execution provider. Raises UsageError where this build of it has none such."""
    present = runtime().get_available_providers()
    if (provider := PROVIDERS[name]) not in present:
        known = [short for short, long in PROVIDERS.items() if long in present]
        raise UsageError(
            f"--provider {name}: the onnxruntime that is installed has no {provider}. It has "
            f"{', '.join(known)}: give one of them, or install a build with it."
        )
    return provider


@dataclass
class Sessions:
    """The graphs of one export, by file name; those that are kept stay until they are dropped."""

    manifest: Manifest
    provider: str = "cpu"
    threads: int | None = None  # None: as many as onnxruntime takes
    kept: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._providers = [check_provider(self.provider)]
        # What the provider has no place for, the CPU computes.
        if self.provider != "cpu":
            self._providers.append(PROVIDERS["cpu"])
        self._ort = runtime()
        _one_pool(self.threads or 0)

    def run(self, name: str, inputs: Mapping[str, np.ndarray], *, keep: bool = True) -> np.ndarray:
        """The result of a graph. ``keep``: the graph stays in memory for the next call."""
        return self.run_all(name, inputs, keep=keep)[0]

    def run_all(
        self, name: str, inputs: Mapping[str, np.ndarray], *, keep: bool = True
    ) -> list[np.ndarray]:
        """All results of a graph."""
        session = self.kept.get(name)
        if session is None:
            session = self._open(name)
            if keep:
                self.kept[name] = session
        try:
            results: list[np.ndarray] = session.run(None, dict(inputs))
        except Exception as problem:  # onnxruntime raises a type for each status
            raise _refusal(name, self.provider, problem) from problem
        return results

    def drop(self, names: Sequence[str] | None = None) -> None:
        """Release graphs (None: all)."""
        for name in list(self.kept) if names is None else names:
            self.kept.pop(name, None)

    def _open(self, name: str) -> Any:
        options = quiet_options(self.threads)
        try:
            return self._ort.InferenceSession(
                str(self.manifest.file(name)),
                options,
                self._providers,
                disabled_optimizers=["ConstantFolding"],
            )
        except Exception as problem:
            raise _refusal(name, self.provider, problem) from problem


_shared: bool | None = (
    None  # whether the process has one pool of threads for all graphs; None: not asked for yet
)


def _one_pool(threads: int) -> None:
    """One pool of threads for all graphs of the process (0: as many as cores); the first that is made stays.

    There is none where the process has used onnxruntime before: then each graph has threads of its own.
    """
    global _shared
    if _shared is None:
        try:
            runtime().set_global_thread_pool_sizes(threads, 1)
            _shared = True
        except Exception:  # onnxruntime's own type
            _shared = False


def session_options(threads: int | None = None) -> Any:
    """onnxruntime's options for a graph: the pool of the process, or where there is none ``threads`` of its own."""
    options = runtime().SessionOptions()
    options.use_per_session_threads = not _shared
    if threads and not _shared:
        options.intra_op_num_threads = threads
    return options


def quiet_options(threads: int | None = None) -> Any:
    """``session_options`` of a graph that keeps neither copies of weights nor freed memory, and writes no messages."""
    options = session_options(threads)
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def _refusal(name: str, provider: str, problem: Exception) -> EdgezoError:
    """The error for a graph that onnxruntime does not load or run."""
    text = str(problem).strip().partition("\n")[0][:300]
    return EdgezoError(
        f"onnxruntime cannot run {name} with --provider {provider}: {text}\n"
        "Give --provider cpu, or write the graphs again with this version of edgezo (export --trainable)."
    )
