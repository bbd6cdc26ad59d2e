"""Ten thousand random calls of the public functions: each is refused in words that name the argument, or gives the right result.

What a call is and what is right is in the files beside this one. Cases run in a process of their own, so that one that ends it is a
failure of its seed. ``--fuzz-cases=N`` runs another number of them. What was found, and mended, is below by name.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import kdkernels as kd
from kdkernels import backends
from kdkernels.backends import native
from tests.fuzz import check, small
from tests.fuzz.calls import LOSSES
from tests.fuzz.draw import draw
from tests.support.refusals import refused

INF, NAN = torch.inf, torch.nan
CHUNKS = 20


def in_a_child(seeds: Iterator[int], fails: Callable[[int], str | None]) -> str | None:
    """The first failure among the seeds; a child process that dies is one, of the seed that it was at."""
    at, (receiving, sending) = mmap.mmap(-1, 8), os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of other threads: these here hold no locks of ours
        child = os.fork()
    if child == 0:
        try:
            for seed in seeds:
                at[:] = struct.pack("q", seed)
                if failure := fails(seed):
                    os.write(sending, failure.encode()[: 2**15])
                    break
        except BaseException as error:
            os.write(sending, f"case {struct.unpack('q', at)[0]}: {error!r}".encode())
        finally:
            os._exit(0)
    os.close(sending)
    with os.fdopen(receiving, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if status != 0:
        seed = struct.unpack("q", at)[0]
        return f"case {seed} ended its process (status {status})\nrepeat it: python -m tests.fuzz.check {seed}"
    return said or None


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_call_is_refused_or_right(chunk: int, request: pytest.FixtureRequest) -> None:
    seeds = range(chunk, request.config.getoption("--fuzz-cases"), CHUNKS)
    if failure := in_a_child(iter(seeds), check.fails):
        pytest.fail(failure, pytrace=False)


class TestTheSuiteItself:
    def test_it_sees_wrong_results_wrong_errors_and_a_dead_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert in_a_child(iter(range(5)), check.fails) is None

        def dies(seed: int) -> str | None:
            return os.kill(os.getpid(), signal.SIGKILL) if seed == 3 else None

        found = in_a_child(iter(range(5)), dies)
        assert found is not None
        assert "case 3 ended its process" in found

        def first(broken: Any) -> str:
            monkeypatch.setattr(kd, "kd_loss", broken)
            return next(failure for seed in range(200) if (failure := check.fails(seed)))

        right = kd.kd_loss
        assert "losses" in first(lambda *args, **options: right(*args, **{**options, "kd_weight": 0.123}))
        assert "KeyError" in first(lambda *_, **__: {}["student_logits"])

        def names_nothing(*_: Any, **__: Any) -> None:
            raise ValueError("bad input")

        assert "refused" in first(names_nothing)

    def test_it_reaches_every_function_on_every_backend_and_both_ends(self) -> None:
        calls = [draw(seed) for seed in range(1500)]
        functions = Counter(call.function for call in calls)
        assert set(functions) == {*LOSSES, *small.SMALL}
        assert min(functions.values()) >= 15
        assert {call.variant for call in calls} == {*native.instruction_sets(), "reference"}
        assert 0.3 <= sum(bool(call.bad) for call in calls) / len(calls) <= 0.7


class TestWhatItFound:
    def test_a_teacher_of_more_digits_beside_dropped_rows(self) -> None:
        hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
        wide = hidden.double(), weight.double()
        loss = kd.linear_kd_loss(hidden, weight, *wide, token_weight=torch.tensor([0.0, 1.0, 1.0]))
        assert loss.dtype == torch.float32
        assert loss.abs() <= 1e-6

    @pytest.mark.parametrize("temperature", [1e-9, 1e-3, 1.0])
    def test_a_teacher_of_more_digits_in_blocks_of_the_vocabulary(self, temperature: float) -> None:
        generator = torch.Generator().manual_seed(0)
        x, z = torch.randn(2, 6, 8, generator=generator)
        weight = torch.randn(37, 8, generator=generator)
        found = []
        for strategy in ("tokens", "vocab"):
            hidden = x.clone().requires_grad_()
            kd.linear_kd_loss(
                hidden, weight, z.double(), weight.double(), temperature=temperature, strategy=strategy, memory_budget=1000
            ).backward()
            found.append(hidden.grad)
        # Logits of 1 / T have this much rounding.
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5 * max(temperature, 1e-3))

    @pytest.mark.parametrize("tail", ["renormalize", "bucket"])
    @pytest.mark.parametrize("last", [-1.0, 1.0])
    def test_the_target_cannot_ban_away_what_is_no_distribution_of_the_student(self, last: float, tail: str) -> None:
        """+inf beside the k tokens, or -inf everywhere."""
        hidden, weight = torch.tensor([[-INF]]), torch.tensor([[1.0], [1.0], [last]], requires_grad=True)
        given = torch.tensor([[0, 1]]), torch.tensor([[-0.7, -0.7]])
        loss = kd.linear_topk_kd_loss(hidden, weight, *given, t=0.3, tail=tail)
        assert loss.isnan()
        loss.backward()
        assert weight.grad.isnan().any()

    @pytest.mark.parametrize("backend", [name for name in backends.usable() if name != "triton"])
    def test_without_a_term_nothing_is_looked_at(self, backend: str) -> None:
        x = torch.tensor([[NAN, 1.0], [INF, 0.0]], requires_grad=True)
        with backends.use(backend):
            loss = kd.kd_loss(x, torch.zeros(2, 2), kd_weight=0.0, return_metrics=True)[0]
        loss.backward()
        assert loss == 0
        assert (x.grad == 0).all()

    @pytest.mark.parametrize("budget", [2**62, 2**63, 2**100])
    def test_a_budget_without_end_is_a_budget(self, budget: int) -> None:
        hidden, weight = torch.randn(4, 3), torch.randn(7, 3)
        kd.free_scratch()
        assert kd.linear_kd_loss(hidden, weight, hidden, weight, memory_budget=budget) == 0
        assert kd.plan(4, 7, 3, 3, memory_budget=budget).chunk_rows == 4

    @pytest.mark.parametrize(
        ("wrong", "error", "words"),
        [
            ({"temperature": 1e-300}, ValueError, ("temperature", "1e-9 to 1e5", "1e-300")),
            ({"kd_weight": 10**400}, ValueError, ("kd_weight", "1e18")),
            ({"kd_weight": 1e300}, ValueError, ("kd_weight", "1e18", "1e+300")),
            ({"ignore_index": 2**63}, ValueError, ("ignore_index", "int64", str(2**63))),
            ({"square_temperature": "no"}, TypeError, ("square_temperature", "True or False", "str")),
            ({"return_metrics": 1}, TypeError, ("return_metrics", "True or False", "int")),
            ({"normalizer": torch.tensor(1j)}, ValueError, ("normalizer", "0-dim", "complex64")),
            ({"normalizer": torch.ones((), device="meta")}, ValueError, ("normalizer", "meta", "cpu")),
            ({"t": torch.ones((), device="meta")}, ValueError, ("t is", "meta", "cpu")),
            ({"divergence": kd.Divergence("kl", max)}, ValueError, ("divergence", "'kl'", "forward_kl")),
            ({"divergence": kd.Divergence("jsd", max, NAN)}, ValueError, ("divergence", "'jsd'", "nan", "(0, 1)")),
            ({"student_logits": torch.ones(2, 3).to_sparse()}, TypeError, ("student_logits", "sparse", "dense")),
        ],
    )
    def test_refused_by_name(self, wrong: dict[str, Any], error: type[Exception], words: tuple[str, ...]) -> None:
        with refused(error, *words):
            kd.kd_loss(**{"student_logits": torch.ones(2, 3), "teacher_logits": torch.ones(2, 3), **wrong})
