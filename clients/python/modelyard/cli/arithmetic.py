"""The arithmetic of a decision, step by step, recomputed here from the numbers that came with it."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modelyard.client import Candidate, Decision

_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_FUNCTIONS: dict[str, Callable[[float, float], float]] = {"min": min, "max": max}


@dataclass(frozen=True, slots=True)
class Step:
    """One formula of one candidate."""

    name: str
    text: str
    """With names."""
    numbers: str
    """With numbers in their place."""
    value: float


def steps(decision: Decision, candidate: Candidate) -> list[Step]:
    """Every formula of a decision, computed for a candidate. Raises ValueError: a formula or a term is not known."""
    known = {**decision.terms, **candidate.terms}
    found = []
    for name, text in decision.formulas.items():
        tree = _parsed(text)
        value = _value(tree, known)
        found.append(Step(name, text, ast.unparse(_Numbers(known).visit(tree)), value))
        known[name] = value
    return found


def _parsed(text: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError:
        raise ValueError(f"not a formula: {text!r}") from None


def _value(node: ast.expr, known: Mapping[str, float]) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.Name(id=name) if name in known:
            return known[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            try:
                return _OPERATORS[type(op)](_value(left, known), _value(right, known))
            except OverflowError:
                return float("inf")
        case ast.Call(func=ast.Name(id=name), args=[first, second], keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](_value(first, known), _value(second, known))
    raise ValueError(f"cannot compute {ast.unparse(node)!r}")


class _Numbers(ast.NodeTransformer):
    """Puts numbers in the place of names."""

    def __init__(self, known: Mapping[str, float]) -> None:
        self._known = known

    def visit_Name(self, node: ast.Name) -> ast.expr:
        value = self._known.get(node.id)
        if value is None:
            return node
        rounded = float(f"{value:.4g}")
        return ast.Constant(int(rounded) if rounded.is_integer() else rounded)
