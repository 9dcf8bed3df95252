"""Closed-form first and second derivatives of a smooth MLP, as C text.

With a_0 = x, h_l = W_l a_{l-1} + b_l, a_l = sigma(h_l): the tangents D_l = sigma'(h_l) W_l D_{l-1}, the Hessian-vector product by the
forward tangent of the backward pass, and the whole Hessian S_l = sigma'' (W D)(W D)^T + sigma' W S_{l-1}.
"""

from __future__ import annotations

from fewer.control.smart_composites.to_c.network import Layer, Network, UnsupportedLayer
from fewer.control.smart_composites.to_c.text import Number

SMOOTH = ("tanh", "sigmoid", "softplus", "gelu")


def smooth_layers(network: Network) -> list[Layer]:
    """The layers of a chain of Linear layers and smooth activations; UnsupportedLayer for anything else."""
    chain, value = [], network.input
    for layer in network.layers:
        if layer.kind == "alias":
            value = layer.output
            continue
        if layer.kind != "linear" or len(layer.shape) != 1 or layer.inputs != [value]:
            raise UnsupportedLayer(layer.path, f"no derivatives of a {layer.kind}; expected a chain of Linear and smooth activations")
        if layer.activation and layer.activation[0] not in SMOOTH:
            raise UnsupportedLayer(layer.path, f"no second derivative of {layer.activation[0]}; derivatives are had of {', '.join(SMOOTH)}")
        chain.append(layer)
        value = layer.output
    return chain


def slopes(kind: str, activation: tuple, number: Number) -> str:
    """C text that sets v, d1 and d2 to sigma(h), sigma'(h) and sigma''(h)."""
    n, call = number.literal, number.call
    if kind == "tanh":
        return f"v = {call('tanh', 'h')}; d1 = {n(1)} - v * v; d2 = {n(-2)} * v * d1;"
    if kind == "sigmoid":
        return f"v = {n(1)} / ({n(1)} + {call('exp', '-h')}); d1 = v * ({n(1)} - v); d2 = d1 * ({n(1)} - {n(2)} * v);"
    if kind == "softplus":
        beta, threshold = activation[1:]
        linear = f"if (h * {n(beta)} > {n(threshold)}) {{ v = h; d1 = {n(1)}; d2 = {n(0)}; }} else"
        return (
            f"{linear} {{ v = {call('log1p', call('exp', f'h * {n(beta)}'))} / {n(beta)}; "
            f"d1 = {n(1)} / ({n(1)} + {call('exp', f'-h * {n(beta)}')}); d2 = {n(beta)} * d1 * ({n(1)} - d1); }}"
        )
    density = f"{n(0.39894228040143267794)} * {call('exp', f'{n(-0.5)} * h * h')}"
    below = f"{n(0.5)} * ({n(1)} + {call('erf', f'h * {n(0.70710678118654752440)}')})"
    return f"{{ const {number.type} p = {density}, c = {below}; v = h * c; d1 = c + h * p; d2 = p * ({n(2)} - h * h); }}"


def derivative_text(prefix: str, network: Network, names: list[tuple[str, int]], number: Number) -> str:
    """`PREFIX_jacobian`, `PREFIX_hvp` and `PREFIX_hessian`.

    Args:
        names: for each linear layer the index of its weight arrays and the width of their panels.
    """
    layers, t, zero = smooth_layers(network), number.type, number.literal(0)
    nx, ny = network.inputs, network.outputs
    widest = max(layer.size for layer in layers)
    text = ""
    for at, (layer, (w, panel)) in enumerate(zip(layers, names, strict=True)):
        outputs, inputs = layer.weights["weight"].shape
        whole = outputs // panel * panel
        text += (
            f"static {t} {prefix}_at{at}(int o, int i)\n{{\n    const int first = o / {panel} * {panel};\n"
            f"    const int width = first < {whole} ? {panel} : {max(outputs - whole, 1)};\n"
            f"    return {prefix}_{w}[first * {inputs} + i * width + (o - first)];\n}}\n"
        )
        sigma = (
            slopes(layer.activation[0], layer.activation, number) if layer.activation else f"v = h; d1 = {number.literal(1)}; d2 = {zero};"
        )
        text += (
            f"static void {prefix}_slopes{at}(const {t} *x, {t} *y, {t} *first, {t} *second)\n{{\n"
            f"    for (int o = 0; o < {outputs}; o++) {{\n        {t} h = {prefix}_{w}_bias[o], v, d1, d2;\n"
            f"        for (int i = 0; i < {inputs}; i++) h += {prefix}_at{at}(o, i) * x[i];\n        {sigma}\n"
            f"        y[o] = v; first[o] = d1; second[o] = d2;\n    }}\n}}\n"
        )
    return text + _forward(prefix, layers, t, zero, nx, ny, widest) + _hvp(prefix, layers, t, zero, nx, ny, widest)


def _forward(prefix: str, layers: list[Layer], t: str, zero: str, nx: int, ny: int, widest: int) -> str:
    """Jacobian alone, or with the whole Hessian [outputs, inputs, inputs]."""
    body = f"    {t} a[{widest}], b[{widest}], d1[{widest}], d2[{widest}], D[{widest * nx}], E[{widest * nx}];\n"
    second = f"    {t} S[{widest * nx * nx}], T[{widest * nx * nx}];\n"
    jacobian, hessian = "", ""
    for at, layer in enumerate(layers):
        outputs, inputs = layer.weights["weight"].shape
        source, target = ("x", "a") if at == 0 else ("a", "b") if at % 2 else ("b", "a")
        before, after = ("D", "E") if at % 2 else ("E", "D")
        shapes, targets = ("S", "T") if at % 2 else ("T", "S")
        run = f"    {prefix}_slopes{at}({source}, {target}, d1, d2);\n"
        sum1 = f"g += {prefix}_at{at}(o, i) * {before}[i * {nx} + k];"
        row = f"{t} g = {zero}; for (int i = 0; i < {inputs}; i++) {sum1}" if at else f"const {t} g = {prefix}_at0(o, k);"
        loop = f"    for (int o = 0; o < {outputs}; o++) for (int k = 0; k < {nx}; k++) {{ {row} {after}[o * {nx} + k] = %s; }}\n"
        finish = f"    for (int i = 0; i < {outputs * nx}; i++) {after}[i] *= d1[i / {nx}];\n"
        jacobian += run + loop % "g * d1[o]"
        curved = f"{after}[o * {nx} + k] * {after}[o * {nx} + m] * d2[o]"
        sum2 = f"for (int i = 0; i < {inputs}; i++) q += {prefix}_at{at}(o, i) * {shapes}[(i * {nx} + k) * {nx} + m];" if at else ""
        hessian += run + loop % "g"
        hessian += (
            f"    for (int o = 0; o < {outputs}; o++) for (int k = 0; k < {nx}; k++) for (int m = 0; m <= k; m++) {{\n"
            f"        {t} q = {zero}; {sum2}\n        q = q * d1[o] + {curved};\n"
            f"        {targets}[(o * {nx} + k) * {nx} + m] = q; {targets}[(o * {nx} + m) * {nx} + k] = q;\n    }}\n" + finish
        )
    odd = len(layers) % 2
    value, tangent, curve = ("a", "D", "S") if odd else ("b", "E", "T")
    give = f"    for (int i = 0; i < {ny * nx}; i++) jacobian[i] = {tangent}[i];\n"
    give_value = f"    for (int i = 0; i < {ny}; i++) value[i] = {value}[i];\n"
    unused, unused2 = "    (void)b; (void)E;\n", "    (void)T;\n"
    return (
        f"void {prefix}_jacobian(const {t} x[], {t} jacobian[])\n{{\n{body}{unused}{jacobian}{give}}}\n"
        f"void {prefix}_hessian(const {t} x[], {t} value[], {t} jacobian[], {t} hessian[])\n{{\n{body}{second}{unused}{unused2}{hessian}{give_value}{give}"
        f"    for (int i = 0; i < {ny * nx * nx}; i++) hessian[i] = {curve}[i];\n}}\n"
    )


def _hvp(prefix: str, layers: list[Layer], t: str, zero: str, nx: int, ny: int, widest: int) -> str:
    """The Hessian of weights^T f times v: tangents go forward, then the gradient and its tangent go backward."""
    count = len(layers)
    text = f"    {t} a[{widest}], b[{widest}], D[{widest}], E[{widest}], d1[{count}][{widest}], d2[{count}][{widest}], dh[{count}][{widest}];\n"
    text += f"    {t} g[{widest}], gt[{widest}], p[{max(widest, nx)}], pt[{max(widest, nx)}];\n"
    text += "    (void)b; (void)D; (void)E;  /* of one layer alone */\n"
    for at, layer in enumerate(layers):
        outputs, inputs = layer.weights["weight"].shape
        source, target = ("x", "a") if at == 0 else ("a", "b") if at % 2 else ("b", "a")
        before, after = ("v", "D") if at == 0 else ("D", "E") if at % 2 else ("E", "D")
        text += (
            f"    {prefix}_slopes{at}({source}, {target}, d1[{at}], d2[{at}]);\n    for (int o = 0; o < {outputs}; o++) {{\n        {t} h = {zero};\n"
            f"        for (int i = 0; i < {inputs}; i++) h += {prefix}_at{at}(o, i) * {before}[i];\n"
            f"        dh[{at}][o] = h; {after}[o] = d1[{at}][o] * h;\n    }}\n"
        )
    text += f"    for (int o = 0; o < {ny}; o++) {{ p[o] = weights[o]; pt[o] = {zero}; }}\n"
    for at in reversed(range(count)):
        outputs, inputs = layers[at].weights["weight"].shape
        text += (
            f"    for (int o = 0; o < {outputs}; o++) {{ g[o] = p[o] * d1[{at}][o]; gt[o] = pt[o] * d1[{at}][o] + p[o] * d2[{at}][o] * dh[{at}][o]; }}\n"
            f"    for (int i = 0; i < {inputs}; i++) {{\n        {t} s = {zero}, st = {zero};\n        for (int o = 0; o < {outputs}; o++) {{ "
            f"s += {prefix}_at{at}(o, i) * g[o]; st += {prefix}_at{at}(o, i) * gt[o]; }}\n        p[i] = s; pt[i] = st;\n    }}\n"
        )
    text += f"    for (int i = 0; i < {nx}; i++) product[i] = pt[i];\n"
    return f"void {prefix}_hvp(const {t} x[], const {t} weights[], const {t} v[], {t} product[])\n{{\n{text}}}\n"
