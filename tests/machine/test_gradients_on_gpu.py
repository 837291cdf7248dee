"""Backward passes on a GPU that is none (gradients_on_gpu.py), in a process of their own.

Autograd asks PyTorch's library for the device of a tensor. That of a build for CPUs knows of no "cuda", so
fake_cuda.cpp adds one, which must be there before PyTorch is imported.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]
RUN = "import ctypes, sys; ctypes.CDLL(sys.argv[1]); import pytest; sys.exit(pytest.main(sys.argv[2:]))"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.skipif(torch.version.cuda is not None, reason="PyTorch has a device cuda of its own")
def test_gradients_on_a_gpu(tmp_path):
    parts, library = Path(torch.__file__).parent, tmp_path / "fake_cuda.so"
    linked = [f"-L{parts / 'lib'}", f"-Wl,-rpath,{parts / 'lib'}", "-lc10", "-ltorch_cpu"]
    compiler = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{parts / 'include'}"]
    source = str(TESTS / "fake_cuda.cpp")
    made = subprocess.run(
        [*compiler, "-o", str(library), source, *linked], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    options = ["-q", "-p", "no:cacheprovider", "--basetemp"]
    cases = str(TESTS / "machine" / "gradients_on_gpu.py")
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(library), *options, str(tmp_path / "cases"), cases],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
