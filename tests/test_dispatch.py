"""One place chooses the backend: explicit requests run or raise, defaults speak when they fall."""

import sys
import threading
import types
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffit_kernels import dispatch, use_backend
from diffit_kernels.dispatch import FusedOp
from diffit_kernels.ops import adaln

X = torch.zeros(1, 2, 8, dtype=torch.float64)  # which no kernels but PyTorch's take
Y = X.float()


def module(name, factor, refusal=None):
    """A backend of a toy op, out = factor · x, as a module in a stage's package."""
    result = types.ModuleType(name)
    result.__spec__ = types.SimpleNamespace(loader=None, name=name)
    result.forward = lambda x: x * factor
    result.backward = lambda grad: grad * factor
    result.can_run = lambda x: refusal
    return result


@pytest.fixture
def toy(request):
    """A stage with an eager backend, a native one that refuses, and no triton one."""
    package = f"toy_{request.node.name}".replace("[", "_").replace("]", "")
    names = {
        package: types.ModuleType(package),
        f"{package}.eager": module(f"{package}.eager", 2),
        f"{package}.native": module(f"{package}.native", 3, "it is Tuesday"),
    }
    names[package].__path__ = []
    sys.modules.update(names)
    yield FusedOp(
        package,
        package,
        schema="(Tensor x) -> Tensor",
        backward_schema="(Tensor grad) -> Tensor",
        fake=torch.empty_like,
        backward_fake=torch.empty_like,
        setup_context=lambda ctx, inputs, output: None,
        backward=lambda op, ctx, grad: op(grad),
    )
    dispatch.REGISTRY.pop(package)
    for name in names:
        sys.modules.pop(name)


def test_a_plugged_in_backend_is_an_overload_with_its_own_gradient(toy):
    toy._implementations["native"].can_run = lambda x: None
    x = X.clone().requires_grad_()
    (out := toy(x.device, x)).sum().backward()
    assert toy.choose(x.device, x) == "native"
    assert torch.equal(x.grad, torch.full_like(x, 3)) and out.grad_fn is not None
    assert str(toy.overload("native")) == f"diffit.{toy.name}.native"
    torch.library.opcheck(toy.overload("native"), (x,))


def test_a_default_that_falls_warns_once(toy):
    with pytest.warns(RuntimeWarning, match="'native' is passed over: it is Tuesday"):
        assert toy.choose(Y.device, Y) == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert toy.choose(Y.device, Y) == "eager"


def test_a_default_is_silent_where_no_kernels_are_meant_to_serve(toy):
    """In float64, and on device types that the backend has no kernels for."""
    with FakeTensorMode():
        z = torch.empty(1, 2, 8, device="cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert toy.choose(X.device, X) == toy.choose(z.device, z) == "eager"
    assert toy.is_built("native") and toy.is_built("native", "cpu")
    assert not toy.is_built("native", "cuda") and toy.is_built("eager", "cuda")
    with pytest.raises(NotImplementedError, match="this release has no native kernels for cuda"):
        toy(z.device, z, backend="native")
    toy._implementations["native"].DEVICES = ("cuda",)
    assert toy.is_built("native", "cuda") and not toy.is_built("native", "cpu")


def test_an_explicit_request_runs_or_raises(toy):
    assert toy.choose(X.device, X, backend="eager") == "eager"
    with pytest.raises(
        NotImplementedError,
        match=r"'native' cannot run this on cpu: it is Tuesday\. Backends that can: eager\.",
    ):
        toy(X.device, X, backend="native")
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'cuda'"):
        toy(X.device, X, backend="cuda")


def test_a_backend_that_fails_to_import_is_a_reason_and_not_an_error(tmp_path, monkeypatch):
    (tmp_path / "broken_stage").mkdir()
    (tmp_path / "broken_stage" / "__init__.py").touch()
    (tmp_path / "broken_stage" / "native.py").write_text("import no_such_toolchain")
    monkeypatch.syspath_prepend(tmp_path)
    loaded, reason, worth_a_warning = dispatch._load("broken_stage", "native")
    assert loaded is None and worth_a_warning
    assert "native kernels could not be imported: No module named 'no_such_toolchain'" in reason


def test_use_backend_scopes_nests_and_restores():
    with use_backend("triton"):
        with pytest.raises(NotImplementedError, match="adaln: backend 'triton' cannot run"):
            adaln(X)
        with use_backend("eager"):
            adaln(X)
        adaln(X, backend="eager")
        with use_backend(None):
            adaln(X)
    adaln(X)
    with pytest.raises(ValueError, match="backend must be one of"), use_backend("cuda"):
        pass


def test_use_backend_belongs_to_its_thread():
    results = []
    with use_backend("triton"):
        thread = threading.Thread(target=lambda: results.append(adaln(X)))
        thread.start()
        thread.join()
    assert len(results) == 1


def test_compiled_code_follows_use_backend():
    compiled = torch.compile(lambda x: adaln(x), fullgraph=True, backend="eager")
    compiled(X)
    with use_backend("triton"), pytest.raises(Exception, match="backend 'triton' cannot run"):
        compiled(X)
