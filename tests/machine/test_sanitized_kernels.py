"""Every C kernel on odd and empty arrays, with sanitizers for addresses and for what C does not define."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from machine import sanitized_kernels

from edgezo.machine import kernels

SOURCE = Path(kernels.__file__).with_name("kernels.c")
SCRIPT = Path(sanitized_kernels.__file__)
FLAGS = (
    "-std=gnu11 -O1 -g -fno-omit-frame-pointer -fno-math-errno -fno-trapping-math -fopenmp -fPIC -shared -Wno-psabi "
    "-fsanitize=address,undefined -fno-sanitize-recover=all -DEDGEZO_SOURCE=1u"
)


def sanitizer() -> Path | None:
    """The library of the compiler that watches memory; None where there is none."""
    compiler = shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    command = [compiler, "-print-file-name=libasan.so"]
    found = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    return found if found.is_absolute() else None


with_sanitizer = pytest.mark.skipif(sanitizer() is None, reason="no GCC with a sanitizer")


def compiled(source: Path, folder: Path) -> Path:
    library = folder / "kernels.so"
    command = ["gcc", *FLAGS.split(), str(source), "-o", str(library), "-lm"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return library


def run(library: Path) -> subprocess.CompletedProcess[str]:
    more = {
        "LD_PRELOAD": str(sanitizer()),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",  # Python's own leaks are no kernel's
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, str(SCRIPT), str(library)]
    return subprocess.run(
        command, env={**os.environ, **more}, capture_output=True, text=True, timeout=600
    )


def test_every_kernel_is_called():
    exported = re.findall(r"^\w[\w ]*[ *]edgezo_(\w+)\(", SOURCE.read_text(), re.MULTILINE)
    assert set(exported) == set(sanitized_kernels.KERNELS)
    assert set(kernels._SIGNATURES) <= set(sanitized_kernels.KERNELS)


@with_sanitizer
def test_no_kernel_reads_or_writes_beside_its_arrays_or_does_what_c_does_not_define(tmp_path):
    done = run(compiled(SOURCE, tmp_path))
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[:3000]
    calls = dict(line.split() for line in done.stdout.splitlines())
    assert calls.keys() == sanitized_kernels.KERNELS.keys()
    assert all(int(count) for name, count in calls.items() if name != "crc32")


@with_sanitizer
@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        (
            "for (; i < d; i++)\n        sum +=",
            "for (; i <= d; i++)\n        sum +=",
            "buffer-overflow",
        ),
        ("bits &= 0x7f800000;", "bits &= 0x7f800000 << (int)(bits % 64 + 32);", "shift exponent"),
    ],
    ids=["a read behind an array", "a shift too far"],
)
def test_a_planted_fault_is_seen(right, wrong, message, tmp_path):
    text = SOURCE.read_text()
    assert text.count(right) == 1
    source = tmp_path / "kernels.c"
    source.write_text(text.replace(right, wrong))
    done = run(compiled(source, tmp_path))
    assert done.returncode != 0 and message in done.stderr
