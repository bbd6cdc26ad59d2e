"""Which products of logits in 16 bits the CUDA kernel makes, what it is started with, and that all others go to Triton's."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_scale
from benchmarks import offsets as simulated
from kdkernels.backends.cuda import compile, product
from kdkernels.backends.cuda.compile import CompileError, DriverError
from kdkernels.engine.cut import OFFSETS_COLUMNS
from tests.support import okd, stub
from tests.support.cases import Case, assert_as_good_as_eager, draw, ratios
from tests.support.hopper import on_this_machine
from tests.support.needs import needs_compiler
from tests.support.oracle import Options

pytest.importorskip("triton", reason="Triton is not installed")
from kdkernels.backends.triton import offsets
from kdkernels.backends.triton.blocks import TABLE
from tests.support.interpreter import as_on_a_gpu

KIB = 1024
TOKENS, VOCAB, DIMS = 20, 300, (24, 40)
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDKERNELS_LOGITS", "offsets-cuda")
    monkeypatch.setattr(product, "_given_up", set())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """Of each product: whether CUDA C++ made it, and whether it was the teacher's."""
    found: list[tuple[bool, bool]] = []
    stored, kernel = product.stored, offsets.offsets_product_kernel

    def seen(*arguments: Any) -> bool:
        done = stored(*arguments)
        if done:
            found.append((True, arguments[6] is not None))
        return done

    class Kernel:
        def __getitem__(self, grid: Any) -> Any:
            def start(*arguments: Any, **keywords: Any) -> None:
                found.append((False, arguments[7] is not None))
                kernel[grid](*arguments, **keywords)

            return start

    monkeypatch.setattr(product, "stored", seen)
    monkeypatch.setattr(offsets, "offsets_product_kernel", Kernel())
    return found


def case_of(name: str = "jsd", *, seed: int = 0, dims: tuple[int, int] = DIMS, **options: Any) -> Case:
    drawn = draw(seed, (TOKENS,), VOCAB, dims, 3.0, BF16)
    labels = torch.arange(TOKENS) * 7
    return replace(drawn, student_scale=0.75, teacher_scale=1.25, labels=labels, options=Options(name, **options))


@contextlib.contextmanager
def both_kernels(row: int = 128) -> Iterator[None]:
    with as_on_a_gpu(blocks=(16, product.BLOCK_V, 32), row=row), on_this_machine():
        yield


BY_CUDA, BY_CUDA_OF_TEACHER, BY_TRITON, BY_TRITON_OF_TEACHER = (True, False), (True, True), (False, False), (False, True)
MIXING = BY_TRITON_OF_TEACHER
PLAIN = [BY_CUDA, BY_CUDA_OF_TEACHER, MIXING]
TRITON = [BY_TRITON, BY_TRITON_OF_TEACHER, MIXING]


@needs_compiler
class TestLoss:
    @pytest.mark.parametrize("t", [1.0, 0.4])
    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_as_good_as_eager_and_close_to_tritons(
        self, t: float, temperature: float, calls: list[tuple[bool, bool]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        case = case_of("jsd", t=t, temperature=temperature)
        with both_kernels():
            found = case.run()
            assert set(calls) == set(PLAIN)
            del calls[:]
            monkeypatch.setenv("KDKERNELS_LOGITS", "offsets")
            right = case.run()
            assert set(calls) == set(TRITON)
        assert_as_good_as_eager({0: ratios([found], [case.plain(BF16)], [case.plain()])})
        for name, value in right.items():
            torch.testing.assert_close(found[name].float(), value.float(), rtol=2e-2, atol=4e-3 * value.abs().max().item())

    @pytest.mark.parametrize("t", [1.0, 0.4])
    def test_metrics_are_those_of_tritons(self, t: float, calls: list[tuple[bool, bool]], monkeypatch: pytest.MonkeyPatch) -> None:
        """Both models' products are their own then, whatever t."""
        case = case_of("forward_kl", t=t)
        found = []
        for asked, maker in (("offsets-cuda", BY_CUDA), ("offsets", BY_TRITON)):
            monkeypatch.setenv("KDKERNELS_LOGITS", asked)
            del calls[:]
            with both_kernels(row=product.BLOCK_V):
                _, metrics = case.loss(return_metrics=True)
            assert calls == [maker, maker]
            found.append(metrics)
        for name, value in found[1].items():
            torch.testing.assert_close(found[0][name], value, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("name", ["forward_kl", "jsd"])
    def test_a_target_that_is_the_student_is_no_loss(self, name: str) -> None:
        """Student and target come from different kernels, which add up in different orders."""
        with both_kernels():
            found = case_of(name, t=0.0).run()
        assert (found["losses"] == 0).all()
        assert not found["student_hidden"].any()

    def test_a_teacher_that_learns_too(self, calls: list[tuple[bool, bool]]) -> None:
        case = case_of("jsd", seed=3, ce_weight=0.5)
        exact, eager = (okd.plain(case, 0.3, dtype) for dtype in (torch.float64, BF16))
        with both_kernels():
            found = okd.results(case, 0.3, strategy="tokens")
        assert set(calls) == set(PLAIN)
        for learner, result in found.items():
            assert_as_good_as_eager({0: ratios([result], [eager[learner]], [exact[learner]])})

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # what the interpreter's NumPy says
    @pytest.mark.parametrize("model", ["student", "teacher"])
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_what_is_not_finite_does_what_it_does_in_tritons(
        self, value: float, model: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """NaN and +inf make their rows NaN and no other; -inf bans, by overflow too, and where a tile has nothing else."""
        case = case_of("reverse_kl")
        hidden, weight = (getattr(case, f"{model}_{part}") for part in ("hidden", "weight"))
        hidden[:, 0], hidden[:, 1] = 1.0, 100.0
        if value == -torch.inf:
            weight[7, 0] = weight[256:, 0] = -torch.inf
            weight[8, 1] = -3e38
        else:
            hidden[[3, 7], 5] = value
        losses = []
        for asked in ("offsets-cuda", "offsets"):
            monkeypatch.setenv("KDKERNELS_LOGITS", asked)
            with both_kernels():
                losses.append(case.run()["losses"])
        assert losses[0].isnan().sum() == (0 if value == -torch.inf else 2)
        torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3, equal_nan=True)


@needs_compiler
class TestWhatTritonMakes:
    @pytest.mark.parametrize("part", ["student_bias", "teacher_bias"])
    def test_heads_with_a_bias(self, part: str, calls: list[tuple[bool, bool]]) -> None:
        case = replace(case_of(), **{part: torch.zeros(VOCAB, dtype=BF16)})
        with both_kernels():
            case.loss()
        assert calls == ([BY_TRITON, *PLAIN[1:]] if part == "student_bias" else [BY_CUDA, *TRITON[1:]])

    @pytest.mark.parametrize("part", ["student_softcap", "teacher_softcap"])
    def test_heads_with_a_softcap(self, part: str, calls: list[tuple[bool, bool]]) -> None:
        with both_kernels():
            replace(case_of(), **{part: 30.0}).loss()
        assert calls == ([BY_TRITON, *PLAIN[1:]] if part == "student_softcap" else [BY_CUDA, *TRITON[1:]])

    def test_sums_at_another_temperature_too(self, calls: list[tuple[bool, bool]]) -> None:
        with both_kernels():
            case_of(temperature=2.0, ce_weight=0.5).loss()
        assert calls == [BY_TRITON, *PLAIN[1:]]

    def test_tiles_of_other_widths(self, calls: list[tuple[bool, bool]]) -> None:
        with as_on_a_gpu(), on_this_machine():
            case_of().loss()
        assert calls == TRITON

    def test_rows_that_are_not_of_16_bytes(self, calls: list[tuple[bool, bool]]) -> None:
        with both_kernels():
            case_of(dims=(20, 40)).loss()
        assert calls == [BY_TRITON, *PLAIN[1:]]

    def test_without_being_asked(self, calls: list[tuple[bool, bool]], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KDKERNELS_LOGITS", "offsets")
        with both_kernels():
            case_of().loss()
        assert calls == TRITON

    def test_a_device_that_cannot(self, calls: list[tuple[bool, bool]]) -> None:
        with both_kernels(), mock.patch.object(product, "why_not", return_value="no NVRTC"):
            case_of().loss()
        assert calls == TRITON

    def test_a_device_whose_clusters_do_not_fit(self, calls: list[tuple[bool, bool]]) -> None:
        with both_kernels(), mock.patch.object(product, "_kernel", return_value=(None, 0)):
            case_of().loss()
        assert calls == TRITON

    @pytest.mark.parametrize("error", [CompileError("line 3"), OSError("no NVRTC"), DriverError("refused", 1)], ids=repr)
    def test_what_cannot_be_compiled_is_tried_once(
        self, error: Exception, calls: list[tuple[bool, bool]], caplog: pytest.LogCaptureFixture
    ) -> None:
        with both_kernels(), mock.patch.object(product, "_kernel", side_effect=error) as tried:
            case_of().loss()
            case_of().loss()
        assert calls == TRITON * 2
        assert tried.call_count == 1
        (said,) = caplog.messages
        assert "torch.bfloat16" in said
        assert str(error) in said

    def test_an_error_that_leaves_the_device_dead_is_raised(self, calls: list[tuple[bool, bool]]) -> None:
        dead = DriverError("cuLaunchKernel: CUDA_ERROR_ILLEGAL_ADDRESS", 700)
        with both_kernels(), mock.patch.object(product, "_kernel", side_effect=dead), pytest.raises(DriverError, match="ILLEGAL"):
            case_of().loss()
        assert not calls


def test_products_of_float32_and_of_two_dtypes_and_scales_of_no_use() -> None:
    hidden, weight, codes = (
        torch.zeros(3, 16, dtype=BF16),
        torch.zeros(VOCAB, 16, dtype=BF16),
        torch.zeros(3, 320).half()[:, :VOCAB],
    )
    largest, sums = torch.zeros(2, 3, 2)
    with mock.patch.object(product, "why_not", return_value=""):
        assert product._takes(hidden, weight, 1.0, codes, largest)
        assert not product._takes(hidden.float(), weight.float(), 1.0, codes, largest)
        assert not product._takes(hidden, weight.half(), 1.0, codes, largest)
        for factor in (0.0, -1.0, torch.inf, torch.nan, 1e-44):
            assert not product.stored(hidden, weight, factor, codes, largest, sums)
        assert not product._takes(hidden[:, 1:], weight[:, 1:], 1.0, codes, largest)


@pytest.mark.parametrize(
    ("missing", "capability", "why"),
    [
        ("", (9, 0), ""),
        ("no NVRTC", (9, 0), "no NVRTC"),
        ("", (10, 0), "compute capability 10.0; the kernel is made for 9.0"),
    ],
)
def test_why_not(missing: str, capability: tuple[int, int], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "missing", lambda _: missing)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert product.why_not(torch.device("cuda")) == why


def test_tiles_are_as_wide_as_those_of_tritons_table() -> None:
    matrix = TABLE["sm_90", 2].offsets
    assert matrix is not None
    assert matrix.block_v == product.BLOCK_V == OFFSETS_COLUMNS == gpu_scale.TILE == simulated.TILE


@stub.needs_nvrtc
class TestLaunch:
    """On the stub driver, which refuses what a driver would."""

    @pytest.fixture
    def driver(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
        library = stub.in_place(monkeypatch)
        monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: mock.Mock(cuda_stream=77))
        monkeypatch.setattr(product, "why_not", lambda _: "")
        product._kernel.cache_clear()
        yield library
        product._kernel.cache_clear()

    def tensors(self, tokens: int, vocab: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        hidden, weight = torch.zeros(tokens, width, dtype=dtype), torch.zeros(vocab, width, dtype=dtype)
        codes = torch.zeros(tokens, -(-vocab // 64) * 64, dtype=torch.float16)[:, :vocab]
        return hidden, weight, codes, torch.zeros(tokens, -(-vocab // 256)), torch.zeros(tokens, -(-vocab // 256))

    @pytest.mark.parametrize("dtype", [BF16, torch.float16])
    @pytest.mark.parametrize(("tokens", "vocab", "grid"), [(1000, 1030, 40), (8192, 1030, 132), (3, 5, 2)])
    def test_grid_maps_and_arguments(self, tokens: int, vocab: int, grid: int, dtype: torch.dtype, driver: ctypes.CDLL) -> None:
        hidden, weight, codes, largest, sums = self.tensors(tokens, vocab, 40, dtype)
        t, seen = torch.ones(()), []

        def launch(self: Any, *given: Any) -> None:
            seen.append(given)
            started(self, *given)

        started = compile.Kernel.launch
        with mock.patch.object(compile.Kernel, "launch", launch):
            assert product.stored(hidden, weight, 0.5, codes, largest, sums, t)
        (one,) = stub.seen(driver, "stub_launches")
        assert (one.kernel, list(one.grid), one.threads, one.shared) == (b"product", [grid, 1, 1], 384, product.SHARED)
        maps = stub.seen(driver, "stub_tensor_maps")
        assert [(found.address, list(found.dims[:2]), found.strides[0], list(found.box[:2])) for found in maps] == [
            (hidden.data_ptr(), [40, tokens], 80, [64, 128]),
            (weight.data_ptr(), [40, vocab], 80, [64, 128]),
            (codes.data_ptr(), [vocab, tokens], codes.stride(0) * 2, [64, 16]),
        ]
        ((_, _, _, stream, (*given, arguments)),) = seen
        assert stream == 77
        assert [type(one) for one in given] == [compile.TensorMap] * 3
        assert (arguments.largest, arguments.sums, arguments.t) == (largest.data_ptr(), sums.data_ptr(), t.data_ptr())
        assert (arguments.factor, arguments.tokens, arguments.vocab, arguments.width) == (0.5, tokens, vocab, 40)

    def test_of_the_student_there_is_no_t(self, driver: ctypes.CDLL) -> None:
        with mock.patch.object(compile.Kernel, "launch") as launch:
            assert product.stored(*self.tensors(3, 5, 40, BF16)[:2], 1.0, *self.tensors(3, 5, 40, BF16)[2:])
        assert launch.call_args.args[-1][-1].t is None

    def test_a_refusal_of_the_driver_leaves_it_to_triton(self, driver: ctypes.CDLL, caplog: pytest.LogCaptureFixture) -> None:
        driver.stub_device(90, 99 * KIB, 100 * KIB)
        for _ in range(2):
            assert not product.stored(*self.tensors(3, 5, 40, BF16)[:2], 1.0, *self.tensors(3, 5, 40, BF16)[2:])
        (said,) = caplog.messages
        assert "cuFuncSetAttribute" in said
        assert str(product.SHARED) in said
