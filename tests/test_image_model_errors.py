"""The image-space model refuses what it cannot take, by name, rule and value."""

import pytest
import torch

from diffit_kernels.image_model import ImageDiffiT
from tests.test_image_model import BASE, inputs_of, small

BAD_ARGUMENTS = {
    "image_size must be at least 1, got 0": (ValueError, {"image_size": 0}),
    "image_size must be an int, got 8.0": (TypeError, {"image_size": 8.0}),
    "in_channels must be at least 1, got 0": (ValueError, {"in_channels": 0}),
    "channels must be at least 1, got 0": (ValueError, {"channels": (8, 0)}),
    r"channels must be one number, or one for each of 0 stages, got \(\)": (
        ValueError,
        {"channels": ()},
    ),
    "num_cells must be at least 1, got 0": (ValueError, {"num_cells": (1, 0)}),
    r"num_cells must be one number, or one for each of 2 stages, got \(1, 1, 1\)": (
        ValueError,
        {"num_cells": (1, 1, 1)},
    ),
    "window_size must be an int, got 2.0": (TypeError, {"window_size": 2.0}),
    "num_heads must be an int, got '2'": (TypeError, {"num_heads": ["2", 2]}),
    "num_groups must be at least 1, got 0": (ValueError, {"num_groups": 0}),
    "temb_size must be at least 1, got 0": (ValueError, {"temb_size": 0}),
    "temb_size must be even, got 7": (ValueError, {"temb_size": 7}),
    "num_classes must be at least 1, got 0": (ValueError, {"num_classes": 0}),
    "the MLP's width must be at least 1, got 0": (ValueError, {"mlp_ratio": 0.1}),
    "norm_eps must be >= 0, got -1": (ValueError, {"norm_eps": -1}),
    r"class_dropout_prob must be in \[0, 1\], got 2": (ValueError, {"class_dropout_prob": 2}),
    r"skip must be one of \('concatenate', 'add'\), got 'sum'": (ValueError, {"skip": "sum"}),
    r"gelu must be one of \('tanh', 'none'\), got 'erf'": (ValueError, {"gelu": "erf"}),
    "image_size must be a multiple of 2 for 2 stages, got 9": (ValueError, {"image_size": 9}),
    "window_size must divide the side of every stage, got 3 for 4 in stage 1": (
        ValueError,
        {"window_size": (4, 3)},
    ),
    "num_heads must divide the channels of every stage, got 3 for 8 in stage 0": (
        ValueError,
        {"num_heads": 3},
    ),
    "num_groups must divide the channels of every stage, got 3 for 8 in stage 0": (
        ValueError,
        {"num_groups": 3},
    ),
    "use_fused_tmsa must be a bool, got 'yes'": (TypeError, {"use_fused_tmsa": "yes"}),
    "backend must be one of": (ValueError, {"backend": "gpu"}),
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_arguments(message):
    kind, change = BAD_ARGUMENTS[message]
    with pytest.raises(kind, match=message):
        ImageDiffiT(**BASE | change)


BAD_INPUTS = {
    r"x must have shape \(B, 3, 8, 8\), got \(3, 3, 9, 9\)": (
        ValueError,
        {"x": torch.zeros(3, 3, 9, 9)},
    ),
    "x must be torch.float32 like the model, got torch.float64": (
        TypeError,
        {"x": torch.zeros(3, 3, 8, 8).double()},
    ),
    "x must be a tensor, got list": (TypeError, {"x": [1]}),
    "x is on meta, the model on cpu": (ValueError, {"x": torch.zeros(3, 3, 8, 8, device="meta")}),
    "c_noise must be a tensor, got float": (TypeError, {"c_noise": 0.5}),
    r"c_noise must have shape \(3,\), one per sample of x, got \(\)": (
        ValueError,
        {"c_noise": torch.tensor(0.5)},
    ),
    "c_noise must be floating point, got torch.int64": (TypeError, {"c_noise": torch.arange(3)}),
    r"y must have shape \(3,\), one per sample of x, got \(2,\)": (
        ValueError,
        {"y": torch.tensor([1, 2])},
    ),
    "y must be int64 or int32 class labels, got torch.float32": (TypeError, {"y": torch.zeros(3)}),
    r"labels must be in 0\.\.5, got -1\.\.6": (ValueError, {"y": torch.tensor([-1, 0, 6])}),
    "y must be given, num_classes is 5": (ValueError, {"y": None}),
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("message", BAD_INPUTS)
def test_bad_inputs(message, fused):
    kind, change = BAD_INPUTS[message]
    model = small(num_classes=5, use_fused_tmsa=fused)
    given = dict(zip(("x", "c_noise", "y"), inputs_of(model), strict=True)) | change
    with pytest.raises(kind, match=message):
        model(**given)


def test_labels_without_classes():
    model = small()
    with pytest.raises(ValueError, match="y must not be given, num_classes is None"):
        model(*inputs_of(model), torch.tensor([0, 1, 2]))


def test_an_explicit_backend_runs_or_raises():
    model = small(use_fused_tmsa=True, backend="triton").double()
    x, c_noise = (value.double() for value in inputs_of(model))
    with pytest.raises(NotImplementedError, match="backend 'triton' cannot run this on cpu"):
        model(x, c_noise)
    model.backend = None
    model(x, c_noise)
    model.backend = "triton"
    model.use_fused_tmsa = False
    model(x, c_noise)
