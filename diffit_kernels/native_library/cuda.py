"""The CUDA kernels' library: ``csrc/cuda``, by nvcc; the bindings, by the C++ compiler.

The kernels include nothing of torch, so nvcc compiles them on its own, and cudart is linked into
the library: PyTorch's extension builder, which would link what only a torch for CUDA has, gets the
bindings and these objects. So the library is built, and loads, beside a torch for CPUs too, where
tests do so.
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from .library import Library, ninja_on_path, say, variant_of

OLDEST = 80
SPECIFIC = {"90": "90a", "100": "100a"}  # whose own instructions only these names allow
# -v: registers and spills of each kernel, for the log.
NVCC_FLAGS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC", "-Xptxas=-v")


class CudaLibrary(Library):
    """One library for one or more architectures, which its file's name lists: ``80.90a``."""

    name = "cuda"
    title = "CUDA kernels"
    namespace = "diffit_cuda"
    duration = "minutes; MAX_JOBS sets how many files at a time"
    flags = ("-O2", "-g0", "-Wall")

    def architectures(self) -> list[str]:
        """What is compiled for: the GPUs at hand, or ``$TORCH_CUDA_ARCH_LIST`` where there is none
        and, as elsewhere in PyTorch, for an installation that compiles ahead of time."""
        if self.ahead_of_time:
            return listed_architectures() or present_architectures()
        return present_architectures() or listed_architectures()

    def made_for(self) -> str:
        return f"for {_names(variant_of(self._loaded).split('.'))}"

    def made_with(self) -> tuple[str, ...]:
        return (*NVCC_FLAGS, str(torch.version.cuda))

    def variant(self) -> str:
        return ".".join(self.architectures())

    def serves(self, variant: str) -> bool:
        return set(self.architectures()) <= set(variant.split("."))

    def unusable(self) -> str | None:
        if (why := super().unusable()) is not None:
            return why
        if torch.version.cuda is None:
            return f"this torch, {torch.__version__}, is built without CUDA"
        return None

    def missing_tool(self) -> str | None:
        if (compiler := find_nvcc()) is None:
            where = f" in CUDA_HOME, {_home()}" if _home() else ""
            return f"there is no nvcc{where}; install the CUDA toolkit, or set CUDA_HOME to it"
        release, ours = nvcc_release(compiler), torch.version.cuda
        if ours is not None and release.partition(".")[0] != ours.partition(".")[0]:
            return (
                f"{compiler} is of CUDA {release}, and this torch of CUDA {ours}; install the "
                f"toolkit of {ours}, or set CUDA_HOME to it"
            )
        if not self.architectures():
            return "there is no GPU to compile for; set TORCH_CUDA_ARCH_LIST, to 8.0;9.0, say"
        return super().missing_tool()

    def compile_kernels(self, folder: Path) -> list[str]:
        say(f"architectures: {_names(self.architectures())}")
        sources = sorted((self.sources / self.name).glob("*.cu"))
        self.report = compile_objects(
            sources, folder, self.architectures(), (f"-I{self.sources}",), progress=say
        )
        # Symbols of the linked cudart are hidden, from torch's own and from other libraries.
        objects = [f"{source.stem}.cuda.o" for source in sources]
        return [*objects, *cudart_flags(), "-Wl,--exclude-libs,ALL"]


def compile_objects(
    sources: Sequence[Path],
    folder: Path,
    architectures: Sequence[str],
    flags: Sequence[str] = (),
    progress: Callable[[str], None] = lambda text: None,
) -> str:
    """Compile each ``x.cu`` to ``folder/x.cuda.o`` by nvcc, several at a time, and return what it
    said: registers and spills of every kernel.

    Raises:
        RuntimeError: a compilation failed; the message is nvcc's output.
    """
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
    command = shlex.join([find_nvcc(), *NVCC_FLAGS, *targets, *flags]).replace("$", "$$")
    lines = ["rule nvcc", f"  command = {command} -c $in -o $out", "  description = $out"]
    for source in sources:
        path = re.sub(r"([$ :])", r"$\1", str(source))
        lines += [f"build {source.stem}.cuda.o: nvcc {path}", f"  description = {source.name}"]
    (folder / "build.ninja").write_text("\n".join([*lines, ""]))
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS", "").isdigit() else []
    with (
        ninja_on_path(),
        subprocess.Popen(
            ["ninja", *jobs],
            cwd=folder,
            env={**os.environ, "NINJA_STATUS": "[%f/%t] "},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        said = []
        for line in process.stdout:
            said.append(line)
            if re.match(r"\[\d+/\d+\] ", line):
                progress(line.strip())
    if process.returncode != 0:
        raise RuntimeError("".join(said))
    return "".join(said)


def find_nvcc() -> str | None:
    """The compiler: of ``$CUDA_HOME`` or ``$CUDA_PATH``, else of PATH or ``/usr/local/cuda``."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"))
    return shutil.which("nvcc", path=os.path.join(_home(), "bin") if _home() else path)


def nvcc_release(compiler: str) -> str:
    """The CUDA that a compiler is of: ``13.0``."""
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    return found[1] if found else "unknown"


def cudart_flags() -> list[str]:
    """What the linker takes to put nvcc's own cudart into a library."""
    said = subprocess.run([find_nvcc(), "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    places = re.search(r"^#\$ LIBRARIES=(.*)$", said, re.MULTILINE)
    folders = [shlex.quote(flag) for flag in shlex.split(places[1] if places else "")]
    return [*folders, "-lcudart_static", "-ldl", "-lrt", "-lpthread"]


def present_architectures() -> list[str]:
    """Of the GPUs that this process sees and that the kernels can run on."""
    found = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
    return _architectures(f"{major}.{minor}" for major, minor in found)


def listed_architectures() -> list[str]:
    """Of ``$TORCH_CUDA_ARCH_LIST`` (``8.0;9.0``), without those that the kernels cannot run on."""
    return _architectures(re.split(r"[;, ]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "")))


def _home() -> str | None:
    return os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")


def _architectures(capabilities: Iterable[str]) -> list[str]:
    """Names, as in ``sm_90a``, of capabilities such as 9.0, 9.0a or 9.0+PTX; others are left out,
    as is PTX: a library for another GPU is compiled where that GPU is."""
    found = (re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", capability) for capability in capabilities)
    names = {match[1] + match[2] for match in found if match}
    return [SPECIFIC.get(name, name) for name in sorted(names, key=int) if int(name) >= OLDEST]


def _names(architectures: Iterable[str]) -> str:
    return ", ".join(f"sm_{name}" for name in architectures)
