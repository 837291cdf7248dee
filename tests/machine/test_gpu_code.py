"""The Triton kernels compile for GPUs where there is none, and their code rounds where the CPU rounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import triton_place  # noqa: F401

pytest.importorskip("triton")
# In a process of its own: here Triton interprets (conftest.py).
CODE = """
import json, sys
sys.path.append(f"{sys.prefix}/triton")  # as triton_place.py
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from edgezo.machine import triton_kernels as kernels

NUMBERS = {"scale": "fp32", "kept": "fp32"}  # others are int32
KERNELS = {
    "noise": ({"out": "*i8", "numbers": "*i64", "table": "*i64"}, dict(LEVELS=False, NUMBERED=True, N=32), 4),
    "signed_dots": ({"x": "*i16", "example": "*i64", "slots": "*i64", "side": "*i16", "out": "*fp32"},
                    dict(BF16=True, BF16_SIDE=True, N=32), 4),
    "add_signed": ({"y": "*i16", "left": "*fp32", "right": "*fp32", "weight": "*fp32", "example": "*i64",
                    "slots": "*i64"}, dict(READ=False, SIGNED=True, BF16=True, N=32), 4),
    "update": ({"values": "*i16", "low": "*i8", "coefficients": "*fp32", "table": "*fp32"},
               dict(FACTORED=True, DENSE=0, SCALED=True, DECAYED=True, PLANE=True, ROWS=32, B=16), 8),
    "expand_int4": ({"packed": "*u8", "scale": "*fp32", "shift": "*fp32", "out": "*i16"},
                    dict(NIBBLE=4, BF16=True, N=1024), 4),
}
made = {}
for name, (pointers, constants, warps) in KERNELS.items():
    kernel = getattr(kernels, f"{name}_kernel")
    types = {p.name: "constexpr" if p.name in constants else pointers.get(p.name, NUMBERS.get(p.name, "i32"))
             for p in kernel.params}
    source = ASTSource(kernel, types, constexprs=constants)
    options = {"enable_fp_fusion": False, "num_warps": warps}
    ptx = compile(source, target=GPUTarget("cuda", 89, 32), options=options).asm["ptx"]
    made[name] = {word: ptx.count(word) for word in ("fma.", ".ftz", "div.full", ".local")}
print(json.dumps(made))
"""


@pytest.mark.slow
def test_kernels_compile_and_fuse_no_product_with_a_sum(tmp_path):
    """A fused operation rounds once; only the product of signs and coefficients may be fused, since it is exact."""
    hidden = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=os.environ | hidden, capture_output=True, text=True
    )
    if "cannot find" in done.stderr or "ptxas" in done.stderr:
        pytest.skip(f"no assembler for GPUs: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr[-2000:]
    made = json.loads(done.stdout.splitlines()[-1])
    sums = made["update"].pop("fma.")
    assert sums == 32 * 256 * 16 // (8 * 32), "one for each example and element of a thread"
    assert {count for counts in made.values() for count in counts.values()} == {0}, made
