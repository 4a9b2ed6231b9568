"""Registration: from the two references of an op to a differentiable `torch.library` op.

The forward reference gives the schema, the backward reference the context: its parameters are `grad_<output>`
for upstream gradients, and inputs and outputs of forward by name. An op takes the tensors of its reference,
then the plain values; a compiled function of the same name takes the outputs in between:
`_C.<op>_fwd(x, y, eps)`. Values that it does not name, such as the dtype of an output, it does without.
"""

import functools
import importlib
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_origin

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pixelgen_kernels.native import _C, check_cuda, has_cuda

__all__ = ["Kernel", "below_autograd", "dense", "register", "rows"]

LIBRARY = torch.library.Library("pixelgen", "FRAGMENT")
# Where nothing is to be recorded: without the visit to autograd's dispatch key, which is Python.
below_autograd = torch._C._AutoDispatchBelowAutograd


def dense(tensor: Tensor) -> Tensor:
    """Uninitialised, of its shape and dtype."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def rows(grad: Tensor) -> Tensor:
    """An upstream gradient as compiled code reads it: autograd may have expanded it from fewer numbers."""
    if grad.stride(-1) == 1 and (grad.dim() <= 3 or rows_collapse(grad, 2)):
        return grad
    return grad.contiguous()


def rows_collapse(x: Tensor, last: int = 1) -> bool:
    """Whether the dimensions of x but the `last` ones are evenly spaced: they are one dimension of a view."""
    end = x.dim() - last
    dims = [(x.shape[i], x.stride(i)) for i in range(end) if x.shape[i] != 1]
    return all(dims[i][1] == dims[i + 1][0] * dims[i + 1][1] for i in range(len(dims) - 1))


def _is_tensor(parameter: inspect.Parameter) -> bool:
    return parameter.annotation in (Tensor, Tensor | None)


def _parameters(reference: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What the op of a reference takes: the tensors first."""
    parameters = inspect.signature(reference).parameters
    return dict(sorted(parameters.items(), key=lambda item: not _is_tensor(item[1])))


class Kernel:
    """One direction of an op: `op` is what PyTorch calls, the methods what it does on a device.

    Attributes:
        name: `<op>_fwd` or `<op>_bwd`, of the `torch.library` op and of the compiled function.
        native: the compiled function.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        empty: Callable[..., Any],
        main: int,
        triton: str | None,
        readable: Callable[[Tensor], Tensor] = rows,
    ) -> None:
        parameters = _parameters(reference)
        self.name, self.reference, self.empty = name, reference, empty
        self.arguments = list(parameters)
        self._num_tensors = sum(map(_is_tensor, parameters.values()))
        self._main = main
        self._grads = [i for i, key in enumerate(parameters) if key.startswith("grad_")]
        self._is_single = inspect.signature(reference).return_annotation is Tensor
        self._triton, self._readable = triton, readable
        self._without_triton: Callable[..., Any] = self._first_on_cuda
        self.native = getattr(_C, name, None)
        named = () if self.native is None else inspect.signature(self.native).parameters
        self._values = _picked(
            i for i, (key, p) in enumerate(parameters.items()) if key in named and not _is_tensor(p)
        )
        LIBRARY.define(name + _schema(reference), tags=torch.Tag.pt2_compliant_tag)
        LIBRARY.impl(name, self.by_reference, "CompositeExplicitAutograd")
        if self.native is not None:
            LIBRARY.impl(name, self.compiled, "CPU")
        if triton is not None or self.native is not None:
            LIBRARY.impl(name, self.on_cuda, "CUDA")
        torch.library.register_fake(f"pixelgen::{name}", empty, lib=LIBRARY)
        self.op = getattr(torch.ops.pixelgen, name).default
        self.call = self.op._op  # the same without a Python frame

    def by_reference(self, *args: Any) -> Any:
        """The definition, with fresh outputs in the layout of compiled code; what is None is left empty."""
        outputs = self.empty(*args)
        values = self.reference(**dict(zip(self.arguments, args, strict=True)))
        if isinstance(outputs, Tensor):
            return outputs.copy_(values)
        for output, value in zip(outputs, values, strict=True):
            if value is not None:
                output.copy_(value)
        return outputs

    def compiled(self, *args: Any) -> Any:
        """The compiled function; without data, zeros: those of sums over nothing."""
        outputs = self.empty(*args)
        if args[self._main].numel() == 0:
            for output in (outputs,) if self._is_single else outputs:
                output.zero_()
            return outputs
        self._call_native((outputs,) if self._is_single else outputs, args)
        return outputs

    def _call_native(self, outputs: tuple[Tensor, ...], args: tuple[Any, ...]) -> None:
        for i in self._grads:
            grad = args[i]
            if grad is not None and not grad.is_contiguous():
                args = (*args[:i], self._readable(grad), *args[i + 1 :])
        self.native(*args[: self._num_tensors], *outputs, *self._values(args))  # type: ignore[misc]

    def into(self, outputs: tuple[Tensor, ...], *args: Any) -> None:
        """Compiled code or Triton, into dense tensors; the code says which of them may be arguments."""
        if args[self._main].is_cuda and self._triton is not None:
            self._launch(*args, outputs=outputs)
        else:
            self._call_native(outputs, args)

    def _launch(self, *args: Any, **named: Any) -> Any:
        # imported when first needed: a machine without a GPU may have no triton
        module = importlib.import_module(f"pixelgen_kernels.ops.{self._triton}")
        with torch.cuda.device_of(args[self._main]):
            return getattr(module, f"launch_{self.name}")(*args, **named)

    def on_cuda(self, *args: Any) -> Any:
        """Triton, where there is data, or CUDA C++, for which float64 is not worth it."""
        if self._triton is not None:
            return self.compiled(*args) if args[self._main].numel() == 0 else self._launch(*args)
        if any((arg.dtype if isinstance(arg, Tensor) else arg) == torch.float64 for arg in args):
            return self.by_reference(*args)
        return self._without_triton(*args)

    def _first_on_cuda(self, *args: Any) -> Any:
        """Checks the build, and is out of the way of later calls."""
        check_cuda()
        self._without_triton = self.compiled if has_cuda() else self.by_reference
        return self._without_triton(*args)


def _schema(reference: Callable[..., Any]) -> str:
    """That of the reference; a gradient that it may leave out is an empty tensor."""
    names = ", ".join(_declaration(parameter) for parameter in _parameters(reference).values())
    returned = inspect.signature(reference).return_annotation
    count = 1 if returned is Tensor else len(returned.__args__)
    return f"({names}) -> " + ("Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})")


_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    int | None: "SymInt?",
    float: "float",
    bool: "bool",
    str: "str",
    torch.dtype: "ScalarType",
}


def _declaration(parameter: inspect.Parameter) -> str:
    is_word = get_origin(parameter.annotation) is Literal
    return f"{'str' if is_word else _TYPES[parameter.annotation]} {parameter.name}"


def register(
    name: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    *,
    empty: Callable[..., Any],
    outputs: tuple[str, ...],
    gradients: Mapping[str, str] | None = None,
    empty_gradients: Callable[..., Any] | None = None,
    adjoint: Callable[[], Callable[..., Tensor]] | None = None,
    triton: str | None = None,
    readable: Callable[[Tensor], Tensor] = rows,
) -> Callable[..., Any]:
    """Makes `pixelgen::<name>_fwd` and `_bwd`, and returns what the public function calls.

    That is the op itself where it is compiled. In plain Python an op with a derivative reads its own schema
    at every call, which takes longer than all the rest: there an `autograd.Function` records the formula.

    Args:
        name: of the op.
        forward: reference (tensors and values) -> output or tuple of outputs.
        backward: reference (grad_<output>..., tensors of forward by name..., values of forward by name, or
            wants_<input>...) -> gradient or tuple of gradients; None for the gradient of an input that is
            None. An upstream gradient that may be None is one of zeros.
        empty: as forward, uninitialised outputs. An output that is not asked for has size 0.
        outputs: names of the outputs of forward.
        gradients: input -> argument of backward that has the shape and dtype of its gradient, in the order in
            which backward returns them. By default, every tensor of forward that backward takes.
        empty_gradients: as backward, uninitialised gradients; by default dense ones.
        adjoint: in place of backward, for a linear op of one tensor: gives the op that takes the upstream
            gradient and the values of this one. It has derivatives of its own.
        triton: module of pixelgen_kernels.ops with `launch_<name>_fwd` and `_bwd`, for CUDA.
        readable: an upstream gradient that is not dense -> the same in a layout that the compiled code reads.
    """
    fwd = Kernel(f"{name}_fwd", forward, empty, 0, triton)
    if backward is not None:
        bwd, setup_context, grad_inputs = _derived(
            name, fwd, backward, outputs, gradients, empty_gradients, triton, readable
        )
    elif adjoint is not None:
        bwd, setup_context, grad_inputs = None, *_adjoint(adjoint)
    else:
        return _with_kernels(functools.partial(fwd.op), fwd, None)
    torch.library.register_autograd(
        f"pixelgen::{fwd.name}", grad_inputs, setup_context=setup_context, lib=LIBRARY
    )

    def record(ctx: Any, *args: Any) -> Any:
        with below_autograd():
            output = fwd.call(*args)
        setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(record), "backward": staticmethod(grad_inputs)}
    function: Any = type(name, (torch.autograd.Function,), members)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return fwd.op(*args)
        # a formula for the backward pass alone would give tangents of zero
        if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"{name}: torch.func and forward-mode derivatives are not supported; "
                f"pixelgen_kernels.select('eager') has them"
            )
        if torch.is_grad_enabled():
            for arg in args:
                if isinstance(arg, Tensor) and arg.requires_grad:
                    return function.apply(*args)
        with below_autograd():
            return fwd.call(*args)

    return _with_kernels(call, fwd, bwd)


def _with_kernels(call: Callable[..., Any], fwd: Kernel, bwd: Kernel | None) -> Callable[..., Any]:
    """For tests: `call` with what it calls."""
    call.fwd, call.bwd = fwd, bwd  # type: ignore[attr-defined]
    return call


def _adjoint(adjoint: Callable[[], Callable[..., Tensor]]) -> tuple[Callable[..., Any], ...]:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.values = inputs[1:]

    def grad_inputs(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return adjoint()(grad, *ctx.values), *([None] * len(ctx.values))

    return setup_context, grad_inputs


def _derived(
    name: str,
    fwd: Kernel,
    backward: Callable[..., Any],
    outputs: tuple[str, ...],
    gradients: Mapping[str, str] | None,
    empty_gradients: Callable[..., Any] | None,
    triton: str | None,
    readable: Callable[[Tensor], Tensor],
) -> tuple[Kernel, Callable[..., None], Callable[..., Any]]:
    """The backward op and the formula that calls it."""
    parameters = _parameters(backward)
    names = list(parameters)
    sources = (*fwd.arguments, *outputs)
    if gradients is None:
        taken = [key for key in fwd.arguments if key in names and _is_tensor(parameters[key])]
        gradients = {key: key for key in taken}
    like = [names.index(argument) for argument in gradients.values()]
    bwd = Kernel(f"{name}_bwd", backward, empty_gradients or _empty_like(like), like[0], triton, readable)

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{name}: double backward is not supported; pixelgen_kernels.select('eager') has it"
        )

    torch.library.register_autograd(f"pixelgen::{bwd.name}", refuse, lib=LIBRARY)

    upstream = _picked(outputs.index(key.removeprefix("grad_")) for key in names if key.startswith("grad_"))
    rest = [key for key in names if not key.startswith("grad_")]
    tensors = _picked(sources.index(key) for key in rest if _is_tensor(parameters[key]))
    values = _picked(sources.index(key) for key in rest if key in sources and not _is_tensor(parameters[key]))
    wants = [fwd.arguments.index(key.removeprefix("wants_")) for key in rest if key.startswith("wants_")]
    constant = [i for i, key in enumerate(outputs) if f"grad_{key}" not in names]
    order = list(gradients)
    slots = [order.index(key) if key in order else len(order) for key in fwd.arguments]
    is_single = len(order) == 1

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        known = (*inputs, output) if isinstance(output, Tensor) else inputs + output
        ctx.save_for_backward(*tensors(known))
        ctx.values = values(known)
        if constant:
            ctx.mark_non_differentiable(*[output[i] for i in constant])
        if len(outputs) > 1:
            ctx.set_materialize_grads(False)

    def grad_inputs(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs, values = ctx.needs_input_grad, ctx.values
        given = upstream(grads)
        if len(outputs) > 1 and all(grad is None for grad in given):
            return (None,) * len(needs)
        if wants:
            values = (*values, *[needs[i] for i in wants])
        saved = ctx.saved_tensors  # with autograd: a checkpoint may run its forward pass again for them
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            made = bwd.op(*given, *saved, *values)
        else:
            with below_autograd():
                made = bwd.call(*given, *saved, *values)
        made = (made, None) if is_single else (*made, None)
        # an input that needs none may be None, and its gradient an empty tensor
        return tuple([made[slot] if need else None for slot, need in zip(slots, needs, strict=True)])

    return bwd, setup_context, grad_inputs


def _picked(indices: Iterable[int]) -> Callable[[Any], tuple[Any, ...]]:
    """What takes these items of a sequence."""
    chosen = list(indices)
    if len(chosen) > 1:
        return operator.itemgetter(*chosen)
    return (lambda items: (items[chosen[0]],)) if chosen else (lambda items: ())


def _empty_like(like: list[int]) -> Callable[..., Any]:
    """Dense gradients of the shapes and dtypes of these arguments, of size 0 for those that are None."""

    def empty(*args: Any) -> Any:
        dense = torch.contiguous_format
        grads = [
            args[like[0]].new_empty(0) if args[i] is None else torch.empty_like(args[i], memory_format=dense)
            for i in like
        ]
        return grads[0] if len(grads) == 1 else tuple(grads)

    return empty
