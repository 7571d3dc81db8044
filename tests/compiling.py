"""A folder in which tests run processes that compile, with stand-ins for the compilers.

That for the C++ compiler copies a library that is there, at once or when it is let go, or fails;
that for nvcc makes empty objects, or fails.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = """#!/bin/sh
case "$*" in *-dumpversion*) echo 12.2.0; exit;; esac
for argument; do test "$previous" = -o && out=$argument; previous=$argument; done
case "$out" in
  *.so) echo link >> "$STANDIN_LOG"
     while test -e "$STANDIN_HELD_BY"; do sleep 0.1; done
     cp "$STANDIN_LIBRARY" "$out";;
  *) test "$STANDIN_LIBRARY" || { echo "a.cpp:1:2: error: it is Tuesday"; exit 1; }
     : > "$out";;
esac
"""
NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release $STANDIN_CUDA, V$STANDIN_CUDA.88"; exit;;
  *--dryrun*) echo '#$ LIBRARIES=  "-L/nowhere"' >&2; exit;;
esac
test "$STANDIN_LIBRARY" || { echo "a.cu(12): error: it is Tuesday"; exit 1; }
for argument; do test "$previous" = -o && : > "$argument"; previous=$argument; done
echo "ptxas info    : Compiling entry function 'kernel'"
"""


class Place:
    """A cache folder, an environment, and Python processes in them."""

    def __init__(self, folder):
        self.folder, self.cache, self.log = folder, folder / "cache", folder / "log"
        self.compiler = folder / "g++"
        self.compiler.write_text(COMPILER)
        self.compiler.chmod(0o755)
        self.environment = {
            **os.environ,
            "DIFFIT_CACHE_DIR": str(self.cache),
            "PYTHONPATH": str(ROOT),
        }
        for name in ("DIFFIT_NATIVE", "DIFFIT_CPU_CAPABILITY", "TORCH_CUDA_ARCH_LIST"):
            self.environment.pop(name, None)

    def stand_in(self, library, held_by=""):
        """From here on, processes compile with the stand-in, which fails without a ``library``, and
        does not end while there is a file ``held_by``."""
        self.environment |= {
            "CXX": str(self.compiler),
            "STANDIN_LOG": str(self.log),
            "STANDIN_LIBRARY": str(library or ""),
            "STANDIN_HELD_BY": str(held_by),
        }

    def empty_library(self):
        """A shared library with nothing in it, for the stand-in to copy."""
        library, command = self.folder / "empty.so", ["c++", "-shared", "-x", "c++", "/dev/null"]
        try:
            subprocess.run([*command, "-o", library], check=True)
        except OSError as error:
            pytest.skip(f"there is no C++ compiler: {error}")
        return library

    def stand_in_for_cuda(self, architectures):
        """From here on, processes find a CUDA toolkit, whose nvcc is a stand-in."""
        nvcc = self.folder / "cuda" / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(NVCC)
        nvcc.chmod(0o755)
        self.environment |= {
            "CUDA_HOME": str(self.folder / "cuda"),
            "STANDIN_CUDA": "13.0",
            "TORCH_CUDA_ARCH_LIST": architectures,
        }

    def start(self, code, **options):
        return subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def run(self, code):
        """(what it prints, what it says on stderr) of a process that succeeds."""
        process = self.start(code)
        out, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
        return out.strip(), said.strip()

    def links(self):
        return self.log.read_text().count("link") if self.log.exists() else 0

    def files(self):
        """What is in the cache folder: names without keys, or suffixes."""
        return sorted(path.suffix or path.name.partition("-")[0] for path in self.cache.iterdir())


def digest(path):
    """Of a library's content, as in its name."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
