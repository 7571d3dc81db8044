"""The compiled kernels' part in an installation; everything declarative is in pyproject.toml.

Every wheel carries the sources (``csrc/``). Where torch and a C++ compiler can be had, as with
``pip install --no-build-isolation .``, it also carries the CPU kernels' library, built ahead of
time; with a torch for CUDA and nvcc the CUDA kernels' too, for ``$TORCH_CUDA_ARCH_LIST`` or the
GPUs at hand. Elsewhere the first use compiles them (diffit_kernels/native_library). Neither a
missing compiler nor a failing one fails an installation.
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
    """The package of that name, without the one around it; or None where there is no torch."""
    if importlib.util.find_spec("torch") is None:
        return None
    path = Path(__file__).parent / PACKAGE / "native_library" / "__init__.py"
    spec = importlib.util.spec_from_file_location("native_library", path)
    module = sys.modules["native_library"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def libraries():
    """What can be built here; of the rest the reason is said."""
    if native_library is None:
        return []
    buildable = []
    for library in (native_library.CPU, native_library.CUDA):
        library.ahead_of_time = True
        obstacle = library.unusable() or library.missing_tool()
        if obstacle is None:
            buildable.append(library)
        else:
            text = f"{PACKAGE}: no {library.title} are built ahead of time: {obstacle}"
            print(text, file=sys.stderr)
    return buildable


class BuildSources(build_py):
    """The package, and the sources of its kernels with it."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, PACKAGE, "csrc")
            shutil.rmtree(target, ignore_errors=True)  # a removed source would change the key
            shutil.copytree("csrc", target)


class BuildLibraries(build_ext):
    """The kernels' libraries, in the package; or a message why not."""

    def run(self):
        folder = Path(PACKAGE) if self.inplace else Path(self.build_lib, PACKAGE)
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("_native_*.so"):
            stale.unlink()
        for library in buildable:
            try:
                library.build(folder.resolve())
            except Exception as error:  # of any kind: an installation goes on without
                text = f"{error}\n{PACKAGE}: the first use will compile the {library.title}"
                print(text, file=sys.stderr)


native_library = load_native_library()
buildable = libraries()
setup(
    cmdclass={"build_py": BuildSources, "build_ext": BuildLibraries},
    ext_modules=[Extension(f"{PACKAGE}._native", ["csrc/cpu/bindings.cpp"])] if buildable else [],
)
