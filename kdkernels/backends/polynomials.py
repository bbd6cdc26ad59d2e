"""The polynomials that more than one backend computes with, once: Triton takes the numbers, C++ and CUDA a macro of each. The build
loads this file by itself, so it imports nothing of the package.

Minimax fits, the highest power's coefficient first, by Horner's rule.
"""

# (e^d - 1 - d) / d², and (g - log(1 + g)) / g² for g = share (e^d - 1), where |d| < 1/4, so that g lies in (-0.23, 0.29)
EXCESS = (0.0013895341, 0.00834883936, 0.0416667163, 0.166666418, 0.5)
DEFICIT = (-0.0989790931, 0.135521948, -0.144471601, 0.16632323, -0.199954972, 0.250003725, -0.333333611, 0.5)
# (tanh v / v - 1) / v² over v² < 0.4, beyond which 1 - e^-2v loses no digit
TANH = (0.00211801799, -0.00815069769, 0.0216901544, -0.0539448895, 0.13333191, -0.333333313)
# (log(1 + f) - f) / f² over f in [-1/3, 1/3), for the least relative error
LOG = (
    *(0.13820123672485352, -0.1512213796377182, 0.14042332768440247, -0.16472333669662476),
    *(0.20007917284965515, -0.2500423789024353, 0.3333326578140259, -0.5),
)


def macros() -> list[tuple[str, str]]:
    """In C++: KD_EXCESS(v) and so on, with their expressions."""
    found = []
    for name, (first, *others) in {"EXCESS": EXCESS, "DEFICIT": DEFICIT, "TANH": TANH, "LOG": LOG}.items():
        expression = f"{first!r}f"
        for coefficient in others:
            expression = f"({expression} * (v) + {coefficient!r}f)"
        found.append((f"KD_{name}(v)", expression))
    return found
