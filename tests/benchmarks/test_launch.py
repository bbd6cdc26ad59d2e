"""The launches without a GPU: the stub driver refuses what a driver would, and a fault is named with its kernel and setting."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import struct
import subprocess
import sys
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
    pytest.skip("Triton's launcher takes a compiler of C, and there is none", allow_module_level=True)
if importlib.util.find_spec("triton.backends.nvidia") is None or sys.platform != "linux":
    pytest.skip("this Triton does not launch on NVIDIA GPUs", allow_module_level=True)

from benchmarks import launch
from benchmarks.launch import Report, Watch
from benchmarks.stub_driver import OnlyLaunches, StubLaunch, StubTensorMap, built
from tests.support import ROOT

KIB = 1024
INVALID, TOO_MANY_REGISTERS, BAD_CLUSTER, UNSUPPORTED = 1, 701, 912, 801
ALLOWED_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Cluster(ctypes.Structure):
    """CUlaunchAttribute of a cluster's dimensions."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("dims", ctypes.c_uint * 3), ("rest", ctypes.c_char * 52))


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Cluster)),
        ("count", ctypes.c_uint),
    )


def compiled(name: str, registers: int) -> bytes:
    """An ELF file with one function, as far as a driver looks for its registers."""
    names = b"\0.text." + name.encode() + b"\0.names\0"
    head = 64
    sections = [(0,) * 10, (1, 1, 0, 0, 0, 0, 0, registers << 24, 0, 0), (len(names) - 7, 3, 0, 0, head, len(names), 0, 0, 0, 0)]
    table = b"".join(struct.pack("<IIQQQQIIQQ", *section) for section in sections)
    start = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF", 2, 190, 1, 0, 0, head + len(names), 0, 64, 0, 0, 64, len(sections), 2)
    return start + names + table


class Driver:
    """The stub driver, asked as Triton asks it."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(built()))
        for name, kind in (("stub_launches", StubLaunch), ("stub_tensor_maps", StubTensorMap)):
            getattr(self.library, name).restype = ctypes.POINTER(kind)
        self.library.stub_device(90, 227 * KIB, 228 * KIB)
        self.library.stub_forget()
        context = ctypes.c_void_p()
        assert self.library.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
        assert self.library.cuCtxSetCurrent(context) == 0

    def outcome(self, code: int) -> tuple[int, str]:
        said = ctypes.c_char_p()
        self.library.cuGetErrorString(code, ctypes.byref(said))
        assert said.value is not None
        return code, said.value.decode()

    def function(self, name: str = "k", registers: int = 32) -> ctypes.c_void_p:
        self.image = ctypes.create_string_buffer(compiled("k", registers))
        module, found = ctypes.c_void_p(), ctypes.c_void_p()
        assert self.library.cuModuleLoadData(ctypes.byref(module), self.image) == 0
        code = self.library.cuModuleGetFunction(ctypes.byref(found), module, name.encode())
        if code:
            raise LookupError(self.outcome(code))
        return found

    def launch(
        self,
        grid: tuple[int, int, int] = (4, 2, 1),
        threads: int = 256,
        shared: int = 0,
        registers: int = 32,
        allowed: int | None = None,
        cluster: tuple[int, int, int] | None = None,
    ) -> tuple[int, str]:
        function = self.function(registers=registers)
        if allowed is not None:
            code = self.library.cuFuncSetAttribute(function, ALLOWED_SHARED, allowed)
            if code:
                return self.outcome(code)
        attributes = (Cluster * 1)(Cluster(4, b"", cluster or (0, 0, 0)))
        config = Config(grid, (threads, 1, 1), shared, None, attributes, int(cluster is not None))
        return self.outcome(self.library.cuLaunchKernelEx(ctypes.byref(config), function, None, None))

    def encode(
        self,
        address: int = 1 << 20,
        dims: tuple[int, ...] = (4096, 300),
        strides: tuple[int, ...] = (8192,),
        box: tuple[int, ...] = (64, 128),
        steps: tuple[int, ...] = (1, 1),
        swizzle: int = 3,
    ) -> tuple[int, str]:
        """Of a bfloat16 matrix; the innermost dimension comes first."""
        room = ctypes.create_string_buffer(256)
        start = -(-ctypes.addressof(room) // 128) * 128
        code = self.library.cuTensorMapEncodeTiled(
            *(ctypes.c_void_p(start), 9, len(dims), ctypes.c_void_p(address), (ctypes.c_uint64 * len(dims))(*dims)),
            *((ctypes.c_uint64 * len(strides))(*strides), (ctypes.c_uint32 * len(box))(*box)),
            *((ctypes.c_uint32 * len(steps))(*steps), 0, swizzle, 2, 0),
        )
        return self.outcome(code)


@pytest.fixture
def driver() -> Driver:
    return Driver()


class TestTensorMaps:
    def test_a_good_one_is_taken_and_remembered(self, driver: Driver) -> None:
        assert driver.encode() == (0, "no error")
        launch_count = ctypes.c_size_t()
        made = driver.library.stub_tensor_maps(ctypes.byref(launch_count))[0]
        assert launch_count.value == 1
        assert (made.rank, made.element_size, made.launches, made.address) == (2, 2, 0, 1 << 20)
        assert (list(made.dims)[:2], list(made.strides)[:1], list(made.box)[:2]) == ([4096, 300], [8192], [64, 128])

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            ({"address": (1 << 20) + 8}, "global address 0x100008, not a multiple of 16"),
            ({"address": 0}, "global address"),
            ({"dims": (0, 300)}, "dim[0] is 0, which is 1 to 2^32"),
            ({"dims": (4096, 2**32 + 1)}, "dim[1] is 4294967297, which is 1 to 2^32"),
            ({"strides": (8200,)}, "stride[0] is 8200 bytes, a multiple of 16 below 2^40"),
            ({"strides": (2**40,)}, "stride[0] is 1099511627776 bytes, a multiple of 16 below 2^40"),
            ({"strides": (4096,)}, "stride[0] is 4096 bytes, less than the 8192 within"),
            ({"box": (64, 512)}, "box[1] is 512, which is 1 to 256"),
            ({"box": (64, 0)}, "box[1] is 0, which is 1 to 256"),
            ({"box": (4, 128), "swizzle": 0}, "the box is 8 bytes wide, not a multiple of 16"),
            ({"box": (128, 128)}, "the box is 256 bytes wide, swizzled over 128"),
            ({"box": (64, 128), "swizzle": 2}, "the box is 128 bytes wide, swizzled over 64"),
            ({"steps": (1, 9)}, "element stride[1] is 9, which is 1 to 8"),
            ({"dims": (8,) * 6, "box": (8,) * 6, "steps": (1,) * 6, "strides": (16,) * 5}, "rank 6, which is 1 to 5"),
        ],
    )
    def test_each_limit(self, driver: Driver, wrong: dict[str, Any], said: str) -> None:
        code, why = driver.encode(**wrong)
        assert code == INVALID
        assert said in why

    def test_older_devices_have_none(self, driver: Driver) -> None:
        driver.library.stub_device(80, 163 * KIB, 164 * KIB)
        assert driver.encode() == (UNSUPPORTED, "a tensor map on sm_80; sm_90 is the first with them")


class TestLaunches:
    def test_a_good_one_is_taken_and_remembered(self, driver: Driver) -> None:
        assert driver.launch((2**31 - 1, 65535, 65535), 1024, 48 * KIB) == (0, "no error")
        assert driver.launch(shared=227 * KIB, allowed=227 * KIB, cluster=(2, 1, 1)) == (0, "no error")
        count = ctypes.c_size_t()
        found = driver.library.stub_launches(ctypes.byref(count))
        assert count.value == 2
        assert (found[1].kernel, list(found[1].grid), found[1].threads, found[1].shared) == (b"k", [4, 2, 1], 256, 227 * KIB)

    @pytest.mark.parametrize(
        ("wrong", "code", "said"),
        [
            ({"grid": (2**31, 1, 1)}, INVALID, "grid x is 2147483648, which is 1 to 2147483647"),
            ({"grid": (1, 65536, 1)}, INVALID, "grid y is 65536, which is 1 to 65535"),
            ({"grid": (1, 1, 65536)}, INVALID, "grid z is 65536, which is 1 to 65535"),
            ({"grid": (0, 1, 1)}, INVALID, "grid x is 0, which is 1 to 2147483647"),
            ({"threads": 1056}, INVALID, "a block of 1056 threads, which are 1 to 1024"),
            ({"registers": 168, "threads": 512}, TOO_MANY_REGISTERS, "512 threads of 168 registers, which leave room for 384"),
            ({"shared": 48 * KIB + 1}, INVALID, "49153 bytes of shared memory where 49152 were allowed before"),
            ({"shared": 228 * KIB, "allowed": 64 * KIB}, INVALID, "233472 bytes of shared memory, at most 232448"),
            ({"allowed": 228 * KIB}, INVALID, "233472 bytes of shared memory allowed, at most 232448"),
            ({"cluster": (3, 1, 1)}, BAD_CLUSTER, "clusters of 3 x 1 x 1 in a grid of 4 x 2 x 1, at most 8 blocks"),
            ({"grid": (16, 1, 1), "cluster": (16, 1, 1)}, BAD_CLUSTER, "at most 8 blocks"),
        ],
    )
    def test_each_limit(self, driver: Driver, wrong: dict[str, Any], code: int, said: str) -> None:
        found, why = driver.launch(**wrong)
        assert found == code
        assert said in why

    def test_limits_are_the_architectures(self, driver: Driver) -> None:
        driver.library.stub_device(80, 163 * KIB, 164 * KIB)
        assert driver.launch(shared=163 * KIB, allowed=163 * KIB)[0] == 0
        assert "at most 166912" in driver.launch(shared=163 * KIB + 1, allowed=163 * KIB)[1]
        assert driver.launch(cluster=(2, 1, 1))[0] == UNSUPPORTED

    def test_a_kernel_that_was_not_compiled(self, driver: Driver) -> None:
        with pytest.raises(LookupError, match="no function other"):
            driver.function("other")


class TestOnlyLaunches:
    def test_products_take_every_dtype_and_leave_their_outputs(self) -> None:
        left, right, out = torch.ones(3, 4, dtype=torch.bfloat16), torch.ones(4, 5, dtype=torch.bfloat16), torch.zeros(3, 5)
        with OnlyLaunches():
            assert torch.mm(left, right).dtype == torch.bfloat16
            made = torch.mm(left, right, out_dtype=torch.float32)
            torch.mm(left, right, out_dtype=torch.float32, out=out)
            torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
        assert (made.shape, made.dtype) == ((3, 5), torch.float32)
        assert not out.any()

    def test_large_tensors_are_not_touched_and_small_ones_are(self) -> None:
        large, small = torch.zeros(2**22 + 1), torch.zeros(4)
        with OnlyLaunches():
            large.add_(1)
            small.add_(1)
            part = large[1:3].add_(2)
            made = large.to(torch.float16)
            stacked = torch.stack([small, small])
        assert not large[3:].any()
        assert small.eq(1).all()
        assert part.eq(2).all(), "a view of a few elements"
        assert (made.shape, made.dtype) == (large.shape, torch.float16)
        assert stacked.eq(1).all()


class TestWatch:
    def watch(self, launches: list[StubLaunch], maps: list[StubTensorMap]) -> Watch:
        watch = object.__new__(Watch)
        watch.architecture, watch.started, watch.report = "sm_90", [], Report()
        watch.stub = mock.Mock(taken=lambda: (launches, maps))
        return watch

    def test_counts_by_kernel(self) -> None:
        watch = self.watch(
            [StubLaunch(b"sums_kernel", (4, 7, 1), 256, 100), StubLaunch(b"gradient_kernel", (9, 2, 1), 256, 50)],
            [StubTensorMap(launches=1), StubTensorMap(launches=1)],
        )
        watch.run("setting", lambda: watch.started.extend(("sums", "gradient")))
        report = watch.taken()
        assert report.faults == []
        sums, gradient = report.kernels["sums"], report.kernels["gradient"]
        assert (sums.launches, sums.tensor_maps, sums.grid, sums.shared) == (1, 0, (4, 7, 1), 100)
        assert (gradient.launches, gradient.tensor_maps, gradient.grid) == (1, 2, (9, 2, 1))
        assert watch.report.problems == 0, "taken once"

    def test_a_fault_names_kernel_and_setting(self) -> None:
        watch = self.watch([], [])

        def refused() -> None:
            watch.started.append("sums")
            try:
                raise ValueError("box[1]\nis 512")
            except ValueError as error:
                raise RuntimeError("at 3:4") from error

        watch.run("vocab, bf16, jsd, wide", refused)
        assert watch.report.faults == ["sm_90, sums, vocab, bf16, jsd, wide: ValueError: box[1] is 512"]

    def test_a_launch_that_never_arrives(self) -> None:
        watch = self.watch([], [])
        watch.run("plain", lambda: watch.started.append("sums"))
        assert watch.report.faults == ["sm_90, sums, plain: of 1 launches 0 reached the driver"]

    @pytest.mark.parametrize(("compilations", "faults"), [(2, 0), (3, 1)])
    def test_a_kernel_that_is_compiled_at_each_token_count(self, compilations: int, faults: int) -> None:
        watch = self.watch([], [])
        watch.report.kernels["sums"].keys = {"of another setting"}
        keys = {str(at) for at in range(compilations)}
        with mock.patch.object(launch, "jit_functions", return_value={"sums": mock.Mock()}) as functions:
            watch.run_anew("run", lambda: watch.report.kernels["sums"].keys.update(keys))
        assert functions.return_value["sums"].device_caches.clear.called
        assert len(watch.report.faults) == faults
        assert all(fault.startswith("sm_90, sums, run: compiled 3 times over steps of (300, ") for fault in watch.report.faults)
        assert len(watch.report.kernels["sums"].keys) == compilations + 1


def test_jobs_take_every_divergence_dtype_and_strategy() -> None:
    divergences = ("forward_kl", "jsd", "total_variation")
    found = launch.jobs("sm_90", "full", divergences, tuple(launch.DTYPES), launch.STRATEGIES)
    # logits of 16 bits in one dtype, and on one architecture
    assert len({(job.variant, job.dtype, job.divergence) for job in found if job.part == "checks"}) == (2 * 3 + 1) * 3
    for part in ("real sizes", "training run"):
        assert {(job.variant, job.divergence) for job in found if job.part == part} == {
            (strategy, divergence) for strategy in launch.STRATEGIES for divergence in launch.QUICK_DIVERGENCES
        }
    others = launch.jobs("sm_100", "quick", divergences, tuple(launch.DTYPES), launch.STRATEGIES)
    assert {job.variant for job in others} == {"tokens", "vocab"}


class TestCommand:
    def test_the_interpreter_would_launch_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert launch.main([]) == 2
        assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err

    def ran(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment, check=False)

    def test_one_setting(self) -> None:
        ran = self.ran(
            *("-m", "benchmarks.launch", "--only", "sm_90", "--dtype", "bf16", "--strategy", "vocab", "--divergence", "forward_kl"),
            *("--setting", "wide"),
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert "1 problems launched, 0 faults" in ran.stdout
        kernels = {line.split()[1]: line.split()[2:5] for line in ran.stdout.splitlines()[1:5]}
        # the loss with gradients, and losses of tokens without; two models' hidden states and heads
        assert kernels == {
            "row_loss": ["0", "0", "0"],
            "statistics": ["2", "1", "8"],
            "sums": ["0", "0", "0"],
            "gradient": ["1", "1", "4"],
        }

    def test_an_unknown_setting(self) -> None:
        ran = self.ran(*("-m", "benchmarks.launch", "--only", "sm_90", "--dtype", "fp16", "--strategy", "tokens", "--setting", "x"))
        assert ran.returncode == 2
        assert "--setting is 'x', which none of these has" in ran.stderr

    def test_what_the_table_of_blocks_must_not_ask_for_is_named(self) -> None:
        """Twenty stages of 24 KiB."""
        ran = self.ran("-c", BROKEN)
        assert ran.returncode == 0, ran.stderr
        assert "sm_90, statistics, vocab, bf16, forward_kl, wide: OutOfResources: out of resource: shared memory" in ran.stdout
        assert "Hardware limit: 232448" in ran.stdout


BROKEN = """
from dataclasses import replace
from benchmarks import launch
from kdkernels.backends.triton.blocks import TABLE
launch._prepare("sm_90")
entry = TABLE["sm_90", 2]
TABLE["sm_90", 2] = replace(entry, statistics=replace(entry.statistics, num_stages=20))
print(*launch._done(launch.Job("checks", "vocab", "bf16", "forward_kl", "full", "wide")).faults)
"""
