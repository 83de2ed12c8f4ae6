"""Who competes in a case: our kernel, tuned and in its default configuration, and the library's ways, through torch.

Everything here takes `torch` as an argument, and only what is called with it imports more of it: the benchmark runs
where torch is, and its case list, tables and files are rehearsed where it isn't. Each contender is a function of one
set of the case's arrays, so that sets can rotate, and returns its result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.cases import Case, as_convolution
from tilewright.kernels import attention, conv2d, gemm
from tilewright.kernels.activations import activation_name
from tilewright.kernels.ops.attention.problem import AttentionProblem
from tilewright.kernels.ops.conv2d.problem import Conv2dProblem
from tilewright.kernels.ops.gemm.packing import unpack_int4
from tilewright.kernels.ops.gemm.problem import GemmProblem
from tilewright.kernels.problem import Config

Arrays = Mapping[str, Any]
Call = Callable[[Arrays], Any]

OURS, DEFAULT = "tilewright", "tilewright, default"

CHECK = "check"
"""The role of what our result is held against and that competes with nothing."""

CHECKED_COLUMNS = 4096
"""Of weights that are unpacked at a time, to fp32: all of the largest case's would be 2 GB."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A way to compute a case, or with the role `library` at least its product."""

    name: str
    role: str  # "ours", "library", "separate", "fused" or "check"
    call: Call


def arrays_of(torch: Any, case: Case, device: str = "cuda") -> dict[str, Any]:
    """Random arrays of a case, in the layouts that its problem states.

    Operands are scaled so that results are of the order of 1, where activations do something.
    """
    problem = case.problem
    if isinstance(problem, GemmProblem):
        return _gemm_arrays(torch, problem, device)
    if isinstance(problem, Conv2dProblem):
        return _convolution_arrays(torch, problem, device)
    assert isinstance(problem, AttentionProblem)
    kind = _kind(torch, problem.dtype)
    return {
        name: torch.randn(problem.B, heads, length, dim, device=device).to(kind)
        for name, heads, length, dim in (
            ("q", problem.H, problem.Sq, problem.D),
            ("k", problem.kv_heads, problem.Skv, problem.D),
            ("v", problem.kv_heads, problem.Skv, problem.dim_v),
        )
    }


def ours(torch: Any, case: Case, config: Config | None = None) -> Contender:
    """The public function on the arrays; with a configuration, that instead of the tuned one."""
    problem = case.problem
    calls: dict[type, Callable[..., Call]] = {
        GemmProblem: _our_gemm,
        Conv2dProblem: _our_convolution,
        AttentionProblem: _our_attention,
    }
    return Contender(OURS if config is None else DEFAULT, "ours", calls[type(problem)](torch, problem, config))


def libraries(torch: Any, case: Case) -> list[Contender]:
    """The library's ways."""
    convolution = as_convolution(case)
    found = []
    if isinstance(case.problem, GemmProblem):
        found += _library_gemms(torch, case.problem)
    if convolution is not None:
        found += _library_convolutions(torch, convolution, flat=isinstance(case.problem, GemmProblem))
    if isinstance(case.problem, AttentionProblem):
        found += _library_attentions(torch, case.problem)
    return found


def checks(torch: Any, case: Case) -> list[Contender]:
    """What tells whether our result is right, where none of the library's ways computes it."""
    problem = case.problem
    if not isinstance(problem, GemmProblem) or problem.b_dtype != "int4":
        return []
    assert problem.b_scale == "group"
    assert not any((problem.b_zero, problem.bias, problem.residual, problem.gated))
    assert activation_name(problem.activation) == "none"

    def dequantised(arrays: Arrays) -> Any:
        a, parts = arrays["a"].float(), []
        for start in range(0, problem.N, CHECKED_COLUMNS):
            columns = slice(start, start + CHECKED_COLUMNS)
            signed = unpack_int4(arrays["packed"][:, columns], problem.K).float() - 8
            scales = arrays["b_scale"][:, columns].float().repeat_interleave(problem.group_size, 0)
            parts.append(a @ (signed * scales))
        return torch.cat(parts, 1)

    return [Contender("torch, dequantised weights", CHECK, dequantised)]


# GEMM


def _gemm_arrays(torch: Any, problem: GemmProblem, device: str) -> dict[str, Any]:
    kind = _kind(torch, problem.dtype)
    m, n, k = problem.M, problem.N, problem.K
    if problem.dtype == "int8":
        arrays = {
            "a": torch.randint(-127, 128, (m, k), dtype=kind, device=device),
            "w": torch.randint(-127, 128, (n, k), dtype=kind, device=device),
        }
        unit = (1 / 73.3) * k**-0.25  # a standard deviation of 73.3: uniform from -127 to 127
    else:
        arrays = {
            "a": torch.randn(m, k, device=device).to(kind),
            "w": (torch.randn(n, k, device=device) * k**-0.5).to(kind),
        }
        unit = 1.0
    if problem.a_scale is not None:
        arrays["a_scale"] = torch.full((), unit, device=device)
    if problem.b_dtype == "int4":
        # Packed along K; what the weights are is of no account to anybody's time. Scales differ, so that one of another
        # group is a difference.
        packed = torch.randint(0, 256, (k // 2, n), dtype=torch.uint8, device=device)
        arrays["packed"] = packed.t().contiguous().t() if problem.b_layout == "col" else packed
        groups = k // problem.group_size
        scales = 0.005 + 0.01 * torch.rand(groups, n, device=device)
        arrays["b_scale"] = scales.to(_kind(torch, problem.b_scale_dtype))
    elif problem.b_scale == "column":
        arrays["b_scale"] = torch.full((n,), unit, device=device)
    elif problem.b_scale == "tensor":
        arrays["b_scale"] = torch.full((), unit, device=device)
    if problem.bias is not None:
        arrays["bias"] = torch.randn(n, device=device).to(_kind(torch, problem.bias))
    if problem.residual is not None:
        arrays["residual"] = torch.randn(m, n, device=device).to(_kind(torch, problem.residual))
    return arrays


def _our_gemm(torch: Any, problem: GemmProblem, config: Any) -> Call:
    def call(arrays: Arrays) -> Any:
        return gemm(
            arrays["a"],
            arrays["packed"] if problem.b_dtype == "int4" else arrays["w"].T,
            a_scale=arrays.get("a_scale"),
            b_scale=arrays.get("b_scale"),
            bias=arrays.get("bias"),
            residual=arrays.get("residual"),
            activation=problem.activation,
            residual_last=problem.residual_last,
            gated=problem.gated,
            out_dtype=problem.output_dtype,
            group_size=problem.group_size or None,
            config=config,
        )

    return call


def _library_gemms(torch: Any, problem: GemmProblem) -> list[Contender]:
    linear = torch.nn.functional.linear
    if problem.dtype == "int8":
        return _library_int8(torch, problem)
    if problem.dtype.startswith("fp8"):

        def scaled(fast: bool, arrays: Arrays) -> Any:
            kind = _kind(torch, problem.output_dtype)
            return torch._scaled_mm(
                arrays["a"], arrays["w"].t(), arrays["a_scale"], arrays["b_scale"], out_dtype=kind, use_fast_accum=fast
            )

        # Ours moves sums on to fp32 every 128 products; the fast way leaves them in the tensor cores' 14 bits.
        return [
            Contender("torch._scaled_mm", "library", partial(scaled, False)),
            Contender("torch._scaled_mm, fast accumulation", "library", partial(scaled, True)),
        ]
    plain = [Contender("cuBLAS", "library", lambda arrays: linear(arrays["a"], arrays["w"]))]
    if problem.b_dtype is not None:
        return plain  # against weights of the activations' own type
    name = activation_name(problem.activation)
    if not (problem.bias or problem.residual or name != "none"):
        return [*plain, Contender("cuBLASLt", "library", _by_cublaslt(torch, plain[0].call))]
    pointwise = _elementwise(torch, problem)

    def separate(arrays: Arrays) -> Any:
        return pointwise(linear(arrays["a"], arrays["w"], arrays.get("bias")), arrays)

    once = _compiled(torch, name, bool(problem.gated))

    def compiled(arrays: Arrays) -> Any:
        return once(linear(arrays["a"], arrays["w"]), arrays.get("bias"), arrays.get("residual"))

    found = [
        *plain,
        Contender("cuBLAS + elementwise", "separate", separate),
        Contender("cuBLAS + compiled elementwise", "separate", compiled),
    ]
    if problem.gated:

        def eager(arrays: Arrays) -> Any:
            g, u = linear(arrays["a"], arrays["w"], arrays.get("bias")).chunk(2, dim=-1)
            return torch.nn.functional.silu(g) * u

        found.append(Contender("cuBLAS + 2 elementwise", "separate", eager))
    if problem.bias and not problem.residual and not problem.gated and name in ("relu", "gelu_tanh"):

        def epilogue(arrays: Arrays) -> Any:
            return torch._addmm_activation(arrays["bias"], arrays["a"], arrays["w"].t(), use_gelu=name == "gelu_tanh")

        found.append(Contender("cuBLASLt epilogue", "fused", epilogue))
    if problem.bias and not problem.residual and name == "none":
        found.append(
            Contender("cuBLASLt epilogue", "fused", lambda arrays: linear(arrays["a"], arrays["w"], arrays["bias"]))
        )
    return found


def _library_int8(torch: Any, problem: GemmProblem) -> list[Contender]:
    def product(arrays: Arrays) -> Any:
        return torch._int_mm(arrays["a"], arrays["w"].t())

    scaled = _jiterated(
        torch,
        "gelu_of_int8",
        "T s, T ascale, T bscale, T bias",
        "float x = float(s) * float(ascale) * float(bscale) + float(bias);"
        "return T(x / (1.0f + expf(-1.5957691216f * (x + 0.044715f * x * x * x))));",
        lambda s, ascale, bscale, bias: torch.nn.functional.gelu(s * ascale * bscale + bias, approximate="tanh"),
    )

    def separate(arrays: Arrays) -> Any:
        result = scaled(product(arrays), arrays["a_scale"], arrays["b_scale"], arrays["bias"])
        return result.to(_kind(torch, problem.output_dtype))

    once = _compiled(torch, "gelu_tanh", False)

    def compiled(arrays: Arrays) -> Any:
        scales = arrays["a_scale"], arrays["b_scale"]
        return once(product(arrays), arrays["bias"], None, scales, _kind(torch, problem.output_dtype))

    return [
        Contender("torch._int_mm", "library", product),
        Contender("torch._int_mm + 2 elementwise", "separate", separate),
        Contender("torch._int_mm + compiled elementwise", "separate", compiled),
    ]


def _elementwise(torch: Any, problem: Any) -> Callable[[Any, Arrays], Any]:
    """Residual, activation and gate over a result: one kernel where torch has one, or where it can be made one."""
    functional = torch.nn.functional
    name = activation_name(problem.activation)
    if getattr(problem, "gated", None):
        assert problem.gated == "halves"
        assert name == "silu"
        swiglu = _jiterated(
            torch,
            "swiglu",
            "T g, T u",
            "float a = float(g), b = float(u); return T(b * a / (1.0f + expf(-a)));",
            lambda g, u: functional.silu(g) * u,
        )
        half = problem.N // 2
        return lambda y, arrays: swiglu(y[:, :half], y[:, half:])
    if problem.residual:
        assert not problem.residual_last
        if name == "none":
            return lambda y, arrays: y.add_(arrays["residual"])
        assert name == "relu"
        add_relu = _jiterated(
            torch,
            "add_relu",
            "T y, T z",
            "float s = float(y) + float(z); return T(s > 0.0f ? s : 0.0f);",
            lambda y, z: (y + z).relu_(),
        )
        return lambda y, arrays: add_relu(y, arrays["residual"])
    activations: dict[str, Callable[[Any], Any]] = {
        "none": lambda y: y,
        "relu": lambda y: y.relu_(),
        "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
        "gelu_erf": functional.gelu,
        "silu": functional.silu,
        "clamp:0:6": lambda y: y.clamp_(0, 6),
    }
    chosen = activations[name]
    return lambda y, arrays: chosen(y)


def _jiterated(torch: Any, name: str, parameters: str, body: str, eager: Callable[..., Any]) -> Callable[..., Any]:
    """One elementwise kernel of several operations (torch's jiterator, on a GPU); `eager` on a processor."""
    if not torch.cuda.is_available():
        return eager
    code = f"template <typename T> T {name}({parameters}) {{ {body} }}"
    made: Callable[..., Any] = torch.cuda.jiterator._create_jit_fn(code)
    return made


@functools.cache
def _compiled(torch: Any, activation: str, gated: bool) -> Callable[..., Any]:
    """The whole epilogue over a bare product in one kernel, in fp32, by torch.compile: on a GPU, Triton's. Each case's
    sizes are constants of a kernel of its own: of sizes that are arguments Inductor states no divisibility, so that a
    kernel reads element by element and divides for every one's column. On a processor it runs as it is."""
    functional = torch.nn.functional
    activations: dict[str, Callable[[Any], Any]] = {
        "none": lambda y: y,
        "relu": torch.relu,
        "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
        "gelu_erf": functional.gelu,
        "silu": functional.silu,
        "clamp:0:6": lambda y: torch.clamp(y, 0, 6),
    }
    act = activations[activation]

    def epilogue(y: Any, bias: Any, residual: Any = None, scales: Any = None, kind: Any = None) -> Any:
        sums = y.float() if scales is None else y.float() * (scales[0] * scales[1])
        sums = sums if bias is None else sums + bias.float()
        if gated:
            g, u = sums.chunk(2, dim=-1)
            return (act(g) * u).to(kind or y.dtype)
        sums = sums if residual is None else sums + residual.float()
        return act(sums).to(kind or y.dtype)

    if not torch.cuda.is_available():
        return epilogue
    made: Callable[..., Any] = torch.compile(epilogue, dynamic=False)
    return made


def _by_cublaslt(torch: Any, call: Call) -> Call:
    def chosen(arrays: Arrays) -> Any:
        before = torch.backends.cuda.preferred_blas_library()
        torch.backends.cuda.preferred_blas_library("cublaslt")
        try:
            return call(arrays)
        finally:
            torch.backends.cuda.preferred_blas_library(before)

    return chosen


# conv2d

BIASED = {
    "none": ("biased", "T y, T b", "return T(float(y) + float(b));"),
    "relu": ("biased_relu", "T y, T b", "float s = float(y) + float(b); return T(s > 0.0f ? s : 0.0f);"),
    "clamp:0:6": ("biased_relu6", "T y, T b", "float s = float(y) + float(b); return T(fminf(fmaxf(s, 0.0f), 6.0f));"),
}
"""A bias and an activation in one kernel: its name, parameters and body."""


def _biased(torch: Any, name: str, y: Any, bias: Any) -> Any:
    """What `BIASED` computes, on a processor."""
    sums = y + bias
    return {"none": sums, "relu": sums.relu(), "clamp:0:6": sums.clamp(0, 6)}[name]


def _convolution_arrays(torch: Any, problem: Conv2dProblem, device: str) -> dict[str, Any]:
    kind = _kind(torch, problem.dtype)
    p, q = problem.outputs()["out"].shape[1:3]  # of NHWC
    last = torch.channels_last
    fan_in = problem.R * problem.S * problem.C // problem.groups
    shapes = {
        "x": (problem.N, problem.C, problem.H, problem.W),
        "w": (problem.K, problem.C // problem.groups, problem.R, problem.S),
    }
    if problem.residual is not None:
        shapes["residual"] = (problem.N, problem.K, p, q)
    arrays = {
        name: (torch.randn(*shape, device=device) * (fan_in**-0.5 if name == "w" else 1.0))
        .to(kind)
        .contiguous(memory_format=last)
        for name, shape in shapes.items()
    }
    if problem.bias is not None:
        arrays["bias"] = torch.randn(problem.K, device=device).to(_kind(torch, problem.bias))
    return arrays


def _window(problem: Conv2dProblem) -> tuple[tuple[int, int], ...]:
    """Stride, padding and dilation as torch takes them; it pads both sides alike."""
    assert (problem.pad_top, problem.pad_left) == (problem.pad_bottom, problem.pad_right)
    return (
        (problem.stride_h, problem.stride_w),
        (problem.pad_top, problem.pad_left),
        (problem.dilation_h, problem.dilation_w),
    )


def _our_convolution(torch: Any, problem: Conv2dProblem, config: Any) -> Call:
    stride, padding, dilation = _window(problem)

    def call(arrays: Arrays) -> Any:
        return conv2d(
            arrays["x"],
            arrays["w"],
            bias=arrays.get("bias"),
            residual=arrays.get("residual"),
            activation=problem.activation,
            residual_last=problem.residual_last,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=problem.groups,
            layout="nchw",
            config=config,
        )

    return call


def _library_convolutions(torch: Any, problem: Conv2dProblem, *, flat: bool) -> list[Contender]:
    """cuDNN's; `flat` says that a case's arrays are those of a GEMM, which are seen as images here."""
    stride, padding, dilation = _window(problem)
    window = (stride, padding, dilation, problem.groups)
    name = activation_name(problem.activation)
    pointwise = _elementwise(torch, problem)

    def images(arrays: Arrays) -> dict[str, Any]:
        if not flat:
            return dict(arrays)
        shapes = {"a": (problem.N, problem.H, problem.W, problem.C), "w": (problem.K, 1, 1, problem.C)}
        shapes["residual"] = (problem.N, problem.H, problem.W, problem.K)
        seen = {each: arrays[each].view(*shapes[each]).permute(0, 3, 1, 2) for each in shapes if each in arrays}
        seen["x"] = seen.pop("a")
        return {**arrays, **seen}

    def bare(arrays: Arrays) -> Any:
        of = images(arrays)
        return torch.nn.functional.conv2d(of["x"], of["w"], None, *window)

    def separate(arrays: Arrays) -> Any:
        of = images(arrays)
        return pointwise(torch.nn.functional.conv2d(of["x"], of["w"], of.get("bias"), *window), of)

    whole = _compiled(torch, name, False)

    def compiled(arrays: Arrays) -> Any:
        y, bias, residual = bare(arrays), arrays.get("bias"), arrays.get("residual")
        if flat:  # by the kernel that has been compiled for the GEMM's rows
            return whole(y.permute(0, 2, 3, 1).flatten(0, 2), bias, residual)
        return whole(y, None if bias is None else bias[:, None, None], residual)

    found = [
        Contender("cuDNN", "library", bare),
        Contender("cuDNN + elementwise", "separate", separate),
        Contender("cuDNN + compiled elementwise", "separate", compiled),
    ]
    if problem.bias and not problem.residual and name in BIASED:
        # torch adds a bias behind the convolution, in a pass of its own: here it shares one with the activation.
        once = _jiterated(torch, *BIASED[name], partial(_biased, torch, name))

        def apart(arrays: Arrays) -> Any:
            return once(bare(arrays), arrays["bias"][:, None, None])

        found.append(Contender("cuDNN + one elementwise", "separate", apart))
    if not torch.backends.cudnn.is_available() or name != "relu" or not problem.bias:
        return found
    if problem.residual:

        def fused(arrays: Arrays) -> Any:
            of = images(arrays)
            return torch.cudnn_convolution_add_relu(of["x"], of["w"], of["residual"], 1.0, of["bias"], *window)
    else:

        def fused(arrays: Arrays) -> Any:
            of = images(arrays)
            return torch.cudnn_convolution_relu(of["x"], of["w"], of["bias"], *window)

    return [*found, Contender("cuDNN, fused", "fused", fused)]


# attention


def _our_attention(torch: Any, problem: AttentionProblem, config: Any) -> Call:
    return lambda arrays: attention(arrays["q"], arrays["k"], arrays["v"], causal=problem.causal, config=config)


def _library_attentions(torch: Any, problem: AttentionProblem) -> list[Contender]:
    from torch.nn.attention import SDPBackend, sdpa_kernel  # type: ignore[import-not-found,unused-ignore]

    shared = problem.kv_heads != problem.H
    # The last query stands at the last key; where there are as many of both, that is torch's causal mask. One query
    # sees everything.
    causal = problem.causal and problem.Sq > 1
    assert not causal or problem.Sq == problem.Skv
    backends = {
        "torch, flash attention": SDPBackend.FLASH_ATTENTION,
        "torch, cuDNN attention": SDPBackend.CUDNN_ATTENTION,
        "torch, efficient attention": SDPBackend.EFFICIENT_ATTENTION,
    }

    def by(backend: Any) -> Call:
        def call(arrays: Arrays) -> Any:
            with sdpa_kernel([backend]):
                return torch.nn.functional.scaled_dot_product_attention(
                    arrays["q"], arrays["k"], arrays["v"], is_causal=causal, enable_gqa=shared
                )

        return call

    return [Contender(name, "library", by(backend)) for name, backend in backends.items()]


def _kind(torch: Any, name: str) -> Any:
    kinds = {
        "fp16": torch.float16,
        "bf16": torch.bfloat16,
        "fp32": torch.float32,
        "int8": torch.int8,
        "fp8e4m3": torch.float8_e4m3fn,
    }
    return kinds[name]
