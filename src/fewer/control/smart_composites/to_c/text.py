"""Numbers and small functions as C text."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

KEYWORDS = frozenset(  # of C and C++
    [
        "auto",
        "break",
        "case",
        "char",
        "const",
        "continue",
        "default",
        "do",
        "double",
        "else",
        "enum",
        "extern",
        "float",
        "for",
        "goto",
        "if",
        "inline",
        "int",
        "long",
        "register",
        "restrict",
        "return",
        "short",
        "signed",
        "sizeof",
        "static",
        "struct",
        "switch",
        "typedef",
        "union",
        "unsigned",
        "void",
        "volatile",
        "while",
        "_Bool",
        "_Complex",
        "_Imaginary",
        "alignas",
        "alignof",
        "and",
        "and_eq",
        "asm",
        "bitand",
        "bitor",
        "bool",
        "catch",
        "class",
        "compl",
        "constexpr",
        "const_cast",
        "decltype",
        "delete",
        "dynamic_cast",
        "explicit",
        "export",
        "false",
        "friend",
        "mutable",
        "namespace",
        "new",
        "noexcept",
        "not",
        "not_eq",
        "nullptr",
        "operator",
        "or",
        "or_eq",
        "private",
        "protected",
        "public",
        "reinterpret_cast",
        "static_assert",
        "static_cast",
        "template",
        "this",
        "thread_local",
        "throw",
        "true",
        "try",
        "typeid",
        "typename",
        "using",
        "virtual",
        "wchar_t",
        "xor",
        "xor_eq",
    ]
)


def check_name(name: str) -> None:
    """ValueError unless `name` may begin the names of a C program."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) or name in KEYWORDS:
        raise ValueError(f"name {name!r} is no C identifier or is a keyword; expected a letter, then letters, digits or _: such as 'net'")


@dataclass(frozen=True)
class Number:
    """The type that the C computes with: its name, the suffix of constants and of math.h, and the digits that round-trip."""

    type: str
    suffix: str
    digits: int
    numpy: type

    def literal(self, value: float) -> str:
        """A constant that reads back as exactly `value` in this type."""
        return self.literals(np.array([value]))[0]

    def literals(self, values: np.ndarray) -> list[str]:
        """The same for every value; ValueError where one is beyond this type."""
        with np.errstate(over="ignore"):
            rounded = values.astype(self.numpy).reshape(-1)
        if np.isinf(rounded).any():
            raise ValueError(f"a number of size {np.abs(values).max():.3g} is beyond {self.type}; expected smaller ones, or dtype='double'")
        texts = [f"{value:.{self.digits}g}" for value in rounded.tolist()]
        return [(text if "." in text or "e" in text or "n" in text else text + ".0") + self.suffix for text in texts]

    def call(self, function: str, argument: str) -> str:
        return f"{function}{self.suffix}({argument})"


FLOAT, DOUBLE = Number("float", "f", 9, np.float32), Number("double", "", 17, np.float64)


def array_text(declaration: str, items: list[str]) -> str:
    """`static const float w[3] = {...};`, eight numbers a line."""
    lines = [", ".join(items[start : start + 8]) for start in range(0, len(items), 8)]
    return f"static const {declaration}[{len(items)}] = {{\n    " + ",\n    ".join(lines) + "\n};\n"


def short_tanh() -> str:
    """tanh of a float by one expf, and near 0, where 1 - 2 / (e^2x + 1) would lose digits, by its Taylor series; tanhf takes three times as long."""
    near = "x + x * s * (-0.333333333f + s * (0.133333333f + s * (-0.0539682540f + s * 0.0218694885f)))"
    return f"const float s = x * x; return s < 0.09f ? {near} : 1.0f - 2.0f / (1.0f + expf(2.0f * x));"


def activation_function(name: str, activation: tuple, number: Number) -> str:
    """The C text of y = sigma(x). Comparisons are put so that NaN goes through."""
    kind, parameters = activation[0], activation[1:]
    n, call = number.literal, number.call
    one, half = n(1), n(0.5)
    if kind == "relu":
        body = f"return x < {n(0)} ? {n(0)} : x;"
    elif kind == "leaky_relu":
        body = f"return x < {n(0)} ? x * {n(parameters[0])} : x;"
    elif kind == "sigmoid":
        body = f"return {one} / ({one} + {call('exp', '-x')});"
    elif kind == "tanh" and number.type == "float":
        body = short_tanh()
    elif kind == "tanh":
        body = f"return {call('tanh', 'x')};"
    elif kind in ("elu", "selu"):
        alpha, scale, inner = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946, 1.0) if kind == "selu" else parameters
        body = f"return x > {n(0)} ? x * {n(scale)} : {call('expm1', f'x * {n(inner)}')} * {n(alpha * scale)};"
    elif kind == "softplus":
        beta, threshold = parameters
        body = f"return x * {n(beta)} > {n(threshold)} ? x : {call('log1p', call('exp', f'x * {n(beta)}'))} / {n(beta)};"
    elif kind == "softsign":
        body = f"return x / ({one} + {call('fabs', 'x')});"
    elif kind == "hardsigmoid":
        body = f"return x <= {n(-3)} ? {n(0)} : x >= {n(3)} ? {one} : (x + {n(3)}) / {n(6)};"
    elif kind == "gelu":
        body = f"return {half} * x * ({one} + {call('erf', f'x * {n(0.70710678118654752440)}')});"
    elif kind == "gelu_tanh":
        inner = f"{n(0.79788456080286535588)} * (x + {n(0.044715)} * x * x * x)"
        body = f"return {half} * x * ({one} + {call('tanh', inner)});"
    else:
        raise AssertionError(kind)
    return f"static {number.type} {name}({number.type} x) {{ {body} }}\n"
