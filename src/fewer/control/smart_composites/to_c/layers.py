"""Each layer as a C function of its own, with its sizes written in, its loops in unit stride and its activation on the way out."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from fewer.control.smart_composites.to_c.network import Layer
from fewer.control.smart_composites.to_c.text import Number, activation_function, array_text

PANEL = 16  # outputs whose sums are kept in registers together
TILE = 4  # pixels of a convolution whose sums, of PANEL channels each, are kept in registers together
QUANTIZED = {"int8": ("signed char", 127), "q15": ("short", 32767)}


class LayerText:
    """Writes layers; collects the weights and functions that they need.

    Args:
        prefix: begins every name.
        number: the type to compute with.
        quantize: None, "int8" or "q15": how matrices are stored; sums are of `number` in any case.
    """

    def __init__(self, prefix: str, number: Number, quantize: str | None) -> None:
        self.prefix, self.number, self.quantize = prefix, number, quantize
        self.arrays: list[str] = []
        self.functions: list[str] = []
        self.flash = 0
        self._activations: dict[tuple, str] = {}

    def vector(self, name: str, values: np.ndarray) -> str:
        """A constant array of the type that is computed with; its name."""
        items = self.number.literals(values)
        self.flash += len(items) * np.dtype(self.number.numpy).itemsize
        self.arrays.append(array_text(f"{self.number.type} {self.prefix}_{name}", items))
        return f"{self.prefix}_{name}"

    def matrix(self, name: str, rows: np.ndarray, order: Callable[[np.ndarray], np.ndarray]) -> tuple[str, str | None, str]:
        """A matrix with a row for each output, stored in some order: names of the array and of its scales, and the C type."""
        if self.quantize is None:
            return self.vector(name, order(rows)), None, self.number.type
        ctype, top = QUANTIZED[self.quantize]
        scale = np.abs(rows).max(axis=1) / top
        scale[scale == 0] = 1.0
        quantized = np.rint(rows / scale[:, None]).astype(int)
        self.flash += quantized.size * (1 if top == 127 else 2)
        self.arrays.append(array_text(f"{ctype} {self.prefix}_{name}", [str(each) for each in order(quantized).reshape(-1)]))
        return f"{self.prefix}_{name}", self.vector(f"{name}_scale", scale), ctype

    def activation(self, activation: tuple | None) -> Callable[[str], str]:
        """How to write sigma(expression)."""
        if activation is None:
            return lambda expression: expression
        if activation not in self._activations:
            name = f"{self.prefix}_{activation[0]}" + (f"_{len(self._activations)}" if len(activation) > 1 else "")
            self._activations[activation] = name
            self.functions.append(activation_function(name, activation, self.number))
        name = self._activations[activation]
        return lambda expression: f"{name}({expression})"

    def write(self, layer: Layer, index: int) -> str:
        """Write the function `PREFIX_layerINDEX`; the name."""
        name = f"{self.prefix}_layer{index}"
        self.functions.append(getattr(self, f"_{layer.kind}")(layer, name, f"w{index}"))
        return name

    def _function(self, name: str, body: str, inputs: str = "const {t} *x", more: str = "") -> str:
        t = self.number.type
        return f"static void {name}({inputs.format(t=t)}, {t} *restrict y{more})\n{{\n{body}}}\n"

    def _linear(self, layer: Layer, name: str, weights: str) -> str:
        rows = layer.size // layer.shape[-1]
        body = self.product(weights, layer.weights["weight"], layer.weights["bias"], self.activation(layer.activation))
        if rows > 1:
            body = f"    for (int row = 0; row < {rows}; row++, x += {layer.in_shape[-1]}, y += {layer.shape[-1]}) {{\n{body}    }}\n"
        return self._function(name, body)

    def product(self, name: str, weight: np.ndarray, bias: np.ndarray, sigma: Callable[[str], str]) -> str:
        """y = sigma(W x + b): panels of outputs, each stored input by input, so that weights are streamed once in unit stride."""
        outputs, inputs = weight.shape
        panel = PANEL if outputs >= PANEL else outputs
        whole = outputs // panel
        w, scale, ctype = self.matrix(name, weight, lambda rows: in_panels(rows, panel))
        b = self.vector(f"{name}_bias", bias)
        text = f"    {{\n    const {ctype} *w = {w};\n"
        if whole:
            opened = f"    for (int o = 0; o < {whole * panel}; o += {panel}, w += {inputs * panel}) {{\n"
            text += opened + self._panel(panel, inputs, b, scale, "o + k", sigma) + "    }\n"
        if outputs % panel:
            text += "    {\n" + self._panel(outputs % panel, inputs, b, scale, f"{whole * panel} + k", sigma) + "    }\n"
        return text + "    }\n"

    def _panel(self, width: int, inputs: int, b: str, scale: str | None, at: str, sigma: Callable[[str], str]) -> str:
        t = self.number.type
        each = f"for (int k = 0; k < {width}; k++)"
        begin = self.number.literal(0) if scale else f"{b}[{at}]"
        total = f"sum[k] * {scale}[{at}] + {b}[{at}]" if scale else "sum[k]"
        weight = f"({t})w[i * {width} + k]" if scale else f"w[i * {width} + k]"
        return (
            f"        {t} sum[{width}];\n        {each} sum[k] = {begin};\n"
            f"        for (int i = 0; i < {inputs}; i++) {{\n            const {t} xi = x[i];\n            {each} sum[k] += {weight} * xi;\n        }}\n"
            f"        {each} y[{at}] = {sigma(total)};\n"
        )

    def _conv(self, layer: Layer, name: str, weights: str) -> str:
        """Blocks of output channels and pixels: each weight that is read serves TILE pixels, each input all channels of the block."""
        weight, groups = layer.weights["weight"], layer.settings["groups"]
        outputs, channels, kh, kw = weight.shape
        each = outputs // groups
        block = min(PANEL, each)
        rows = weight.reshape(groups, each, -1)
        order = np.concatenate([in_panels(np.arange(rows[0].size).reshape(each, -1), block) + g * rows[0].size for g in range(groups)])
        w, scale, ctype = self.matrix(weights, weight.reshape(outputs, -1), lambda flat: flat.reshape(-1)[order])
        height, width = as_image(layer.in_shape)
        pixels = math.prod(as_image(layer.shape))
        pointers = {"b": self.vector(f"{weights}_bias", layer.weights["bias"])} | ({"scale": scale} if scale else {})
        text = f"    const {ctype} *w = {w};\n    const {self.number.type} " + ", ".join(f"*{k} = {v}" for k, v in pointers.items()) + ";\n"
        text += f"    for (int g = 0; g < {groups}; g++, x += {channels * height * width}) {{\n"
        for count, wide in ((each // block, block), (each % block > 0, each % block)):
            if count:
                along = f"w += {wide * channels * kh * kw}, y += {wide * pixels}, " + ", ".join(f"{key} += {wide}" for key in pointers)
                text += f"    for (int o = 0; o < {int(count)}; o++, {along}) {{\n{self._channels(layer, wide, bool(scale))}    }}\n"
        return self._function(name, text + "    }\n")

    def _channels(self, layer: Layer, block: int, scaled: bool) -> str:
        """All pixels of `block` output channels: TILE at a time where the kernel is inside the image, one by one near its edges."""
        kh, kw = layer.weights["weight"].shape[2:]
        (sh, sw), (ph, pw), (dh, dw) = (layer.settings[key] for key in ("stride", "padding", "dilation"))
        height, width = as_image(layer.in_shape)
        out_height, out_width = as_image(layer.shape)
        first = -(-pw // sw)
        end = min((width - 1 - (kw - 1) * dw + pw) // sw + 1, out_width)
        inside = f"j >= {first} && j + {TILE} <= {end}"
        return f"""        for (int i = 0; i < {out_height}; i++) {{
            const int top = i * {sh} - {ph}, under = {height - 1} - top;
            const int p0 = top < 0 ? (-top + {dh - 1}) / {dh} : 0, p1 = under < {(kh - 1) * dh} ? (under < 0 ? 0 : under / {dh} + 1) : {kh};
            int j = 0;
            while (j < {out_width}) {{
                const int left = j * {sw} - {pw};
                if ({inside}) {{
{self._tile(layer, block, TILE, "0", str(kw), scaled)}                }} else {{
                    const int room = {width - 1} - left;
                    const int q0 = left < 0 ? (-left + {dw - 1}) / {dw} : 0, q1 = room < {(kw - 1) * dw} ? (room < 0 ? 0 : room / {dw} + 1) : {kw};
{self._tile(layer, block, 1, "q0", "q1", scaled)}                }}
            }}
        }}
"""

    def _tile(self, layer: Layer, block: int, tile: int, q0: str, q1: str, scaled: bool) -> str:
        """`block` channels of `tile` neighbouring pixels: their sums stay in registers."""
        channels, kh, kw = layer.weights["weight"].shape[1:]
        height, width = as_image(layer.in_shape)
        out_height, out_width = as_image(layer.shape)
        t, pad, dw, sw = self.number.type, " " * 20, layer.settings["dilation"][1], layer.settings["stride"][1]
        sums, k = range(tile), f"for (int k = 0; k < {block}; k++)"
        sigma = self.activation(layer.activation)
        weight = f"({t})w[v + k]" if scaled else "w[v + k]"
        begin = "".join(f"s{n}[k] = " for n in sums) + (self.number.literal(0) if scaled else "b[k]")
        values = ", ".join(f"x{n} = x[at + q * {dw} + {n * sw}]" for n in sums)
        ends = (sigma(f"s{n}[k] * scale[k] + b[k]" if scaled else f"s{n}[k]") for n in sums)
        stores = "".join(f"{pad}    y[(k * {out_height} + i) * {out_width} + j + {n}] = {end};\n" for n, end in enumerate(ends))
        return (
            f"{pad}{t} {', '.join(f's{n}[{block}]' for n in sums)};\n{pad}{k} {begin};\n{pad}for (int c = 0; c < {channels}; c++)\n"
            f"{pad}    for (int p = p0; p < p1; p++) {{\n"
            f"{pad}        const int at = (c * {height} + top + p * {layer.settings['dilation'][0]}) * {width} + left;\n"
            f"{pad}        for (int q = {q0}; q < {q1}; q++) {{\n{pad}            const int v = ((c * {kh} + p) * {kw} + q) * {block};\n"
            f"{pad}            const {t} {values};\n"
            f"{pad}            {k} {{ const {t} wk = {weight}; {' '.join(f's{n}[k] += wk * x{n};' for n in sums)} }}\n"
            f"{pad}        }}\n{pad}    }}\n{pad}{k} {{\n{stores}{pad}}}\n{pad}j += {tile};\n"
        )

    def _pool(self, layer: Layer, name: str, begin: str, take: str, end: str) -> str:
        (kh, kw), (sh, sw), (ph, pw), (dh, dw) = (layer.settings[key] for key in ("kernel", "stride", "padding", "dilation"))
        height, width = as_image(layer.in_shape)
        out_height, out_width = as_image(layer.shape) if len(layer.shape) > 1 else (1, 1)
        t = self.number.type
        body = f"""    for (int c = 0; c < {layer.in_shape[0]}; c++) {{
        const {t} *image = x + c * {height * width};
        for (int i = 0; i < {out_height}; i++) {{
            for (int j = 0; j < {out_width}; j++) {{
                {begin}
                for (int p = 0; p < {kh}; p++) {{
                    const int r = i * {sh} + p * {dh} - {ph};
                    if (r < 0 || r >= {height}) continue;
                    for (int q = 0; q < {kw}; q++) {{
                        const int s = j * {sw} + q * {dw} - {pw};
                        if (s < 0 || s >= {width}) continue;
                        const {t} v = image[r * {width} + s];
                        {take}
                    }}
                }}
                y[(c * {out_height} + i) * {out_width} + j] = {end};
            }}
        }}
    }}
"""
        return self._function(name, body)

    def _max_pool(self, layer: Layer, name: str, weights: str) -> str:
        begin = f"{self.number.type} best = -({self.number.type})HUGE_VAL;"
        return self._pool(layer, name, begin, "if (v > best || v != v) best = v;", "best")

    def _avg_pool(self, layer: Layer, name: str, weights: str) -> str:
        t = self.number.type
        if layer.settings["include_pad"]:
            count = self.number.literal(math.prod(layer.settings["kernel"]))
            return self._pool(layer, name, f"{t} sum = {self.number.literal(0)};", "sum += v;", f"sum / {count}")
        begin = f"{t} sum = {self.number.literal(0)}; int count = 0;"
        return self._pool(layer, name, begin, "sum += v; count++;", f"sum / ({t})count")

    def _scale(self, layer: Layer, name: str, weights: str) -> str:
        scale, shift = (self.vector(f"{weights}_{key}", layer.weights[key]) for key in ("scale", "shift"))
        each = layer.size // layer.shape[0]
        value = self.activation(layer.activation)(f"x[c * {each} + j] * {scale}[c] + {shift}[c]")
        loop = f"    for (int c = 0; c < {layer.shape[0]}; c++)\n        for (int j = 0; j < {each}; j++) "
        return self._function(name, f"{loop}y[c * {each} + j] = {value};\n")

    def _layer_norm(self, layer: Layer, name: str, weights: str) -> str:
        gain, shift = (self.vector(f"{weights}_{key}", layer.weights[key]) for key in ("gain", "shift"))
        length, t, n = layer.weights["gain"].size, self.number.type, self.number.literal
        value = self.activation(layer.activation)(f"(x[i] - mean) * inverse * {gain}[i] + {shift}[i]")
        epsilon = n(layer.settings["epsilon"])
        inverse = f"{n(1)} / {self.number.call('sqrt', f'variance / {n(length)} + {epsilon}')}"
        body = f"""    for (int row = 0; row < {layer.size // length}; row++, x += {length}, y += {length}) {{
        {t} mean = {n(0)}, variance = {n(0)};
        for (int i = 0; i < {length}; i++) mean += x[i];
        mean /= {n(length)};
        for (int i = 0; i < {length}; i++) variance += (x[i] - mean) * (x[i] - mean);
        const {t} inverse = {inverse};
        for (int i = 0; i < {length}; i++) y[i] = {value};
    }}
"""
        return self._function(name, body)

    def _add(self, layer: Layer, name: str, weights: str) -> str:
        value = self.activation(layer.activation)("x[i] + z[i]")
        return self._function(name, f"    for (int i = 0; i < {layer.size}; i++) y[i] = {value};\n", "const {t} *x, const {t} *z")

    def _activation(self, layer: Layer, name: str, weights: str) -> str:
        value = self.activation(layer.activation)("x[i]")
        return self._function(name, f"    for (int i = 0; i < {layer.size}; i++) y[i] = {value};\n")

    def _select(self, layer: Layer, name: str, weights: str) -> str:
        start = layer.settings["index"] * layer.size
        return self._function(name, f"    for (int i = 0; i < {layer.size}; i++) y[i] = x[{start} + i];\n")

    def _softmax(self, layer: Layer, name: str, weights: str) -> str:
        length, t = layer.settings.get("length", layer.shape[-1]), self.number.type
        body = f"""    for (int row = 0; row < {layer.size // length}; row++, x += {length}, y += {length}) {{
        {t} top = x[0], sum = {self.number.literal(0)};
        for (int i = 1; i < {length}; i++) if (x[i] > top || x[i] != x[i]) top = x[i];
        for (int i = 0; i < {length}; i++) {{ y[i] = {self.number.call("exp", "x[i] - top")}; sum += y[i]; }}
        for (int i = 0; i < {length}; i++) y[i] /= sum;
    }}
"""
        return self._function(name, body)

    def _recurrent(self, layer: Layer, name: str, weights: str, update: str, state: str) -> str:
        """Both products of each time step by functions of their own, then the update of the state from their sums."""
        gates, hidden = layer.weights["weight_hh"].shape
        for part in ("ih", "hh"):
            body = self.product(
                f"{weights}_{part}", layer.weights[f"weight_{part}"], layer.weights[f"bias_{part}"], lambda expression: expression
            )
            self.functions.append(self._function(f"{name}_{part}", body))
        body = f"""    {self.number.type} *restrict a = s, *restrict b = s + {gates};
    for (int t = 0; t < {layer.in_shape[0]}; t++, x += {layer.in_shape[1]}, y += {hidden}) {{
        {name}_ih(x, a);
        {name}_hh(h, b);
        for (int k = 0; k < {hidden}; k++) {{
{update}            y[k] = h[k];
        }}
    }}
"""
        return self._function(name, body, more=state.format(t=self.number.type))

    def _rnn(self, layer: Layer, name: str, weights: str) -> str:
        sigma = self.activation((layer.settings["nonlinearity"],))
        return self._recurrent(layer, name, weights, f"            h[k] = {sigma('a[k] + b[k]')};\n", ", {t} *restrict s, {t} *h")

    def _gru(self, layer: Layer, name: str, weights: str) -> str:
        sigmoid, tanh = self.activation(("sigmoid",)), self.activation(("tanh",))
        n, t, one = layer.weights["weight_hh"].shape[1], self.number.type, self.number.literal(1)
        update = f"""            const {t} r = {sigmoid("a[k] + b[k]")}, z = {sigmoid(f"a[{n} + k] + b[{n} + k]")};
            const {t} candidate = {tanh(f"a[{2 * n} + k] + r * b[{2 * n} + k]")};
            h[k] = ({one} - z) * candidate + z * h[k];
"""
        return self._recurrent(layer, name, weights, update, ", {t} *restrict s, {t} *h")

    def _lstm(self, layer: Layer, name: str, weights: str) -> str:
        sigmoid, tanh = self.activation(("sigmoid",)), self.activation(("tanh",))
        n, t = layer.weights["weight_hh"].shape[1], self.number.type
        update = f"""            const {t} i = {sigmoid("a[k] + b[k]")}, f = {sigmoid(f"a[{n} + k] + b[{n} + k]")};
            const {t} g = {tanh(f"a[{2 * n} + k] + b[{2 * n} + k]")}, o = {sigmoid(f"a[{3 * n} + k] + b[{3 * n} + k]")};
            c[k] = f * c[k] + i * g;
            h[k] = o * {tanh("c[k]")};
"""
        return self._recurrent(layer, name, weights, update, ", {t} *restrict s, {t} *h, {t} *c")


def in_panels(rows: np.ndarray, panel: int) -> np.ndarray:
    """[outputs, inputs] as a flat array: panels of outputs, and in each panel input by input."""
    return np.concatenate([rows[start : start + panel].T.reshape(-1) for start in range(0, len(rows), panel)])


def as_image(shape: tuple[int, ...]) -> tuple[int, int]:
    """Height and width of [channels, width] or [channels, height, width]."""
    return (1, shape[1]) if len(shape) == 2 else (shape[1], shape[2])
