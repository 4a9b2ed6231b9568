"""The suite of the machine itself: copies, the models' matrix products, attention: what a step can reach."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.case import DTYPES, normal
from benchmarks.measure import ColdTimer, copy_timing
from benchmarks.report import Row, row
from benchmarks.suite import Part, Run, Suite
from pixelgen.models.jit import JiT
from pixelgen.models.sizes import SIZES

MODELS = ("JiT-L/16", "PixelGen-XL/16")
BATCH = {"cpu": 1, "cuda": 64}
MEGABYTES = {"cpu": (4, 32), "cuda": (16, 64, 256, 1024)}
ALIGNMENT = 32  # values; what matrix units want of a row is 16 bytes
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # relative, of the norm, from the plain formula in fp32

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


# --- copies ---


def copy_rows(timer: ColdTimer, megabytes: int) -> Iterator[Row]:
    """A copy; GB/s count bytes read and bytes written."""
    size = megabytes * 2**20
    timing = copy_timing(timer, size)
    yield row("copy", "copy", timing, shape=f"{megabytes}MiB", gbps=2 * size / timing.median_ms / 1e6)


# --- matrix products ---


def linears(model: str) -> dict[str, tuple[int, int]]:
    """The linear layers of a block that run over tokens: name -> (in, out) features."""
    with torch.device("meta"):
        block = JiT(SIZES[model], "eager").blocks[0]
    found = {
        name: (layer.in_features, layer.out_features)
        for name, layer in block.named_modules()
        if isinstance(layer, nn.Linear)
    }
    return {name: sizes for name, sizes in found.items() if "adaLN" not in name}


def matmul_rows(
    timer: ColdTimer, dtype: str, model: str, rows: int, name: str, sizes: tuple[int, int]
) -> Iterator[Row]:
    """A layer's product and the two of its backward pass, as they are and with features padded."""
    padded = tuple(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
    draw = partial(normal, dtype=dtype, device=timer.device)
    calls: dict[str, dict[str, Callable[[], Tensor]]] = {"fwd": {}, "grad_input": {}, "grad_weight": {}}
    for provider, (K, N) in {"as_is": sizes, "padded": padded}.items():
        if provider == "padded" and padded == sizes:
            continue
        x, weight, grad = draw(rows, K), draw(N, K), draw(rows, N)
        calls["fwd"][provider] = partial(nn.functional.linear, x, weight)
        calls["grad_input"][provider] = partial(torch.mm, grad, weight)
        calls["grad_weight"][provider] = partial(torch.mm, grad.t(), x)
    for mode, providers in calls.items():
        parts = {key: (lambda: None, lambda _, call=call: call()) for key, call in providers.items()}
        for provider, timing in timer.side_by_side(parts).items():
            yield row(
                "matmul",
                provider,
                timing,
                shape=f"{model} {name} M={rows} K={sizes[0]} N={sizes[1]}",
                dtype=dtype,
                mode=mode,
                tflops=2
                * rows
                * sizes[0]
                * sizes[1]
                / timing.median_ms
                / 1e9,  # useful ones: padding is none
            )


# --- attention ---


def _backend(backend: SDPBackend) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v)

    return attend


def _flash_attn(module: str) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result: Any = importlib.import_module(module).flash_attn_func(*(a.transpose(1, 2) for a in (q, k, v)))
        return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)

    return attend


# Each takes and gives (B, N, T, D), of any strides.
ATTENTION: dict[str, Attention] = {
    "chosen": scaled_dot_product_attention,
    "cudnn": _backend(SDPBackend.CUDNN_ATTENTION),
    "flash": _backend(SDPBackend.FLASH_ATTENTION),
    "efficient": _backend(SDPBackend.EFFICIENT_ATTENTION),
    "math": _backend(SDPBackend.MATH),
    "flash_attn_2": _flash_attn("flash_attn"),
    "flash_attn_4": _flash_attn("flash_attn.cute"),
}


@dataclass(frozen=True)
class Layout:
    """How q, k and v lie in memory: `order` makes (B, N, T, D) of the dense tensor of that name."""

    name: str
    order: tuple[int, int, int, int]


LAYOUTS = (Layout("BNTD", (0, 1, 2, 3)), Layout("BTND", (0, 2, 1, 3)))


def attention_rows(
    run: Run, timer: ColdTimer, dtype: str, model: str, layout: Layout, batch: int
) -> Iterator[Row]:
    """Every backend that has this size, forward and with backward."""
    config = SIZES[model]
    T, N = config.num_tokens + config.in_context_len, config.heads
    D = config.head_dim
    dense = [size for _, size in sorted(zip(layout.order, (batch, N, T, D), strict=True))]

    def draw(seed: int) -> Tensor:
        return normal(*dense, dtype=dtype, device=timer.device, seed=seed).permute(layout.order)

    q, k, v = (draw(seed).requires_grad_() for seed in range(3))
    grad = torch.ones_like(q)
    shape = f"{model} {layout.name} B={batch} N={N} T={T} D={D}"

    def both(attend: Attention) -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(q, k, v), (q, k, v), grad)

    expected = ATTENTION["math"](*(a.detach().float() for a in (q, k, v)))
    right: dict[str, Attention] = {}
    for name, attend in ATTENTION.items():
        try:
            error = (attend(q, k, v).float() - expected).norm() / expected.norm()
            both(attend)
        except (RuntimeError, ImportError, AttributeError, AssertionError):
            continue  # not on this device, not for this size, or not installed
        if not error <= TOLERANCE[dtype]:
            run.wrong(shape, name, f"it is off by {error:.3g} of the norm", is_ours=False)
        else:
            right[name] = attend
    flops = 4 * batch * N * T * T * D
    for mode, factor in {"fwd": 1.0, "fwd_bwd": 3.5}.items():  # backward computes the scores again
        calls = {
            name: partial(attend, q, k, v) if mode == "fwd" else partial(both, attend)
            for name, attend in right.items()
        }
        parts = {name: (lambda: None, lambda _, call=call: call()) for name, call in calls.items()}
        for name, timing in timer.side_by_side(parts).items():
            rate = factor * flops / timing.median_ms / 1e9
            yield row("attention", name, timing, shape=shape, dtype=dtype, mode=mode, tflops=rate)


def parts(run: Run) -> list[Part]:
    timer = ColdTimer(run.device)
    batch = run.arguments.batch or BATCH[run.device.type]
    default = ["fp32" if run.device.type == "cpu" else "bf16"]
    dtypes = run.chosen("dtypes", list(DTYPES)) if run.arguments.dtypes else default
    found = [
        Part(case="copy", label=f"copy of {size} MiB", rows=partial(copy_rows, timer, size))
        for size in MEGABYTES[run.device.type]
    ]
    for dtype in dtypes:
        for model in MODELS:
            for layout in LAYOUTS:
                rows = partial(attention_rows, run, timer, dtype, model, layout, batch)
                found.append(Part(case="attention", label=f"attention {model} {layout.name}", rows=rows))
        for model in MODELS:
            config = SIZES[model]
            tokens = batch * (config.num_tokens + config.in_context_len)
            for name, sizes in linears(model).items():
                rows = partial(matmul_rows, timer, dtype, model, tokens, name, sizes)
                found.append(Part(case="matmul", label=f"matmul {model} {name}", rows=rows))
    return found


SUITE = Suite(
    name="machine",
    parts=parts,
    baselines=("as_is", "chosen"),
    plots={},
)
