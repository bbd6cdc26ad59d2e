"""What a kernel is compiled for again: nothing that changes from step to step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

import kdkernels as kd
from tests.support import ROOT

pytest.importorskip("triton", reason="Triton is not installed")


# Keys of what would be compiled for sm_90, in a process without the interpreter. Nothing is launched.
SPECIALISATIONS = """
import dataclasses, json, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from benchmarks import static_launches
from kdkernels.backends.triton import vocabulary

backend = make_backend(GPUTarget("cuda", 90, 32))
make_step = static_launches._step
known = {}

make_sweeps = vocabulary.LearnerSweeps

def keys(tokens, a, temperature, width=static_launches.VOCAB, architecture="sm_90"):
    # a block of columns begins at a multiple of 16 and may end anywhere
    vocabulary.LearnerSweeps = lambda step, hidden, tile, buffer: make_sweeps(step, hidden, tile[:, :width], buffer)
    def step(name, dtype, metrics, dress=""):
        made = make_step(name, dtype, metrics, dress)
        terms = dataclasses.replace(made.terms, a=a, temperature=temperature, kd_scale=temperature**2)
        return dataclasses.replace(made, terms=terms, t=torch.tensor(a))
    static_launches._step, static_launches.TOKENS = step, tokens
    found = set()
    for launched in static_launches.launches(architecture, torch.bfloat16):
        kernel = launched.kernel
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialization, options = binder(*launched.arguments, **launched.keywords)
        pair = launched.keywords.get("PAIR")
        name = [kernel.fn.__name__, getattr(pair, "__name__", "")]
        constants = {key: str(value) for key, value in launched.keywords.items() if key != "PAIR"}
        rest = [part for part in specialization if not (part[0] == "constexpr")]
        found.add(json.dumps([name, constants, str(rest)], sort_keys=True))
    return found

first = keys(256, 0.3, 2.0)
others = (257, 0.3, 2.0), (1, 0.3, 2.0), (16, 0.7, 3.5), (1000, 0.0, 16.0), (256, 0.3, 2.0, 1008)
print(json.dumps([len(first), *(sorted(keys(*other) ^ first) for other in others)]))
"""


def test_token_counts_blocks_t_and_temperatures_do_not_compile_again() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SPECIALISATIONS)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    count, *differences = json.loads(done.stdout)
    assert count > 3 * len(kd.divergences())
    assert differences == [[]] * len(differences)
