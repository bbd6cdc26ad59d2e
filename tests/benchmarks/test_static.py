"""The compile-only report: it compiles every kernel that the launchers start, and what a GPU would suffer from is a fault."""

from __future__ import annotations

import inspect
import itertools
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

import kdkernels as kd
from kdkernels.divergences import resolve

pytest.importorskip("triton")

from benchmarks import static, static_cluster, static_launches, static_product
from benchmarks.compiled import CLUSTER, PRODUCT, TARGETS, WITHOUT_PRODUCTS, Compiled, per_logit
from benchmarks.machine_code import Sweep, stores_of, sweeps_of
from benchmarks.static_launches import BARE, KERNELS, ODD, PLAIN, VALUE, Launch, launches
from kdkernels.backends.cuda import compile, product, rows
from kdkernels.backends.triton.blocks import LEAN, TABLE
from kdkernels.planning.roofline import OFFSETS_INSTRUCTIONS, ROW_INSTRUCTIONS
from tests.support import ROOT

GOOD = Compiled("sm_90", "bf16", "sums", "jsd", "64x64x64", registers=128, spilled=0, shared=64 * 1024, tensor_cores=8, warps=8)
SWEEP = Sweep(instructions=200, exchanges=0, widths=(128,))
ROW = replace(GOOD, kernel="row_loss", tensor_cores=0, sweeps=(SWEEP,) * 6)


@pytest.fixture(scope="module")
def found() -> list[Launch]:
    return launches("sm_90", torch.bfloat16)


class TestClusterKernel:
    def test_every_divergence_with_nothing_and_with_everything_in_both_cuts(self) -> None:
        limits = TARGETS["sm_90"]
        found = static_cluster.launches(torch.bfloat16, limits.shared, limits.shared_all)
        switches = [
            name for name, _ in found[0][1] if name not in ("KD_PAIR", "KD_WEIGH", "KD_METRICS", "KD_FLAT", "KD_GRAD", "KD_OUT")
        ]
        settings = {
            (name, dict(macros)["KD_METRICS"], *(dict(macros)[one] for one in switches), shape.blocks)
            for name, macros, shape in found
        }
        assert settings == {
            (name, metrics, *[dressed] * len(switches), blocks)
            for name, metrics, dressed, blocks in itertools.product(kd.divergences(), (0, 1), (0, 1), (1, 3))
        }
        assert len(found) == len(settings)

    @pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
    def test_what_the_assembler_says_of_it(self, architecture: str) -> None:
        limits = TARGETS[architecture]
        found = static_cluster.launches(torch.bfloat16, limits.shared, limits.shared_all)
        for metrics in (0, 1):
            launch = next(one for one in found if dict(one[1])["KD_METRICS"] == metrics)
            made = static_cluster.compiled(*launch, architecture, "bf16")
            assert 32 <= made.registers <= 72, "of three blocks of 9 warps"
            assert made.spilled == 0
            assert launch[2].shared < made.shared <= launch[2].shared + rows.REST - 1024 <= limits.shared_all // 3 - 1024
            assert made.warps == 9

    @pytest.mark.parametrize(("name", "most"), [("forward_kl", (24, 18)), ("jsd", (18, 48, 10))])
    def test_instructions_of_a_plain_logit_at_t_1(self, name: str, most: tuple[int, ...]) -> None:
        """What bounds the kernel where memory is fast: a change that adds some should know."""
        limits = TARGETS["sm_90"]
        launches = static_cluster.launches(torch.bfloat16, limits.shared, limits.shared_all)
        launch = next(one for one in launches if one[0] == name and not (dict(one[1])["KD_METRICS"] or dict(one[1])["KD_SCALED"]))
        counts, mixed = per_logit(static_cluster.compiled(*launch, "sm_90", "bf16"))
        assert len(counts) == len(mixed) == len(most)
        assert all(found <= allowed for found, allowed in zip(counts, most, strict=True)), counts

    def test_a_spill_is_a_fault_and_nothing_about_matrix_units_is(self) -> None:
        good = replace(GOOD, kernel=CLUSTER, tensor_cores=0)
        assert good.faults() == []
        assert replace(good, spilled=8).faults() == ["sm_90 bf16 cluster_row jsd: spills 8 bytes"]

    def test_architectures_without_clusters_have_none(self) -> None:
        assert static_cluster.kernels("sm_80", "bf16") == static_cluster.kernels("gfx942", "bf16") == []


class TestProduct:
    @pytest.mark.parametrize("dtype", ["bf16", "fp16"])
    def test_what_the_assembler_says_of_it(self, dtype: str) -> None:
        (made,) = static_product.kernels("sm_90", dtype)
        assert made.kernel == PRODUCT
        assert made.registers == 168, "of 384 threads, before they share them out anew"
        assert made.tensor_cores >= 4
        assert made.shared == 224 * 1024 + 64
        assert made.faults() == []
        assert made.occupancy == 12 / 64

    def test_products_follow_one_another(self) -> None:
        """The assembler says where it makes each wait for the one before."""
        _, log = compile.compiled(product.source(torch.bfloat16), (*product.OPTIONS, "--ptxas-options=-v"), product.ARCHITECTURE)
        assert "registers" in log
        assert "gmma" not in log.lower()

    def test_a_spill_or_none_on_matrix_units_is_a_fault(self) -> None:
        good = replace(GOOD, kernel=PRODUCT)
        assert good.faults() == []
        assert replace(good, spilled=8).faults() == ["sm_90 bf16 cuda_product jsd: spills 8 bytes"]
        assert replace(good, tensor_cores=0).faults() == ["sm_90 bf16 cuda_product jsd: has no tensor-core instruction"]

    def test_other_architectures_and_float32_have_none(self) -> None:
        others = [("sm_80", "bf16"), ("sm_100", "bf16"), ("gfx942", "bf16"), ("sm_90", "fp32")]
        assert not [made for one in others for made in static_product.kernels(*one)]


class TestLaunches:
    def test_every_kernel_is_there(self, found: list[Launch]) -> None:
        assert {launch.name for launch in found} == set(KERNELS)

    def test_every_divergence_is_there_with_and_without_metrics(self, found: list[Launch]) -> None:
        labels = {kernel: [launch.label for launch in found if launch.name == kernel] for kernel in KERNELS}
        names, measured = set(kd.divergences()), {f"{name}, metrics" for name in kd.divergences()}
        swept_twice = {name for name in names if not resolve(name).one_sweep}
        assert set(labels["row_loss"]) == names | measured | {name + kind for name in names for kind in (PLAIN, VALUE, ODD)}
        assert set(labels["gradient"]) == {name + dress for name in names for dress in ("", BARE, PLAIN)}
        assert set(labels["sums"]) == {name + dress for name in measured | swept_twice for dress in ("", BARE, PLAIN)}
        assert set(labels["offsets_row"]) == measured | {name + dress for name in names for dress in ("", BARE, PLAIN, VALUE)}
        multiplied = ("the student", "the teacher", "the teacher, metrics", "both", "a teacher that learns")
        assert set(labels["offsets_product"]) == {f"of {side}{dress}" for side in multiplied for dress in ("", BARE, PLAIN)}
        # no moments, weighed by either side, and with metrics
        constants = {(launch.keywords["WEIGH"], launch.keywords["METRICS"]) for launch in found if launch.name == "statistics"}
        assert constants == {(0, False), (1, False), (2, False), (0, True)}
        assert all(len(set(each)) == len(each) for each in labels.values()), "each once"

    def test_everything_a_loss_can_have_is_switched_on(self, found: list[Launch]) -> None:
        for launch in found:
            if launch.label.endswith((BARE, PLAIN, VALUE, ODD)):
                continue
            arguments = dict(zip(inspect.signature(launch.kernel.fn).parameters, launch.arguments, strict=False))
            heads = [arguments[name] for name in ("x_head", "z_head") if name in arguments]
            heads = heads or [head for _, head in arguments.get("models", (arguments.get("model", (None, ())),))]
            assert all(None not in head for head in heads), "bias, scale, softcap"
            for group in ("terms", "target", "of_rows"):
                assert None not in arguments.get(group, ())
            assert arguments.get("labels_ptr", 0) is not None

    def test_blocks_are_those_of_the_architecture(self) -> None:
        for architecture in TARGETS:
            for dtype in (torch.float32, torch.bfloat16):
                entry = TABLE[architecture, dtype.itemsize]
                for launch in launches(architecture, dtype):
                    if launch.name not in WITHOUT_PRODUCTS:
                        own = "offsets" if launch.name == "offsets_product" else launch.name
                        matrices = {getattr(entry, own), entry.roomy, entry.measured, entry.dressed_offsets} - {None}
                        assert any(
                            launch.keywords.items() >= {**matrix.blocks(), **matrix.options()}.items() for matrix in matrices
                        )

    def test_heads_with_bias_or_softcap_metrics_and_long_formulas_take_the_roomy_blocks(self, found: list[Launch]) -> None:
        entry = TABLE["sm_90", 2]
        for launch in found:
            if launch.name == "offsets_product":
                matrix = entry.offsets if launch.label.endswith((BARE, PLAIN)) else entry.dressed_offsets
                assert launch.keywords.items() >= {**matrix.blocks(), **matrix.options()}.items(), launch.label
            elif launch.name not in WITHOUT_PRODUCTS:
                dressed = not launch.label.endswith((BARE, PLAIN))
                lean = launch.name == "statistics" or launch.label.startswith(LEAN)
                crowded = dressed or launch.keywords.get("METRICS", False) or not lean
                matrix = entry.roomy if crowded else getattr(entry, launch.name)
                if launch.name == "sums" and launch.keywords["METRICS"]:
                    matrix = entry.measured
                assert launch.keywords.items() >= {**matrix.blocks(), **matrix.options()}.items(), launch.label

    def test_nothing_is_run_and_the_launchers_are_put_back(self, found: list[Launch]) -> None:
        from kdkernels.backends.triton import rows

        assert not isinstance(rows.row_loss_kernel, static_launches.Recorder)
        assert all(launch.kernel is not None for launch in found)


class TestFaults:
    def test_none(self) -> None:
        assert GOOD.faults() == ROW.faults() == []

    @pytest.mark.parametrize(
        ("bad", "said"),
        [
            (replace(GOOD, spilled=8), "spills 8 bytes"),
            (replace(ROW, spilled=4), "spills 4 bytes"),
            (replace(GOOD, tensor_cores=0), "has no tensor-core instruction"),
            (replace(GOOD, shared=227 * 1024 + 1), "takes 232449 bytes of shared memory of 232448"),
            (
                replace(ROW, label="jsd" + ODD, sweeps=(SWEEP, SWEEP, SWEEP, replace(SWEEP, exchanges=1, widths=(32,)))),
                "has 1 barriers, shuffles and accesses to shared memory inside its sweeps",
            ),
            (replace(GOOD, stores=(16, 128)), "stores the gradient by 16 bits"),
            (replace(ROW, sweeps=()), "has 0 loops, fewer than it has sweeps"),
            (
                replace(ROW, sweeps=(SWEEP, SWEEP, SWEEP, replace(SWEEP, exchanges=2))),
                "has 2 barriers, shuffles and accesses to shared memory inside its sweeps",
            ),
            (
                replace(ROW, sweeps=(SWEEP, SWEEP, SWEEP, replace(SWEEP, widths=(32, 128)))),
                "accesses memory by 32 bits inside its sweeps",
            ),
            (replace(GOOD, architecture="sm_80", shared=163 * 1024 + 1), "takes 166913 bytes of shared memory of 166912"),
            (replace(GOOD, architecture="gfx942", shared=64 * 1024 + 1), "takes 65537 bytes of shared memory of 65536"),
        ],
    )
    def test_each_says_what_and_where(self, bad: Compiled, said: str) -> None:
        assert bad.faults() == [f"{bad.architecture} bf16 {bad.kernel} {bad.label}: {said}"]

    def test_float32_products_need_no_tensor_cores_on_nvidia(self) -> None:
        single = replace(GOOD, dtype="fp32", tensor_cores=0)
        assert single.faults() == []
        assert replace(single, tensor_cores=8).faults() == [
            "sm_90 fp32 sums jsd: multiplies float32 by matrix units, which cut it to TF32"
        ]
        assert replace(single, architecture="gfx942").faults() != []

    def test_the_plan_states_the_row_kernels_instructions(self) -> None:
        """At t < 1, the larger half of the loops: eight logits to a thread and turn."""
        counts = ROW_INSTRUCTIONS["jsd"]
        right = tuple(replace(SWEEP, instructions=8 * count) for count in (20, 50, 50, *counts))
        one = replace(ROW, label="jsd" + PLAIN, sweeps=right)
        assert one.faults() == []
        more = replace(one, sweeps=(*right[:5], replace(SWEEP, instructions=8 * (counts[2] + 4))))
        found = [*counts[:2], counts[2] + 4]
        assert more.faults() == [
            f"sm_90 bf16 row_loss jsd{PLAIN}: takes {found} instructions per logit in its sweeps; the roofline states {[*counts]}"
        ]
        for elsewhere in (replace(more, dtype="fp32"), replace(more, architecture="sm_80"), replace(more, label="jsd")):
            assert elsewhere.faults() == []
        assert set(ROW_INSTRUCTIONS) | set(OFFSETS_INSTRUCTIONS) <= set(kd.divergences())

    def test_of_offsets_the_last_loops_are_the_sweeps_over_logits(self) -> None:
        counts = OFFSETS_INSTRUCTIONS["jsd"]
        of_tiles = replace(SWEEP, widths=(32,))
        of_codes = [replace(SWEEP, instructions=8 * count, widths=(32, 128)) for count in counts]
        one = replace(ROW, kernel="offsets_row", label="jsd" + PLAIN, sweeps=(of_tiles, of_tiles, *of_codes))
        assert one.faults() == []
        narrow = replace(one, sweeps=(*one.sweeps[:3], replace(of_codes[1], widths=(16, 32))))
        assert narrow.faults() == [f"sm_90 bf16 offsets_row jsd{PLAIN}: accesses memory by 16 bits inside its sweeps"]
        more = replace(one, sweeps=(*one.sweeps[:3], replace(of_codes[1], instructions=8 * (counts[1] + 4), widths=(32, 128))))
        assert more.faults() == [
            f"sm_90 bf16 offsets_row jsd{PLAIN}: takes {[counts[0], counts[1] + 4]} instructions per logit in its sweeps; "
            f"the roofline states {[*counts]}"
        ]
        _, both = OFFSETS_INSTRUCTIONS["forward_kl"]  # in one sweep, after one over rows with banned logits
        beside = replace(of_codes[0], instructions=8 * both)
        one = replace(one, label="forward_kl" + PLAIN, sweeps=(of_tiles, of_tiles, of_codes[0], beside))
        assert one.faults() == []
        assert per_logit(one) == ([both], [both])

    def test_all_are_reported(self) -> None:
        assert len(replace(GOOD, spilled=8, tensor_cores=0, shared=10**6).faults()) == 3

    @pytest.mark.parametrize(
        ("one", "share"),
        [
            (replace(ROW, shared=0, registers=32), 1.0),
            (replace(ROW, shared=0, registers=128), 0.25),  # 65536 / (128 * 256) = 2 programs of 8 warps of 64
            (replace(ROW, shared=0, registers=121), 0.25),  # given out by 8
            (replace(ROW, shared=100 * 1024, registers=32), 0.25),  # two fit 228 KiB
            (replace(ROW, architecture="gfx942", shared=0, registers=64, warps=4), 1.0),
        ],
    )
    def test_occupancy(self, one: Compiled, share: float) -> None:
        assert one.occupancy == share


# As nvdisasm prints it, cut down: a loop of two instructions within one of more, and a label that is only jumped to forward.
MACHINE_CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_2:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_1:
        /*0020*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0030*/              @!P0 BRA `(.L_x_1) ;
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0050*/               @P1 BRA `(.L_x_2) ;
        /*0060*/              @!P2 BRA `(.L_x_3) ;
.L_x_4:
        /*0070*/                   SHFL.BFLY PT, R3, R2, 0x10, 0x1f ;
        /*0080*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0090*/                   STG.E.U16 desc[UR4][R2.64], R4 ;
        /*00a0*/                   LDG.E.U16.CONSTANT R4, desc[UR4][R2.64] ;
        /*00b0*/               @P1 BRA `(.L_x_4) ;
.L_x_3:
        /*00c0*/                   EXIT ;
"""


def test_sweeps_are_read_off_machine_code() -> None:
    assert sweeps_of(MACHINE_CODE) == (Sweep(2, 0, (128,)), Sweep(5, 1, (16, 32)))
    assert stores_of(MACHINE_CODE) == (16,)


class Pool:
    """Stands for the processes: gives what it is told to."""

    def __init__(self, found: list[Compiled]) -> None:
        self.found = found

    def __call__(self, *_: Any) -> Pool:
        return self

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def imap(self, *_: Any, **__: Any) -> list[list[Compiled]]:
        return [self.found]


class TestCommand:
    def run(self, found: list[Compiled], *arguments: str, traffic: int = 0) -> int:
        context = mock.Mock(Pool=Pool(found))
        with (
            mock.patch.dict(os.environ),
            mock.patch.object(static.multiprocessing, "get_context", return_value=context),
            mock.patch.object(static, "count_traffic", return_value=traffic) as self.counted,
        ):
            os.environ.pop("TRITON_INTERPRET", None)
            return static.main(arguments)

    def test_without_faults_it_succeeds(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run([GOOD, ROW]) == 0
        assert "2 kernels compiled, 0 faults" in capsys.readouterr().out
        assert self.counted.called

    def test_a_fault_fails(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run([GOOD, replace(GOOD, label="forward_kl", spilled=12)]) == 1
        assert "1 faults\n  sm_90 bf16 sums forward_kl: spills 12 bytes" in capsys.readouterr().out

    def test_bytes_that_could_not_be_counted_fail(self) -> None:
        assert self.run([GOOD], traffic=1) == 1

    def test_a_part_of_the_report_counts_no_bytes(self) -> None:
        for part in (("--only", "sm_90"), ("--compile-only",)):
            assert self.run([GOOD], *part) == 0
            assert not self.counted.called

    def test_the_worst_of_a_kernel_is_shown_or_all(self, capsys: pytest.CaptureFixture[str]) -> None:
        both = [replace(GOOD, registers=255), replace(GOOD, label="forward_kl", spilled=12)]
        self.run(both)
        lines = capsys.readouterr().out.splitlines()
        assert lines[2].split()[:7] == ["sm_90", "bf16", "sums", "64x64x64", "2,", "worst:", "forward_kl"]
        self.run(both, "--all")
        assert [line.split()[4] for line in capsys.readouterr().out.splitlines()[2:4]] == ["jsd", "forward_kl"]

    def test_the_interpreter_would_compile_nothing(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert os.environ["TRITON_INTERPRET"] == "1"
        assert static.main([]) == 2
        assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err

    def test_bytes_are_counted_in_the_interpreter(self) -> None:
        with mock.patch.object(static.subprocess, "run", return_value=mock.Mock(returncode=3)) as run:
            assert static.count_traffic() == 3
        assert run.call_args.args[0][1:] == ["-m", "benchmarks.traffic", "--quick"]
        assert run.call_args.kwargs["env"]["TRITON_INTERPRET"] == "1"


def test_kernels_compile_without_a_gpu_and_without_faults() -> None:
    """In a process that does not interpret them."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.static", "--only", "sm_90", "--dtype", "bf16", "--kernel", "statistics"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "12 kernels compiled, 0 faults" in ran.stdout
    assert ran.stdout.splitlines()[2].split()[:3] == ["sm_90", "bf16", "statistics"]
