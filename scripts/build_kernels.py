"""The hook of the package's build that compiles edgezo/machine/kernels.c with GCC into edgezo/machine/_kernels.so.

Where there is no compiler the package is installed without the library and runs on torch alone: the build does not
fail. OpenMP's functions stay undefined symbols, so that they resolve to the runtime that torch loads.
"""

import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import zlib
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FLAGS = "-std=gnu11 -O3 -fno-math-errno -fno-trapping-math -fopenmp -fPIC -Wall -Wno-psabi"


class KernelsHook(BuildHookInterface):
    """Hatchling calls this before it builds."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the library and add it to the wheel, which is then for this platform only."""
        package = Path(self.root, "edgezo", "machine")
        library = package / "_kernels.so"
        try:
            library.unlink(missing_ok=True)
            compile_to(library, package / "kernels.c")
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or error
            self.app.display_warning(
                f"edgezo is installed without its C kernels, so it runs slower: {reason}"
            )
            return
        build_data["artifacts"].append("edgezo/machine/_kernels.so")
        build_data["pure_python"] = False
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"


def compile_to(library: Path, source: Path) -> None:
    """Compile ``source`` (kernels.c) to ``library``.

    Raises OSError where there is no compiler, ValueError where $CC cannot be parsed, and CalledProcessError, with the
    compiler's message in ``stderr``, where it fails.
    """
    if not sys.platform.startswith("linux"):
        raise OSError(f"the kernels are made for Linux, this is {sys.platform}")
    compiler = shlex.split(os.environ.get("CC", "cc"))
    with tempfile.TemporaryDirectory() as folder:
        define = f"-DEDGEZO_SOURCE={zlib.crc32(source.read_bytes())}u"
        unit, made = Path(folder, "kernels.o"), Path(folder, "kernels.so")
        for command in (
            [*compiler, *FLAGS.split(), define, "-c", str(source), "-o", str(unit)],
            # Not linked with OpenMP's library; calls inside the library are bound to it, whatever else is loaded.
            [*compiler, "-shared", "-Wl,-Bsymbolic", str(unit), "-o", str(made)],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True)
        library.write_bytes(made.read_bytes())
