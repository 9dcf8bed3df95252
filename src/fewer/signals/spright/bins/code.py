"""The terminated convolutional code of the sample-optimal design: its generator matrix gives the offsets, soft Viterbi reads them.

Constraint length 7, generators 171 and 133 (octal), for rate 1/3 also 165. The paper asks for any code of constant rate that is
decoded in linear time; this choice is not in the paper.
"""

from __future__ import annotations

import numba
import numpy as np
from jaxtyping import Float64, Int64, UInt8

GENERATORS = (0o171, 0o133, 0o165)  # octal; the highest bit takes the newest input
MEMORY = 6  # inputs that an output looks back on; as many zeros end a message
STATES = 1 << MEMORY


def generator_matrix(n: int, rate: int = 2) -> UInt8[np.ndarray, "outputs n"]:
    """G with codeword = G k mod 2, rows in the order in which the code sends them: outputs of a step together, rate (n + 6) in all.

    >>> generator_matrix(2)[:4]
    array([[1, 0],
           [1, 0],
           [1, 1],
           [0, 1]], dtype=uint8)
    """
    matrix = np.zeros((n + MEMORY, rate, n), dtype=np.uint8)
    for g in range(rate):
        for delay in range(MEMORY + 1):
            if GENERATORS[g] >> (MEMORY - delay) & 1:
                inputs = np.arange(n)
                matrix[inputs + delay, g, inputs] = 1
    return matrix.reshape(-1, n)


def _outputs() -> Int64[np.ndarray, "registers generators"]:
    """The output bits for every content of the register (newest input in the highest of 7 bits)."""
    registers = range(1 << (MEMORY + 1))
    return np.array([[bin(register & g).count("1") & 1 for g in GENERATORS] for register in registers])


OUTPUTS = _outputs()


@numba.njit(cache=True)
def viterbi(
    received: Float64[np.ndarray, "outputs"], n: int, rate: int, outputs: Int64[np.ndarray, "registers generators"], bits: np.ndarray
) -> float:  # pragma: no cover - compiled
    """The message k whose codeword fits soft values best: the maximum of sum_p received[p] (-1)^codeword[p].

    Args:
        received: one value an output, positive for bit 0; zero where nothing was received.
        n: bits of the message.
        rate: outputs a step.
        outputs: `OUTPUTS`.
        bits: filled with the message [n].

    Returns:
        The maximum.
    """
    steps = n + MEMORY
    came_from = np.empty((steps, STATES), dtype=np.uint8)
    metric, following = np.full(STATES, -np.inf), np.empty(STATES)
    metric[0] = 0.0
    gain = np.empty(1 << rate)
    symbol = np.empty(2 * STATES, dtype=np.int64)
    for register in range(2 * STATES):
        symbol[register] = 0
        for g in range(rate):
            symbol[register] |= outputs[register, g] << g
    for step in range(steps):
        for pattern in range(1 << rate):
            gain[pattern] = 0.0
            for g in range(rate):
                value = received[step * rate + g]
                gain[pattern] += -value if pattern >> g & 1 else value
        for state in range(STATES):  # the state's highest bit is the newest input, the register's lowest the one that leaves
            stay = metric[(2 * state) & (STATES - 1)] + gain[symbol[2 * state]]
            leave = metric[(2 * state + 1) & (STATES - 1)] + gain[symbol[2 * state + 1]]
            came_from[step, state] = leave > stay
            following[state] = max(stay, leave)
        metric, following = following, metric
    state = 0  # reached by the six zeros that end the message, and by no other six
    for step in range(steps - 1, -1, -1):
        if step < n:
            bits[step] = state >> (MEMORY - 1)
        state = ((2 * state) & (STATES - 1)) | came_from[step, state]
    return metric[0]
