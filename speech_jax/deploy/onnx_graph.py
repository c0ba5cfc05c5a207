"""A traced program as an ONNX graph: each primitive of a jaxpr becomes a few operators.

Only what our encoders and front ends trace to is known; anything else is refused by name. Sizes
that are symbols of the trace become int64 tensors, computed from the shapes of the inputs. What
follows from parameters and constants alone is computed here, and kept as a constant.
"""

import ast
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import onnx
from onnx import helper, numpy_helper

from speech_jax.deploy.onnx_primitives import GraphError, Tensor, Value, converter, onnx_type

OPSET = 18


class Graph:
    """An ONNX graph that grows; `trace` adds a program."""

    def __init__(self, inputs: Mapping[str, jax.ShapeDtypeStruct]):
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self._constants: dict[tuple, str] = {}
        self._sizes: dict[str, str] = {}
        self._symbols: dict[str, tuple[str, int]] = {}
        self._names = itertools.count()
        self.inputs = []
        for name, like in inputs.items():
            dims = [str(size) for size in like.shape]
            self.inputs.append(helper.make_tensor_value_info(name, onnx_type(like.dtype), dims))
            for axis, size in enumerate(dims):
                self._symbols.setdefault(size, (name, axis))

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Adds an operator; the name of its output."""
        return self.ops(kind, inputs, 1, **attributes)[0]

    def ops(self, kind: str, inputs: Sequence[str], outputs: int, **attributes: Any) -> list[str]:
        """Adds an operator of so many outputs; their names."""
        names = [self._new(kind) for _ in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names

    def _new(self, kind: str) -> str:
        return f"{kind.lower()}_{next(self._names)}"

    def constant(self, value: Any, dtype: Any = None) -> str:
        """The name of a constant, which is kept once."""
        value = np.ascontiguousarray(value, dtype).reshape(np.shape(value))
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = name
            self.initializers[name] = numpy_helper.from_array(value, name)
        return self._constants[key]

    def name(self, value: Value, small: bool = False) -> str:
        """The name of a value in the graph; of what broadcasts to it, if it may be `small`."""
        if isinstance(value, np.ndarray):
            return self.constant(value)
        if isinstance(value, tuple):
            raise GraphError("complex numbers are only known behind a Fourier transform")
        return value.small if small and value.small else value.name

    # ---- Sizes ----

    def size(self, size: Any) -> str:
        """The name of an int64 scalar: a size, which may be an expression of symbols."""
        if isinstance(size, int | np.integer):
            return self.constant(np.int64(size))
        text = str(size)
        if text not in self._sizes:
            self._sizes[text] = self._expression(ast.parse(text, mode="eval").body)
        return self._sizes[text]

    def sizes(self, sizes: Sequence[Any]) -> str:
        """The name of an int64 [N] of sizes."""
        if all(isinstance(size, int | np.integer) for size in sizes):
            return self.constant(np.asarray(sizes, np.int64).reshape(-1))
        zero = self.constant([0], np.int64)
        parts = [self.op("Unsqueeze", self.size(size), zero) for size in sizes]
        return self.op("Concat", *parts, axis=0)

    def _expression(self, node: ast.expr) -> str:
        if isinstance(node, ast.Constant):
            return self.constant(np.int64(node.value))
        if isinstance(node, ast.Name):
            source, axis = self._symbols[node.id]
            shape = self.op("Shape", source)
            return self.op("Gather", shape, self.constant(np.int64(axis)), axis=0)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return self.op("Neg", self._expression(node.operand))
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            sides = (self._expression(node.left), self._expression(node.right))
            return self.op(_ARITHMETIC[type(node.op)], *sides)
        if isinstance(node, ast.Call) and node.func.id in _FUNCTIONS:  # of sizes, from 0 on
            return self.op(_FUNCTIONS[node.func.id], *map(self._expression, node.args))
        raise GraphError(f"a size {ast.unparse(node)} cannot be written as ONNX")

    # ---- Programs ----

    def trace(self, closed: Any, inputs: Sequence[Value]) -> list[Value]:
        """Adds a program (a closed jaxpr) on inputs; its outputs."""
        return self._jaxpr(closed.jaxpr, [np.asarray(const) for const in closed.consts], inputs)

    def _jaxpr(self, jaxpr: Any, consts: Sequence[Value], inputs: Sequence[Value]) -> list[Value]:
        known: dict[Any, Value] = dict(zip(jaxpr.constvars, consts, strict=True))
        known |= zip(jaxpr.invars, inputs, strict=True)

        def read(variable):
            if hasattr(variable, "val"):  # a literal
                return np.asarray(variable.val, variable.aval.dtype)
            return known[variable]

        for equation in jaxpr.eqns:
            outputs = self._equation(equation, [read(variable) for variable in equation.invars])
            known |= zip(equation.outvars, outputs, strict=True)
        return [read(variable) for variable in jaxpr.outvars]

    def _equation(self, equation: Any, inputs: list[Value]) -> list[Value]:
        kind, params = equation.primitive.name, equation.params
        inner = next((params[key] for key in _PROGRAMS if key in params), None)
        if kind == "scan":
            return self._scan(equation, inputs)
        if kind == "cond":  # of platforms; the last one is for those that are not named
            if not params.get("branches_platforms"):
                raise GraphError("a branch that depends on values cannot be written as ONNX")
            return self.trace(params["branches"][-1], inputs[1:])
        if inner is not None:
            if hasattr(inner, "consts"):
                return self.trace(inner, inputs)
            return self._jaxpr(inner, [], inputs)
        static = all(
            isinstance(size, int) for variable in equation.outvars for size in variable.aval.shape
        )
        if static and all(isinstance(value, np.ndarray) for value in inputs) and inputs:
            outputs = equation.primitive.bind(*inputs, **params)
            outputs = outputs if equation.primitive.multiple_results else [outputs]
            return [np.asarray(output) for output in outputs]
        return _as_list(converter(kind)(self, equation, *inputs))

    def _scan(self, equation: Any, inputs: list[Value]) -> list[Value]:
        params = equation.params
        # What is scanned has a dimension more outside of the loop than inside.
        inner = getattr(params["jaxpr"], "jaxpr", params["jaxpr"])
        same = lambda outside, inside: sum(
            a.aval.ndim == b.aval.ndim for a, b in zip(outside, inside, strict=True)
        )
        carries = same(equation.outvars, inner.outvars)
        constants = same(equation.invars, inner.invars) - carries
        fixed, carry = inputs[:constants], inputs[constants : constants + carries]
        if params["reverse"] or not isinstance(params["length"], int):
            return self._loop(equation, inner, fixed, inputs[constants:])
        stacked: list[list[Value]] = []
        for turn in range(params["length"]):
            each = [self._at(value, turn) for value in inputs[constants + carries :]]
            outputs = self.trace(params["jaxpr"], [*fixed, *carry, *each])
            carry, rest = outputs[:carries], outputs[carries:]
            stacked.append(rest)
        return [*carry, *(self._stack(values) for values in zip(*stacked, strict=True))]

    def _loop(
        self, equation: Any, inner: Any, fixed: list[Value], moving: list[Value]
    ) -> list[Value]:
        """A scan over time as an operator with a graph of its own, which sees the names of ours."""
        fixed = [x if isinstance(x, np.ndarray) else Tensor(self.name(x)) for x in fixed]
        inputs = list(map(self.name, moving))
        nodes, sizes, self.nodes = self.nodes, dict(self._sizes), []
        given = [self._new("frame") for _ in moving]
        outputs = self.trace(equation.params["jaxpr"], [*fixed, *map(Tensor, given)])
        found = [self.op("Identity", self.name(value)) for value in outputs]
        info = lambda name, variable: helper.make_tensor_value_info(
            name, onnx_type(variable.aval.dtype), None
        )
        body = helper.make_graph(
            self.nodes,
            "body",
            list(map(info, given, inner.invars[len(fixed) :])),
            list(map(info, found, inner.outvars)),
        )
        self.nodes, self._sizes = nodes, sizes
        states = sum(
            a.aval.ndim == b.aval.ndim for a, b in zip(equation.outvars, inner.outvars, strict=True)
        )
        turned = int(equation.params["reverse"])
        names = self.ops(
            "Scan",
            inputs,
            len(found),
            body=body,
            num_scan_inputs=len(moving) - states,
            scan_input_directions=[turned] * (len(moving) - states),
            scan_output_directions=[turned] * (len(found) - states),
        )
        return list(map(Tensor, names))

    def _at(self, value: Value, turn: int) -> Value:
        if isinstance(value, np.ndarray):
            return value[turn]
        index = self.constant(np.int64(turn))
        return Tensor(self.op("Gather", self.name(value), index, axis=0))

    def _stack(self, values: Sequence[Value]) -> Value:
        zero = self.constant([0], np.int64)
        rows = [self.op("Unsqueeze", self.name(value), zero) for value in values]
        return Tensor(self.op("Concat", *rows, axis=0))


_ARITHMETIC = {ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul"}
_FUNCTIONS = {"floordiv": "Div", "mod": "Mod", "max": "Max", "min": "Min"}
_PROGRAMS = ("jaxpr", "call_jaxpr", "fun_jaxpr")


def _as_list(outputs: Value | list[Value]) -> list[Value]:
    return outputs if isinstance(outputs, list) else [outputs]
