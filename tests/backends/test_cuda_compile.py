"""Kernels in CUDA C++: what NVRTC makes of a source, the cache of that on disk, and the calls of the driver, without a GPU."""

from __future__ import annotations

import ctypes
import os
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from kdkernels.backends.cuda import compile
from kdkernels.backends.cuda.compile import CompileError, DriverError, Kernel, cubin
from tests.support import stub
from tests.support.stub import needs_nvrtc

ROOT = Path(__file__).parents[2]
KIB = 1024
SOURCE = 'extern "C" __global__ void __cluster_dims__(2, 1, 1) k(float* x, float by) { x[threadIdx.x] *= by; }'
OPTIONS = ("--std=c++17",)
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "deep" / "cache"
    monkeypatch.setenv("KDKERNELS_CACHE", str(folder))
    return folder


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


@needs_nvrtc
class TestCompiler:
    @pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
    def test_machine_code_of_each_architecture(self, architecture: str) -> None:
        made = cubin(SOURCE, OPTIONS, architecture)
        assert made.startswith(b"\x7fELF")
        assert b".text.k\0" in made

    def test_an_error_has_the_compilers_words_and_is_not_kept(self, cache: Path) -> None:
        for _ in range(2):
            with pytest.raises(CompileError, match=r'kdkernels.cu\(1\): error: identifier "wrong" is undefined'):
                cubin('extern "C" __global__ void k() { wrong(); }', OPTIONS, "sm_90")
        assert not cache.exists()

    def test_an_option_or_an_architecture_that_it_does_not_know(self) -> None:
        with pytest.raises(CompileError, match="--nope"):
            cubin(SOURCE, ("--nope",), "sm_90")
        with pytest.raises(CompileError, match="gpu-architecture"):
            cubin(SOURCE, OPTIONS, "sm_1")

    def test_the_log_of_the_assembler(self) -> None:
        _, log = compile.compiled(SOURCE, (*OPTIONS, "--ptxas-options=-v"), "sm_90")
        assert "0 bytes spill stores" in log
        assert "registers" in log


@needs_nvrtc
class TestCache:
    def test_a_source_is_compiled_once(self, cache: Path) -> None:
        made = cubin(SOURCE, OPTIONS, "sm_90")
        with mock.patch.object(compile, "compiled", side_effect=AssertionError):
            assert cubin(SOURCE, OPTIONS, "sm_90") == made
        (entry,) = entries(cache)
        assert entry.suffix == ".cubin"

    def test_whatever_the_code_depends_on_has_an_entry_of_its_own(self, cache: Path) -> None:
        wanted = [(SOURCE, OPTIONS, "sm_90"), (SOURCE + " ", OPTIONS, "sm_90"), (SOURCE, (), "sm_90"), (SOURCE, OPTIONS, "sm_100")]
        for one in wanted:
            cubin(*one)
        assert len(entries(cache)) == len(wanted)
        with mock.patch.object(compile, "nvrtc_version", return_value="99.0"):
            cubin(*wanted[0])
        assert len(entries(cache)) == len(wanted) + 1

    @pytest.mark.parametrize("damage", ["cut", "empty", "changed", "other"])
    def test_a_damaged_entry_is_made_anew(self, cache: Path, damage: str) -> None:
        made = cubin(SOURCE, OPTIONS, "sm_90")
        (entry,) = entries(cache)
        whole = entry.read_bytes()
        entry.write_bytes({"cut": whole[:-1], "empty": b"", "changed": whole[:-1] + b"?", "other": made}[damage])
        assert cubin(SOURCE, OPTIONS, "sm_90") == made
        assert entry.read_bytes() == whole

    def test_an_entry_that_cannot_be_read_is_only_missed(self, cache: Path) -> None:
        made = cubin(SOURCE, OPTIONS, "sm_90")
        (entry,) = entries(cache)
        entry.unlink()
        entry.mkdir()  # the super-user may read and replace any file
        assert cubin(SOURCE, OPTIONS, "sm_90") == made
        assert entries(cache) == [entry], "nothing is left of the try"

    def test_a_folder_that_cannot_be_written_is_only_missed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").touch()
        read_only = tmp_path / "read only"
        read_only.mkdir()
        read_only.chmod(stat.S_IRUSR | stat.S_IXUSR)
        for folder in (tmp_path / "file", tmp_path / "file" / "below", read_only / "below", Path("/proc/kdkernels")):
            monkeypatch.setenv("KDKERNELS_CACHE", str(folder))
            assert cubin(SOURCE, OPTIONS, "sm_90").startswith(b"\x7fELF")

    def test_a_full_disk_leaves_nothing(self, cache: Path) -> None:
        with mock.patch.object(compile.os, "replace", side_effect=OSError(28, "No space left on device")):
            assert cubin(SOURCE, OPTIONS, "sm_90").startswith(b"\x7fELF")
        assert entries(cache) == []

    def test_many_at_once(self, cache: Path) -> None:
        """Threads of one process, and another process: each has the whole code, and one entry is left."""
        script = "import sys; from kdkernels.backends.cuda.compile import cubin; cubin(sys.argv[1], (sys.argv[2],), 'sm_90')"
        other = subprocess.Popen([sys.executable, "-c", script, SOURCE, *OPTIONS], cwd=ROOT)
        with ThreadPoolExecutor(4) as pool:
            made = set(pool.map(lambda _: cubin(SOURCE, OPTIONS, "sm_90"), range(16)))
        assert other.wait() == 0
        assert len(made) == 1
        (entry,) = entries(cache)
        assert entry.read_bytes().endswith(made.pop())


class TestCacheFolder:
    @pytest.mark.parametrize(
        ("environment", "folder"),
        [
            ({"KDKERNELS_CACHE": "/one", "XDG_CACHE_HOME": "/two", "HOME": "/three"}, "/one"),
            ({"XDG_CACHE_HOME": "/two", "HOME": "/three"}, "/two/kdkernels"),
            ({"KDKERNELS_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/three"}, "/three/.cache/kdkernels"),
            ({"XDG_CACHE_HOME": "relative", "HOME": "/three"}, "/three/.cache/kdkernels"),
        ],
    )
    def test_where_it_is(self, environment: dict[str, str], folder: str) -> None:
        with mock.patch.dict(os.environ, environment, clear=True):
            assert compile._cached("name") == Path(folder, "name")

    @needs_nvrtc
    def test_a_user_without_a_home(self) -> None:
        with mock.patch.dict(os.environ, clear=True), mock.patch.object(Path, "home", side_effect=RuntimeError):
            assert cubin(SOURCE, OPTIONS, "sm_90").startswith(b"\x7fELF")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """The stub driver, on a thread that has no context yet."""
    return stub.in_place(monkeypatch)


def launched(library: ctypes.CDLL) -> list[tuple[Any, ...]]:
    return [(one.kernel, list(one.grid), one.threads, one.shared) for one in stub.seen(library, "stub_launches")]


ARGUMENTS = (ctypes.c_void_p(1 << 20), ctypes.c_float(0.5))


@needs_nvrtc
class TestDriver:
    def kernel(self, shared: int = 0, cluster: int = 2) -> Kernel:
        return Kernel(cubin(SOURCE, OPTIONS, "sm_90"), "k", shared, cluster)

    def test_a_launch_arrives(self, driver: ctypes.CDLL) -> None:
        self.kernel(200 * KIB).launch(132, 256, 200 * KIB, 0, ARGUMENTS)
        assert launched(driver) == [(b"k", [132, 1, 1], 256, 200 * KIB)]

    def test_arguments_arrive_by_their_addresses(self, driver: ctypes.CDLL) -> None:
        kernel, seen = self.kernel(), []

        def call(_: Any, *arguments: Any) -> int:
            addresses = arguments[-2]
            seen.extend((ctypes.c_void_p.from_address(addresses[0]).value, ctypes.c_float.from_address(addresses[1]).value))
            seen.append(arguments[-3].value)  # the stream
            return 0

        watched = mock.Mock(cuCtxGetCurrent=driver.cuCtxGetCurrent, cuLaunchKernel=call)
        with mock.patch.object(compile, "_driver", return_value=watched):
            kernel.launch(1, 32, 0, 77, ARGUMENTS)
        assert seen == [1 << 20, 0.5, 77]

    def test_every_refusal_has_the_drivers_name_for_it(self, driver: ctypes.CDLL) -> None:
        image = cubin(SOURCE, OPTIONS, "sm_90")
        with pytest.raises(DriverError, match=r"cuModuleLoadData: CUDA_ERROR_INVALID_IMAGE: .*not an ELF file"):
            Kernel(b"PTX", "k", 0, 1)
        with pytest.raises(DriverError, match=r"cuModuleGetFunction: CUDA_ERROR_NOT_FOUND: .*no function other"):
            Kernel(image, "other", 0, 1)
        with pytest.raises(DriverError, match=r"cuFuncSetAttribute: CUDA_ERROR_INVALID_VALUE: 233472 bytes"):
            self.kernel(228 * KIB)
        with pytest.raises(DriverError, match=r"cuLaunchKernel: CUDA_ERROR_INVALID_VALUE: grid x is 0"):
            self.kernel().launch(0, 256, 0, 0, ARGUMENTS)
        with pytest.raises(DriverError, match=r"cuLaunchKernel: CUDA_ERROR_INVALID_VALUE: .*bytes of shared memory"):
            self.kernel(64 * KIB).launch(2, 256, 65 * KIB, 0, ARGUMENTS)
        assert launched(driver) == []

    def test_clusters_that_fit(self, driver: ctypes.CDLL) -> None:
        assert self.kernel(cluster=2).clusters(2, 256, 0) == 66
        assert self.kernel(cluster=16).clusters(16, 256, 0) == 8

    @pytest.mark.parametrize(("cluster", "allowed"), [(8, False), (16, True)])
    def test_large_clusters_are_allowed_where_there_are_any(self, driver: ctypes.CDLL, cluster: int, allowed: bool) -> None:
        with mock.patch.object(compile, "_checked", side_effect=compile._checked) as checked:
            self.kernel(cluster=cluster)
        attributes = [call.args[2] for call in checked.call_args_list if call.args[0] == "cuFuncSetAttribute"]
        assert (compile.LARGE_CLUSTERS in attributes) == allowed

    def test_a_thread_without_a_context_takes_pytorchs(self, driver: ctypes.CDLL) -> None:
        kernel = self.kernel()
        failed: list[Exception] = []

        def run() -> None:
            context = ctypes.c_void_p()
            driver.cuCtxGetCurrent(ctypes.byref(context))
            assert not context
            try:
                kernel.launch(2, 32, 0, 0, ARGUMENTS)
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert failed == []
        assert len(launched(driver)) == 1


class TestMissing:
    @pytest.fixture(autouse=True)
    def built_with_cuda(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """A PyTorch with everything; each test takes something away."""
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(compile, "_driver", lambda: None)
        monkeypatch.setattr(compile, "_nvrtc_architectures", lambda: (90, 100))
        monkeypatch.setattr(compile, "_nvrtc", lambda: None)
        monkeypatch.setattr(compile, "nvrtc_version", lambda: "12.8")
        cached = (compile._missing_libraries, compile._missing_capability)
        for one in cached:
            one.cache_clear()
        yield
        for one in cached:
            one.cache_clear()

    def test_nothing(self) -> None:
        assert compile.missing(CUDA) == ""

    def test_another_device(self) -> None:
        assert "cpu" in compile.missing(torch.device("cpu"))

    def test_builds_of_pytorch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "cuda", None)
        assert "without CUDA" in compile.missing(CUDA)
        monkeypatch.setattr(torch.version, "hip", "6.4")
        compile._missing_libraries.cache_clear()
        assert "ROCm" in compile.missing(CUDA)

    @pytest.mark.parametrize("part", ["_driver", "_nvrtc"])
    def test_libraries(self, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
        monkeypatch.setattr(compile, part, mock.Mock(side_effect=OSError("no such library")))
        assert compile.missing(CUDA) == "no such library"

    @pytest.mark.parametrize(
        ("capability", "said"),
        [
            ((8, 0), "compute capability 8.0; clusters came with 9.0"),
            ((10, 0), ""),
            ((10, 3), "NVRTC 12.8 does not compile for sm_103"),
        ],
    )
    def test_capabilities(self, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], said: str) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert compile.missing(CUDA) == said

    def test_the_question_does_not_initialise_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", mock.Mock(side_effect=AssertionError))
        assert compile.missing(CUDA) == ""


def test_an_import_of_the_package_loads_nothing_of_it() -> None:
    script = """
import sys, kdkernels
assert not any(name.startswith("kdkernels.backends.cuda") for name in sys.modules)
from kdkernels.backends.cuda import compile
loaded = open("/proc/self/maps").read()
assert "nvrtc" not in loaded
assert "libcuda.so" not in loaded
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_an_nvrtc_that_is_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    compile._nvrtc.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "99.1")
    with pytest.raises(OSError, match=r"no NVRTC \(libnvrtc.so.99\), which comes with the wheel nvidia-cuda-nvrtc"):
        compile._nvrtc()
