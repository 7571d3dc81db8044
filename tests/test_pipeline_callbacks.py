"""What the pipeline's callbacks are given, what they may change, and the progress that is shown."""

import pytest
import torch

from diffit_kernels import DiffiTPipeline

pytest.importorskip("diffusers", reason="the sample extra is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = {"num_inference_steps": 4}
LATENTS = STEPS | {"output_type": "latent"}


def packaged(name):
    pipeline = DiffiTPipeline.from_pretrained(name)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def digits():
    return packaged("digits")


def seeded():
    return {"generator": torch.Generator().manual_seed(0)}


@pytest.mark.parametrize("name", ["digits", "image_digits"])
def test_callbacks_come_after_every_step(name):
    pipeline = packaged(name)
    seen = []

    def callback(given, step, time, tensors):
        assert given is pipeline and list(tensors) == ["latents"]
        seen.append((step, time, tensors["latents"]))
        return tensors if step % 2 else None

    found = pipeline([1], callback_on_step_end=callback, **LATENTS, **seeded())
    steps, times, states = zip(*seen, strict=True)
    assert steps == (0, 1, 2, 3)
    first, last = 80 ** (1 / 7), 0.002 ** (1 / 7)
    levels = [(first + i / 3 * (last - first)) ** 7 for i in range(4)]
    assert times == pytest.approx([999, 666, 333, 0] if name == "digits" else levels)
    assert torch.equal(states[-1].float(), found.images)
    assert torch.equal(found.images, pipeline([1], **LATENTS, **seeded()).images)


@pytest.mark.parametrize("name", ["digits", "image_digits"])
def test_callbacks_may_change_the_latents(name):
    """By what they return, or in place."""
    pipeline = packaged(name)

    def halved(_, step, time, tensors):
        return {"latents": tensors["latents"] / 2} if step == 1 else {}

    def halved_in_place(_, step, time, tensors):
        if step == 1:
            tensors["latents"].mul_(0.5)

    plain = pipeline([1], **LATENTS, **seeded()).images
    first, second = (
        pipeline([1], callback_on_step_end=callback, **LATENTS, **seeded()).images
        for callback in (halved, halved_in_place)
    )
    assert torch.equal(first, second) and not torch.equal(first, plain)


def test_callbacks_may_stop(digits):
    """By an exception; or as diffusers' do, and then the latents become images as they are."""

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    with pytest.raises(Stop):
        digits([1], callback_on_step_end=stop, **STEPS)

    states = []

    def interrupt(pipeline, step, time, tensors):
        states.append(tensors["latents"])
        pipeline._interrupt = step == 2

    found = digits([1], callback_on_step_end=interrupt, **LATENTS).images
    assert len(states) == 3 and torch.equal(found, states[-1])
    assert len(digits([1], **STEPS).images) == 1, "the next call goes to its end"


def test_callback_objects_of_diffusers(digits):
    from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

    class Halving(PipelineCallback):
        tensor_inputs = ("latents",)

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return {"latents": callback_kwargs["latents"] / 2}

    once, twice = (MultiPipelineCallbacks([Halving(cutoff_step_ratio=1.0)] * n) for n in (1, 2))
    arguments = LATENTS | {"num_inference_steps": 1}  # a last step, of which nothing follows
    plain = digits([1], **arguments, **seeded()).images
    for callback, factor in ((once, 0.5), (twice, 0.25)):
        found = digits([1], callback_on_step_end=callback, **arguments, **seeded()).images
        assert torch.equal(found, plain * factor)


def test_callbacks_without_tensors_and_with_unknown_ones(digits):
    def callback(_, step, time, tensors):
        assert tensors == {}
        return tensors

    names = {"callback_on_step_end_tensor_inputs": ()}
    assert len(digits([1], callback_on_step_end=callback, **names, **STEPS).images) == 1
    for names in (["noise"], ["latents", "noise"]):
        with pytest.raises(ValueError, match=r"must be of \['latents'\], got \['noise'\]"):
            digits([1], callback_on_step_end_tensor_inputs=names, **STEPS)
    with pytest.raises(ValueError, match=r"dictionary of \['latents'\], got \['noise'\]"):
        digits([1], callback_on_step_end=lambda *_: {"noise": 0}, **STEPS)
    with pytest.raises(ValueError, match=r"must return None or a tensor of shape"):
        digits([1], callback_on_step_end=lambda *_: {"latents": torch.zeros(1)}, **STEPS)


def test_progress_is_shown_and_can_be_hidden(digits, capsys):
    digits([1], **STEPS)
    assert not capsys.readouterr().err
    digits.set_progress_bar_config(desc="digits")
    digits([1], **STEPS)
    assert "digits: 100%" in capsys.readouterr().err
