"""Repairs to Triton's interpreter, so that kernels run in it as they stand.

Triton 3.6 keeps bfloat16 as its bits in uint16, multiplies those bits in ``tl.dot``, and cuts off
the low half when it rounds float32; and a loop bound that is not a constant is converted in a way
that NumPy 2.4 refuses. None of this touches compiled kernels.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def repair() -> None:
    """Replace the faulty operations of the interpreter, once."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "repaired_by_diffit", False):
        return
    cast, dot, patch_tensor = builder.cast_impl, builder.create_dot, interpreter._patch_lang_tensor

    def cast_impl(self, src, dst_type):
        pair = src.dtype.scalar, dst_type.scalar
        if pair == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(_to_bfloat16(src.data), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(_to_float32(src.data), tl.float32)
        return cast(self, src, dst_type)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (
            interpreter.TensorHandle(_to_float32(x.data), tl.float32)
            if x.dtype.scalar == tl.bfloat16
            else x
            for x in (a, b)
        )
        return dot(self, a, b, d, input_precision, max_num_imprecise_acc)

    def patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    interpreter._patch_lang_tensor = patch_lang_tensor
    builder.repaired_by_diffit = True


def _to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
