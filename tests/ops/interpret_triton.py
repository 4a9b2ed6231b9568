"""The Triton kernels under the interpreter, on the CPU. test_triton.py runs this in a process of its own.

Triton decides at import whether functions are interpreted, also for its own library, so one process cannot
do both. Of the imported tests those run that have the name of an op in Triton.
"""
# ruff: noqa: F401

import pytest
from op_testing import OPS, check_accuracy, inputs_of
from pixelgen_kernels.fused import LIBRARY
from pixelgen_kernels.ops import qk_norm_rope_triton as kernels
from test_ops import (
    test_accuracy,
    test_any_mixture_of_dtypes,
    test_outputs_are_fresh,
    test_some_outputs_or_one_input,
    test_upstream_gradients_of_any_layout,
)
from test_qk_norm_rope import (
    GRADS,
    test_gradients_of_attention_for_qk_norm_rope,
    test_more_tiles_of_qk_norm_rope,
    test_non_finite_values_stay_in_their_head_of_qk_norm_rope,
    test_strided_weights_and_angles_of_qk_norm_rope,
)
from test_swiglu import test_more_tiles_of_swiglu, test_special_values_of_swiglu

for kernel in (kernel for op in OPS.values() for kernel in (op.call.fwd, op.call.bwd)):
    if kernel is not None and kernel._triton is not None:
        LIBRARY.impl(kernel.name, kernel.on_cuda, "CPU", allow_override=True)


def test_64_bit_rows_of_qk_norm_rope(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic of more tokens than 32 bits count, on fewer."""
    counted = kernels._grid_and_constants
    launches = []

    def with_64_bits(*arguments):
        launches.append(arguments)
        programs, constants = counted(*arguments)
        return programs, constants | {"INDEX": kernels.tl.int64}

    monkeypatch.setattr(kernels, "_grid_and_constants", with_64_bits)
    op = OPS["qk_norm_rope"]
    check_accuracy(op.fused, op.eager, inputs_of(op.name, 2, 5, 3, 8, 2), GRADS)
    assert len(launches) == 2  # so it is Triton that runs here
