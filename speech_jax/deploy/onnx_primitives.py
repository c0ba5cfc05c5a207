"""How primitives of a jaxpr become operators of ONNX: a converter for each.

A converter gets the graph, the equation and the values of its inputs.
"""

import math
import string
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from onnx import helper

from speech_jax.errors import UserError

if TYPE_CHECKING:
    from speech_jax.deploy.onnx_graph import Graph


class GraphError(UserError):
    """A program that cannot be written as ONNX; the message names what is in the way."""


class Tensor:
    """A tensor of the graph.

    Attributes:
      name: in the graph.
      small: a tensor that broadcasts to it; elementwise operators take it where they can.
    """

    def __init__(self, name: str | Callable[[], str], small: str | None = None):
        self._name = name
        self.small = small

    @property
    def name(self) -> str:
        if callable(self._name):  # it is expanded where it must be
            self._name = self._name()
        return self._name


Value = np.ndarray | Tensor | tuple[Tensor, Tensor]  # known, computed, or complex


def onnx_type(dtype: Any) -> int:
    """A NumPy type as ONNX numbers it."""
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


# The same elementwise operator.
_SAME = {
    "add": "Add", "add_any": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max",
    "min": "Min", "pow": "Pow", "eq": "Equal", "lt": "Less", "gt": "Greater", "le": "LessOrEqual",
    "ge": "GreaterOrEqual", "neg": "Neg", "exp": "Exp", "log": "Log", "tanh": "Tanh",
    "sqrt": "Sqrt", "abs": "Abs", "floor": "Floor", "ceil": "Ceil", "sign": "Sign", "sin": "Sin",
    "cos": "Cos", "logistic": "Sigmoid", "erf": "Erf",
}  # fmt: skip
_LOGICAL = {"and": "And", "or": "Or", "not": "Not"}
_REDUCTIONS = {
    "reduce_sum": "ReduceSum", "reduce_max": "ReduceMax", "reduce_min": "ReduceMin",
    "reduce_prod": "ReduceProd",
}  # fmt: skip
_UNCHANGED = ("copy", "stop_gradient", "optimization_barrier", "sharding_constraint")


def converter(kind: str) -> Callable:
    """What makes operators of equations of a primitive, by its name; GraphError if none does."""
    if kind in _SAME:
        return lambda graph, equation, *x: _elementwise(graph, equation, _SAME[kind], *x)
    if kind in _LOGICAL:
        return lambda graph, equation, *x: _logical(graph, equation, _LOGICAL[kind], *x)
    if kind in _REDUCTIONS:
        return lambda graph, equation, x: _reduce(graph, equation, _REDUCTIONS[kind], x)
    if kind in _UNCHANGED:
        return lambda graph, equation, *x: list(x)
    if f"_{kind}" not in _OTHERS:
        raise GraphError(f"the model computes {kind!r}, which cannot be written as ONNX: use .sjx")
    return _OTHERS[f"_{kind}"]


def _elementwise(graph: "Graph", equation: Any, operator: str, *values: Value) -> Tensor:
    shape = equation.outvars[0].aval.shape
    # What broadcasts is taken as it is if another input has the whole shape.
    whole = any(
        variable.aval.shape == shape and not (isinstance(value, Tensor) and value.small)
        for variable, value in zip(equation.invars, values, strict=True)
    )
    return Tensor(graph.op(operator, *(graph.name(value, small=whole) for value in values)))


def _logical(graph: "Graph", equation: Any, operator: str, *values: Value) -> Tensor:
    if equation.outvars[0].aval.dtype != bool:
        raise GraphError(f"{operator} of bits cannot be written as ONNX: use .sjx")
    return _elementwise(graph, equation, operator, *values)


def _reduce(graph: "Graph", equation: Any, operator: str, x: Value) -> Tensor:
    axes = graph.constant(np.asarray(equation.params["axes"], np.int64))
    return Tensor(graph.op(operator, graph.name(x), axes, keepdims=0))


def _ne(graph: "Graph", equation: Any, *values: Value) -> Tensor:
    return Tensor(graph.op("Not", _elementwise(graph, equation, "Equal", *values).name))


def _rem(graph: "Graph", equation: Any, *values: Value) -> Tensor:
    names = [graph.name(value) for value in values]
    return Tensor(graph.op("Mod", *names, fmod=1))  # the sign of the dividend, as XLA's


def _square(graph: "Graph", equation: Any, x: Value) -> Tensor:
    return Tensor(graph.op("Mul", graph.name(x), graph.name(x)))


def _rsqrt(graph: "Graph", equation: Any, x: Value) -> Tensor:
    return Tensor(graph.op("Reciprocal", graph.op("Sqrt", graph.name(x))))


def _erfc(graph: "Graph", equation: Any, x: Value) -> Tensor:
    one = graph.constant(np.ones((), equation.outvars[0].aval.dtype))
    return Tensor(graph.op("Sub", one, graph.op("Erf", graph.name(x))))


def _log1p(graph: "Graph", equation: Any, x: Value) -> Tensor:
    one = graph.constant(np.ones((), equation.outvars[0].aval.dtype))
    return Tensor(graph.op("Log", graph.op("Add", one, graph.name(x))))


def _expm1(graph: "Graph", equation: Any, x: Value) -> Tensor:
    one = graph.constant(np.ones((), equation.outvars[0].aval.dtype))
    return Tensor(graph.op("Sub", graph.op("Exp", graph.name(x)), one))


def _round(graph: "Graph", equation: Any, x: Value) -> Tensor:
    if equation.params["rounding_method"] != jax.lax.RoundingMethod.TO_NEAREST_EVEN:
        raise GraphError("halves that are rounded away from 0 cannot be written as ONNX: use .sjx")
    return Tensor(graph.op("Round", graph.name(x)))


def _integer_pow(graph: "Graph", equation: Any, x: Value) -> Tensor:
    power = graph.constant(np.asarray(equation.params["y"], equation.outvars[0].aval.dtype))
    return Tensor(graph.op("Pow", graph.name(x), power))


def _select_n(graph: "Graph", equation: Any, which: Value, *cases: Value) -> Tensor:
    if len(cases) != 2 or equation.invars[0].aval.dtype != bool:
        raise GraphError("a choice of more than two cannot be written as ONNX: use .sjx")
    names = [graph.name(value) for value in (which, cases[1], cases[0])]
    return Tensor(graph.op("Where", *names))


def _convert_element_type(graph: "Graph", equation: Any, x: Value) -> Tensor:
    kind = onnx_type(equation.params["new_dtype"])
    return Tensor(graph.op("Cast", graph.name(x), to=kind))


def _broadcast_in_dim(graph: "Graph", equation: Any, x: Value, *_: Value) -> Tensor:
    shape, kept = equation.params["shape"], equation.params["broadcast_dimensions"]
    small = graph.name(x)
    if new := [axis for axis in range(len(shape)) if axis not in kept]:
        small = graph.op("Unsqueeze", small, graph.constant(np.asarray(new, np.int64)))
    given = equation.invars[0].aval.shape
    sizes = [given[kept.index(axis)] if axis in kept else 1 for axis in range(len(shape))]
    if tuple(sizes) == tuple(shape):
        return Tensor(small)
    return Tensor(lambda: graph.op("Expand", small, graph.sizes(shape)), small)


def _reshape(graph: "Graph", equation: Any, x: Value, *_: Value) -> Tensor:
    sizes = graph.sizes(equation.params["new_sizes"])
    return Tensor(graph.op("Reshape", graph.name(x), sizes, allowzero=1))


def _squeeze(graph: "Graph", equation: Any, x: Value) -> Tensor:
    axes = graph.constant(np.asarray(equation.params["dimensions"], np.int64))
    return Tensor(graph.op("Squeeze", graph.name(x), axes))


def _transpose(graph: "Graph", equation: Any, x: Value) -> Tensor:
    order = [int(axis) for axis in equation.params["permutation"]]
    return Tensor(graph.op("Transpose", graph.name(x), perm=order))


def _concatenate(graph: "Graph", equation: Any, *values: Value) -> Tensor:
    axis = equation.params["dimension"]
    return Tensor(graph.op("Concat", *map(graph.name, values), axis=axis))


def _stack(graph: "Graph", equation: Any, *values: Value) -> Tensor:
    axis = equation.params["axis"]
    axes = graph.constant(np.asarray([axis], np.int64))
    rows = [graph.op("Unsqueeze", graph.name(value), axes) for value in values]
    return Tensor(graph.op("Concat", *rows, axis=axis))


def _split(graph: "Graph", equation: Any, x: Value) -> list[Value]:
    axis, start, parts = equation.params["axis"], 0, []
    for size in map(int, equation.params["sizes"]):
        parts.append(_slices(graph, graph.name(x), {axis: (start, start + size, 1)}))
        start += size
    return parts


def _pad(graph: "Graph", equation: Any, x: Value, fill: Value) -> Tensor:
    config = equation.params["padding_config"]
    if any(inner for _, _, inner in config):
        raise GraphError("padding between elements cannot be written as ONNX: use .sjx")
    pads = graph.sizes([low for low, _, _ in config] + [high for _, high, _ in config])
    return Tensor(graph.op("Pad", graph.name(x), pads, graph.name(fill)))


def _rev(graph: "Graph", equation: Any, x: Value) -> Tensor:
    last = np.iinfo(np.int64).min  # before the first
    bounds = dict.fromkeys(equation.params["dimensions"], (-1, last, -1))
    return _slices(graph, graph.name(x), bounds)


def _slice(graph: "Graph", equation: Any, x: Value) -> Tensor:
    params, shape = equation.params, equation.invars[0].aval.shape
    strides = params["strides"] or (1,) * len(shape)
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return _slices(graph, graph.name(x), dict(enumerate(bounds)), shape)


def _slices(
    graph: "Graph", name: str, bounds: Mapping[int, tuple], shape: Sequence[Any] | None = None
) -> Tensor:
    """Slices by (start, stop, step) of each axis; axes that stay whole are left out."""
    for axis, (start, stop, step) in bounds.items():
        if shape is not None and (start, step) == (0, 1) and stop == shape[axis]:
            continue
        arguments = [graph.sizes([value]) for value in (start, stop, axis, step)]
        name = graph.op("Slice", name, *arguments)
    return Tensor(name)


def _gather(graph: "Graph", equation: Any, x: Value, starts: Value) -> Tensor:
    """What x[:, 3] and x[:, :, :5] trace to where sizes are symbols: one window at known starts."""
    numbers, shape = equation.params["dimension_numbers"], equation.invars[0].aval.shape
    if not isinstance(starts, np.ndarray) or starts.ndim != 1 or numbers.operand_batching_dims:
        raise GraphError("indexing by what is computed cannot be written as ONNX: use .sjx")
    first = dict(zip(numbers.start_index_map, map(int, starts), strict=True))
    bounds = {
        axis: (first.get(axis, 0), first.get(axis, 0) + size, 1)
        for axis, size in enumerate(equation.params["slice_sizes"])
    }
    window = _slices(graph, graph.name(x), bounds, shape)
    if not numbers.collapsed_slice_dims:
        return window
    axes = graph.constant(np.asarray(numbers.collapsed_slice_dims, np.int64))
    return Tensor(graph.op("Squeeze", window.name, axes))


def _iota(graph: "Graph", equation: Any, *_: Value) -> Tensor:
    shape, axis = equation.params["shape"], equation.params["dimension"]
    zero, one = (graph.constant(np.int64(value)) for value in (0, 1))
    numbers = graph.op("Range", zero, graph.size(shape[axis]), one)
    numbers = graph.op("Cast", numbers, to=onnx_type(equation.params["dtype"]))
    if len(shape) == 1:
        return Tensor(numbers)
    others = np.asarray([other for other in range(len(shape)) if other != axis], np.int64)
    small = graph.op("Unsqueeze", numbers, graph.constant(others))
    return Tensor(lambda: graph.op("Expand", small, graph.sizes(shape)), small)


def _dim_as_value(graph: "Graph", equation: Any) -> Tensor:
    kind = onnx_type(equation.outvars[0].aval.dtype)
    return Tensor(graph.op("Cast", graph.size(equation.params["dim"]), to=kind))


def _platform_index(graph: "Graph", equation: Any) -> np.ndarray:
    return np.zeros((), np.int32)  # read by nobody: see cond


def _dot_general(graph: "Graph", equation: Any, left: Value, right: Value) -> Tensor:
    (left_sum, right_sum), (left_batch, right_batch) = equation.params["dimension_numbers"]
    shapes = [variable.aval.shape for variable in equation.invars]
    ranks = [len(shape) for shape in shapes]
    last = tuple(range(ranks[0] - len(left_sum), ranks[0]))
    dense = tuple(left_sum) == last and tuple(right_sum) == tuple(range(len(right_sum)))
    if dense and not left_batch and isinstance(right, np.ndarray):  # a layer: one product
        summed = math.prod(shapes[1][: len(right_sum)])
        name = graph.name(left)
        if len(left_sum) > 1:
            name = graph.op("Reshape", name, graph.sizes([*shapes[0][: last[0]], summed]))
        name = graph.op("MatMul", name, graph.constant(right.reshape(summed, -1)))
        if ranks[1] - len(right_sum) == 1:
            return Tensor(name)
        return Tensor(graph.op("Reshape", name, graph.sizes(equation.outvars[0].aval.shape)))
    letters = iter(string.ascii_lowercase)
    names = [[next(letters) for _ in range(rank)] for rank in ranks]
    pairs = [*zip(left_batch, right_batch, strict=True), *zip(left_sum, right_sum, strict=True)]
    for a, b in pairs:
        names[1][b] = names[0][a]
    out = [names[0][axis] for axis in left_batch]
    out += [x for i, x in enumerate(names[0]) if i not in (*left_batch, *left_sum)]
    out += [x for i, x in enumerate(names[1]) if i not in (*right_batch, *right_sum)]
    text = f"{''.join(names[0])},{''.join(names[1])}->{''.join(out)}"
    return Tensor(graph.op("Einsum", graph.name(left), graph.name(right), equation=text))


def _conv_general_dilated(graph: "Graph", equation: Any, x: Value, weight: Value) -> Tensor:
    params = equation.params
    if params["batch_group_count"] != 1 or set(params["lhs_dilation"]) != {1}:
        raise GraphError("a transposed convolution cannot be written as ONNX: use .sjx")
    numbers, lows_highs = params["dimension_numbers"], list(zip(*params["padding"], strict=True))
    whole = lambda values: [int(value) for value in values]
    out = graph.op(
        "Conv",
        graph.op("Transpose", graph.name(x), perm=whole(numbers.lhs_spec)),
        _transposed(graph, weight, whole(numbers.rhs_spec)),
        strides=whole(params["window_strides"]),
        pads=whole(lows_highs[0] + lows_highs[1]),
        dilations=whole(params["rhs_dilation"]),
        group=int(params["feature_group_count"]),
    )
    return Tensor(graph.op("Transpose", out, perm=whole(np.argsort(numbers.out_spec))))


def _transposed(graph: "Graph", value: Value, order: list[int]) -> str:
    if isinstance(value, np.ndarray):
        return graph.constant(value.transpose(order))
    return graph.op("Transpose", graph.name(value), perm=order)


def _fft(graph: "Graph", equation: Any, x: Value) -> list[Value]:
    """A real transform of [..., N], as products: real and imaginary parts [..., N // 2 + 1]."""
    if (
        equation.params["fft_type"] != jax.lax.FftType.RFFT
        or len(equation.params["fft_lengths"]) > 1
    ):
        raise GraphError("only real Fourier transforms can be written as ONNX: use .sjx")
    size = equation.params["fft_lengths"][0]
    turns = np.outer(np.arange(size), np.arange(size // 2 + 1)) % size * (2 * np.pi / size)
    parts = (np.cos(turns), -np.sin(turns))
    product = lambda part: graph.op("MatMul", graph.name(x), graph.constant(part, np.float32))
    return [(Tensor(product(parts[0])), Tensor(product(parts[1])))]


def _real(graph: "Graph", equation: Any, x: tuple[Tensor, Tensor]) -> Tensor:
    return x[0]


def _imag(graph: "Graph", equation: Any, x: tuple[Tensor, Tensor]) -> Tensor:
    return x[1]


_OTHERS = {
    function.__name__: function
    for function in (
        _ne, _rem, _square, _rsqrt, _erfc,
        _log1p, _expm1, _round, _integer_pow, _select_n, _convert_element_type,
        _broadcast_in_dim, _reshape, _squeeze, _transpose, _concatenate, _stack, _split, _pad, _rev,
        _slice, _gather, _iota, _dim_as_value, _platform_index, _dot_general,
        _conv_general_dilated, _fft, _real, _imag,
    )
}  # fmt: skip
