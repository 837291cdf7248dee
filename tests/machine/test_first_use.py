"""What the first computation brings is in the process before a plan starts from it."""

from __future__ import annotations

import subprocess
import sys

# In a process of its own: another test has computed here already.
CODE = """
import torch
from edgezo.machine.first_use import compute_once
from edgezo.machine.process_memory import resident
compute_once(torch.bfloat16)
before = resident().file_bytes
compute_once(torch.bfloat16)
x = torch.full((64, 64), 0.5)
torch.softmax(x @ x, -1).sum()
x.bfloat16() @ x.bfloat16()
print(resident().file_bytes - before)
print(torch.is_grad_enabled())
"""


def test_a_second_computation_brings_next_to_nothing():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    more_bytes, grad = done.stdout.split()
    assert int(more_bytes) < 2_000_000  # the first takes 10 to 25 MB
    assert grad == "True"
