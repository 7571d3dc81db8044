"""The package as installed: import without Triton or a compiler, info, the command line."""

import os
import subprocess
import sys

import diffit_kernels
from diffit_kernels.cli import main
from diffit_kernels.dispatch import BACKENDS, REGISTRY


def test_import_needs_no_compiler_no_triton_and_no_extras(tmp_path):
    """With all of them and the cache of compiled kernels hidden, the package computes."""
    code = """
import sys
for name in ("triton", "diffusers", "huggingface_hub", "tqdm", "PIL"):
    sys.modules[name] = None  # what the import system takes for "not installed"
import torch
from diffit_kernels import DiffiT
model = DiffiT(input_size=4, hidden_size=16, depth=1, num_heads=2, use_fused_tmsa=True)
model(torch.zeros(1, 4, 4, 4), torch.zeros(1), torch.zeros(1, dtype=torch.long)).sum().backward()
from diffit_kernels.cli import main
assert main(["info"]) == 0
assert main(["sample", "--model_path", "digits"]) == 2
"""
    hidden = {"CXX": "/nowhere/c++", "DIFFIT_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **hidden},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "pip install 'diffit-kernels[sample]'" in result.stderr


def test_info_names_every_op_and_every_reason(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert diffit_kernels.__version__ in text and "torch" in text and "cpu:" in text
    for name, op in REGISTRY.items():
        assert f"  {name} " in text
        for backend in BACKENDS:
            if not op.is_built(backend):
                assert f"not {backend}: {op.refusal(backend)}" in text


def test_module_runs_as_a_program():
    command = [sys.executable, "-m", "diffit_kernels", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == diffit_kernels.__version__


def test_public_names():
    assert all(hasattr(diffit_kernels, name) for name in diffit_kernels.__all__)
