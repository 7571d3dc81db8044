"""The step of sampling on buffers of its own: what a CUDA graph does with it, batch after batch.

Without a GPU the step is traced, which fixes what a capture fixes: every kernel, every buffer,
every number that the host knew; and refuses what a capture refuses, a number read from the device.
What is replayed then is the trace.
"""

import gc
import weakref

import pytest
import torch
from torch import _dynamo as dynamo
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from diffit_kernels import DiffiT, from_pretrained
from diffit_kernels.model import LabelEmbedder
from diffit_kernels.precision import apply_precision
from diffit_kernels.sampling import Denoiser, Savings, denoise, initial_noise, sample_generator
from diffit_kernels.sampling.noise import step_noise
from diffit_kernels.sampling.predict import Predictor, takes_time_parts
from diffit_kernels.sampling.schedule import SAMPLERS
from diffit_kernels.sampling.step import capture_for
from tests.parity import assert_close

pytest.importorskip("diffusers", reason="the sample extra is not installed")
LABELS = torch.tensor([3, 1, 3])
WITHOUT_GRAPH = Savings(step_graph=False)


def traced(runs):
    """In place of CUDA graphs: replays of traces, which keep no memory."""
    return [make_fx(_without_result(run))() for run in runs], 0


def _without_result(run):
    def traced_run():
        assert run() is None

    return traced_run


@pytest.fixture
def captured(monkeypatch):
    """Denoisers make graphs, as on CUDA; the numbers of graphs made for each size of batch."""
    made = []

    def capture(runs):
        made.append(len(runs))
        return traced(runs)

    monkeypatch.setattr("diffit_kernels.sampling.step.capture_for", lambda *_: capture)
    monkeypatch.setattr(LabelEmbedder, "check", lambda *_: None)  # a CPU alone reads the values
    return made


def small(**kwargs):
    torch.manual_seed(0)
    sizes = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = DiffiT(**sizes | {"use_fused_tmsa": True} | kwargs).eval()
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.2)
    return model


def model_of(name):
    model = small(**MODELS[name])
    if name == "8-bit layers":  # as on a GPU, whose products a CPU has in software
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("diffit_kernels.precision.refusal", lambda *_: None)
            apply_precision(model, "fp8")
        assert takes_time_parts(model), "nothing of what sampling saves is lost"
    return model.double() if name == "float64" else model


def batch(model, count=3, seed=0):
    return initial_noise(model, [sample_generator(seed, index) for index in range(count)])


def run(denoiser, latents, labels, **kwargs):
    generators = [torch.Generator().manual_seed(i) for i in range(len(latents))]
    return denoiser(latents, labels, generators=generators, **kwargs)


MODELS = {
    "fused": {},
    "literal": {"use_fused_tmsa": False},
    "adaLN": {"conditioning": "adaln_zero"},
    "constant weight of guidance": {"input_size": 64, "patch_size": 8},
    "float64": {"backend": "eager"},
    "8-bit layers": {},
}


@pytest.mark.parametrize(
    "name, sampler, cfg_scale",
    [
        *(("fused", sampler, scale) for sampler in SAMPLERS for scale in (None, 4.4)),
        *((name, "ddpm", 4.4) for name in MODELS if name != "fused"),
    ],
)
def test_replayed_steps_are_the_steps(name, sampler, cfg_scale, captured, monkeypatch):
    """To the bit; with the next batch's noise and labels; and again for a batch of another size."""
    model = model_of(name)
    dtype = torch.float64 if name == "float64" else torch.float32
    settings = {"num_steps": 5, "sampler": sampler, "cfg_scale": cfg_scale}
    denoiser = Denoiser(model, **settings)
    batches = [(3, 0, LABELS), (3, 1, LABELS - 1), (2, 2, LABELS[:2]), (3, 0, LABELS)]
    batches = [(batch(model, count, seed).to(dtype), labels) for count, seed, labels in batches]
    found = []
    for latents, labels in batches:
        found.append(run(denoiser, latents, labels))
        assert denoiser.graph_bytes == 0
    assert len(captured) == 3, "one capture for each change of size"
    monkeypatch.setattr("diffit_kernels.sampling.step.capture_for", lambda *_: None)
    for (latents, labels), result in zip(batches, found, strict=True):
        plain = Denoiser(model, **settings)
        assert torch.equal(run(plain, latents, labels), result)
        assert plain.graph_bytes is None
    assert torch.equal(found[0], found[3]) and not torch.equal(found[0], found[1])


def test_graphs_are_made_of_the_steps_there_are(captured):
    model = small()
    for settings, expected in (
        ({"num_steps": 6, "cfg_scale": 4.4}, 2),
        ({"num_steps": 6, "cfg_scale": 4.4, "savings": Savings(skipped_guidance=False)}, 1),
        ({"num_steps": 6}, 1),
        ({"num_steps": 1, "cfg_scale": 4.4}, 1),
    ):
        run(Denoiser(model, **settings), batch(model), LABELS)
        assert captured.pop() == expected


def test_a_denoiser_lets_go_of_its_memory(captured):
    """At once, and not when garbage is collected: a graph's memory is large."""
    model = small()
    denoiser = Denoiser(model, num_steps=3, cfg_scale=4.4)
    run(denoiser, batch(model), LABELS)
    first = weakref.ref(denoiser._step)
    gc.disable()
    try:
        run(denoiser, batch(model, 2), LABELS[:2])
        assert first() is None
        second = weakref.ref(denoiser._step)
        del denoiser
        assert second() is None
    finally:
        gc.enable()


class Asked(TorchDispatchMode):
    """Numbers that the host reads from a tensor, and shapes that depend on values."""

    WAITING = ("_local_scalar_dense", "nonzero", "_unique2", "masked_select", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name in self.WAITING:
            self.found.append(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_host_reads_nothing_in_the_loop(sampler, monkeypatch):
    """Nor in what is outside the graph: noise, hooks, and the decision about guidance."""
    monkeypatch.setattr(LabelEmbedder, "check", lambda *_: None)  # a CPU alone reads the values
    model, asked = small(), Asked()
    denoiser = Denoiser(model, num_steps=5, sampler=sampler, cfg_scale=4.4)
    latents = batch(model)
    run(denoiser, latents, LABELS)
    seen = []

    def after(state):
        if not seen:
            asked.__enter__()  # from the end of the first step
        seen.append(state)
        if len(seen) == 5:
            asked.__exit__(None, None, None)

    run(denoiser, latents, LABELS, on_step_end=after)
    assert len(seen) == 5 and asked.found == []


def test_what_a_hook_sees_and_returns():
    model = small()
    settings = {"num_steps": 4, "cfg_scale": 4.4, "sampler": "ddim"}
    seen = []
    expected = denoise(model, batch(model), LABELS, on_step_end=seen.append, **settings)
    assert len(seen) == 4 and torch.equal(seen[-1], expected)
    assert not torch.equal(seen[0], seen[1]), "each its own copy"

    replacing = iter([None, seen[0] * 2, None, None])
    changed = denoise(
        model, batch(model), LABELS, on_step_end=lambda _: next(replacing), **settings
    )
    twice = iter([seen[0], seen[0] * 2])
    again = denoise(model, seen[3], LABELS, on_step_end=lambda _: next(twice, None), **settings)
    assert torch.equal(changed, again) and not torch.equal(changed, expected)
    with pytest.raises(ValueError, match=r"shape \(3, 4, 8, 8\), got \(3, 4, 3, 8\)"):
        denoise(model, batch(model), LABELS, on_step_end=lambda x: x[:, :, :3], **settings)


def test_what_is_captured():
    """Not on a CPU; and no model on which something hangs that only the host would do."""
    model = small()
    on_cuda = type("Latents", (), {"device": torch.device("cuda:0"), "__len__": lambda _: 2})()
    assert capture_for(Predictor(model, [0, 999]), torch.zeros(2, 4, 8, 8)) is None
    assert capture_for(Predictor(model, [0, 999]), on_cuda) is not None
    assert capture_for(Predictor(model, [0, 999], savings=WITHOUT_GRAPH), on_cuda) is None
    model.blocks[0].register_forward_hook(lambda *_: None)
    assert capture_for(Predictor(model, [0, 999]), on_cuda) is None


def test_compiled_steps():
    """Each kind is one graph, for the next batch too; to rounding, of which compilers have more."""
    model = small()
    plain, compiled = (
        Denoiser(model, num_steps=4, cfg_scale=4.4, compiled=value) for value in (False, True)
    )
    for seed in (0, 1):
        latents, labels = batch(model, seed=seed), LABELS - seed
        with dynamo.config.patch(error_on_recompile=seed > 0):
            found = run(compiled, latents, labels)
        assert_close(found, run(plain, latents, labels), 1e-5)
    for guided in (False, True):
        with torch.inference_mode():
            plain._step.begin(latents, labels)
            explained = dynamo.explain(plain._step._run)(guided)
        assert explained.graph_break_count == 0 and explained.graph_count == 1


def test_a_step_that_cannot_be_captured_is_taken_without(monkeypatch):
    """On CUDA what fails in a capture is said once, and sampling goes on."""
    model = small()
    expected = run(Denoiser(model, num_steps=3), batch(model), LABELS)
    denoiser = Denoiser(model, num_steps=3)

    def failing(runs):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("diffit_kernels.sampling.step.capture_for", lambda *_: failing)
    with pytest.warns(RuntimeWarning, match="goes on kernel by kernel.*not permitted"):
        found = run(denoiser, batch(model), LABELS)
    assert torch.equal(found, expected) and denoiser.graph_bytes is None


def test_noise_of_generators():
    latents = torch.zeros(2, 4, 8, 8)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    own = step_noise(latents, generators)
    for seed, found in zip((5, 6), own, strict=True):
        drawn = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(found, drawn)
    shared = step_noise(latents, [torch.Generator().manual_seed(5)])
    assert torch.equal(shared, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5)))
    torch.manual_seed(5)
    assert torch.equal(step_noise(latents, None), shared)
    assert step_noise(latents.double(), generators).dtype == torch.float64
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is longer"):
        step_noise(torch.zeros(3, 4, 8, 8), generators)


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@CUDA
@pytest.mark.parametrize("name", MODELS)
def test_cuda_graphs_give_the_plain_steps(name):
    model = model_of(name).cuda()
    settings = {"num_steps": 6, "cfg_scale": 4.4}
    graphs, plain = (Denoiser(model, savings=s, **settings) for s in (Savings(), WITHOUT_GRAPH))
    for count, seed in ((3, 0), (3, 1), (2, 2)):
        latents, labels = batch(model, count, seed), LABELS[:count].cuda()
        assert torch.equal(run(graphs, latents, labels), run(plain, latents, labels))
        assert graphs.graph_bytes > 0 and plain.graph_bytes is None


@CUDA
def test_cuda_graphs_take_little_more_memory_than_plain_steps():
    model = from_pretrained("digits", use_fused_tmsa=True, device="cuda")
    latents = batch(model, 512)
    labels = torch.arange(512, device="cuda") % 10
    peaks = []
    for savings in (WITHOUT_GRAPH, Savings()):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        Denoiser(model, num_steps=6, cfg_scale=3.0, savings=savings)(latents, labels)
        peaks.append(torch.cuda.max_memory_reserved())
    assert peaks[1] <= 1.2 * peaks[0]


@CUDA
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmsolver++"])
def test_no_synchronisation_in_the_loop_on_cuda(sampler):
    model = small().cuda()
    denoiser = Denoiser(model, num_steps=6, cfg_scale=4.4, sampler=sampler)
    latents, labels, steps = batch(model), LABELS.cuda(), []

    def after_the_first():
        steps.append(None)
        torch.cuda.set_sync_debug_mode("error" if len(steps) < 6 else "default")

    expected = run(denoiser, latents, labels)
    try:
        found = run(denoiser, latents, labels, on_step=after_the_first)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)
