"""The compiled kernels' part in an installation; everything declarative is in pyproject.toml.

Every wheel carries the sources (``csrc/``). Where torch and a C++ compiler can be had, as with
``pip install --no-build-isolation .``, it also carries the library, built ahead of time; elsewhere
the first use compiles it (diffit_kernels/native_library.py). Neither a missing compiler nor a
failing one fails an installation.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

PACKAGE = "diffit_kernels"


def load_native_library():
    """The module of that name, without its package; or None where nothing can be compiled."""
    if importlib.util.find_spec("torch") is None:
        return None
    path = Path(__file__).parent / PACKAGE / "native_library.py"
    spec = importlib.util.spec_from_file_location("native_library", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    obstacle = module.switched_off() or module.missing_tool()
    if obstacle is not None:
        print(f"{PACKAGE}: no kernels are built ahead of time: {obstacle}", file=sys.stderr)
    return module if obstacle is None else None


class BuildSources(build_py):
    """The package, and the sources of its kernels with it."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, PACKAGE, "csrc")
            shutil.rmtree(target, ignore_errors=True)  # a removed source would change the key
            shutil.copytree("csrc", target)


class BuildLibrary(build_ext):
    """The kernels' library, in the package; or a message why not."""

    def run(self):
        folder = Path(PACKAGE) if self.inplace else Path(self.build_lib, PACKAGE)
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("_native_*.so"):
            stale.unlink()
        try:
            native_library.build(folder.resolve())
        except Exception as error:  # of any kind: an installation goes on without
            print(f"{error}\n{PACKAGE}: the first use will compile the kernels", file=sys.stderr)


native_library = load_native_library()
setup(
    cmdclass={"build_py": BuildSources, "build_ext": BuildLibrary},
    ext_modules=[Extension(f"{PACKAGE}._native", ["csrc/bindings.cpp"])] if native_library else [],
)
