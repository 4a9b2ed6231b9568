"""The table of all ops: fused and eager are interchangeable."""

import inspect

import pytest
from pixelgen_kernels import OP_NAMES, select


@pytest.mark.parametrize("name", OP_NAMES)
def test_fused_and_eager_have_one_signature(name):
    fused, eager = getattr(select("auto"), name), getattr(select("eager"), name)
    assert fused is not eager
    assert inspect.signature(fused) == inspect.signature(eager)


def test_unknown_kernels_are_refused():
    with pytest.raises(ValueError, match="kernels must be 'auto' or 'eager', got 'cuda'"):
        select("cuda")
