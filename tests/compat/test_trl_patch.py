"""The patch of TRL's trainers: what it replaces, what it refuses, and that it can be taken back."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")
pytest.importorskip("datasets")
pytest.importorskip("peft")
from trl.import_utils import TRLExperimentalWarning

from kdkernels.compat import trl as compat
from tests.support import README
from tests.support.pages import blocks
from tests.support.trl import TRAINERS, batch, both_trainers, child_environment, trainer_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TRLExperimentalWarning)
    from trl.experimental.gkd import GKDTrainer
    from trl.experimental.server_distillation import ServerDistillationTrainer


PATCHES = {
    "gkd": (compat.patch_gkd_trainer, compat.unpatch_gkd_trainer),
    "distillation": (compat.patch_distillation_trainer, compat.unpatch_distillation_trainer),
}


@both_trainers
class TestThePatch:
    @pytest.fixture(autouse=True)
    def taken_back(self, kind: str) -> Iterator[None]:
        before = vars(TRAINERS[kind][0])["compute_loss"]
        yield
        PATCHES[kind][1]()
        assert vars(TRAINERS[kind][0])["compute_loss"] is before

    def test_it_is_taken_back_whole(self, kind: str) -> None:
        (cls, patched), (patch, unpatch) = TRAINERS[kind], PATCHES[kind]
        before = dict(vars(cls))
        patch()
        assert vars(cls)["compute_loss"] is not before["compute_loss"]
        assert cls.compute_loss.__name__ == "compute_loss"
        assert {name for name in before if vars(cls)[name] is not before[name]} == {"compute_loss"}
        unpatch()
        assert dict(vars(cls)) == before
        with patched():
            assert vars(cls)["compute_loss"] is not before["compute_loss"]
        assert dict(vars(cls)) == before
        with pytest.raises(KeyError, match="inside"), patched():
            raise KeyError("inside")
        assert dict(vars(cls)) == before

    def test_twice_is_once(self, kind: str) -> None:
        (cls, patched), (patch, unpatch) = TRAINERS[kind], PATCHES[kind]
        unpatch()
        before = cls.compute_loss
        patch()
        once = cls.compute_loss
        patch()
        with patched():
            assert cls.compute_loss is once
        assert cls.compute_loss is once  # the block found it patched, and leaves it so
        unpatch()
        assert cls.compute_loss is before

    def test_one_leaves_the_other_alone(self, kind: str) -> None:
        others = [ServerDistillationTrainer, *(cls for cls, _ in TRAINERS.values() if cls is not TRAINERS[kind][0])]
        before = [cls.compute_loss for cls in others]
        PATCHES[kind][0]()
        assert [cls.compute_loss for cls in others] == before

    def test_what_others_have_put_in_its_place_is_not_lost(self, kind: str) -> None:
        cls, (patch, unpatch) = TRAINERS[kind][0], PATCHES[kind]
        patch()
        ours = cls.compute_loss
        cls.compute_loss = others = lambda *_, **__: None
        with pytest.raises(RuntimeError, match=f"{cls.__name__}.compute_loss has been replaced since"):
            unpatch()
        assert cls.compute_loss is others
        cls.compute_loss = ours

    @pytest.mark.parametrize("installed", ["1.15.2", "1.16.1", "2.0.0"])
    def test_another_release_is_refused(self, kind: str, installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.metadata, "version", lambda _: installed)
        cls, (patch, _) = TRAINERS[kind][0], PATCHES[kind]
        before = cls.compute_loss
        with pytest.raises(RuntimeError, match=rf"{cls.__name__} of TRL {installed}.*supported: 1\.16\.0"):
            patch()
        assert cls.compute_loss is before

    def test_a_source_that_was_not_read_is_refused(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        cls, (patch, _) = TRAINERS[kind][0], PATCHES[kind]
        part = "generalized_jsd_loss" if kind == "gkd" else "_compute_loss"
        monkeypatch.setattr(cls, part, lambda *_, **__: torch.zeros(()))
        before = cls.compute_loss
        with pytest.raises(RuntimeError, match=rf"its {part} is not the released one.*supported: 1\.16\.0"):
            patch()
        assert cls.compute_loss is before

    def test_without_trl_the_error_names_the_extra(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> str:
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "version", missing)
        with pytest.raises(ImportError, match=r"TRL, not installed here: .*pip install --no-build-isolation '\.\[trl\]'"):
            PATCHES[kind][0]()

    def test_a_subclass_that_replaces_a_part_of_the_loss_keeps_it(self, kind: str, tmp_path: Path) -> None:
        cls = TRAINERS[kind][0]

        class Own(cls):  # type: ignore[misc, valid-type]
            """Whichever of the two its parent calls."""

            @staticmethod
            def generalized_jsd_loss(**_: Any) -> Tensor:
                return torch.full((), 42.0, requires_grad=True)

            def _compute_loss(self, *_: Any) -> Any:
                return self.generalized_jsd_loss(), torch.zeros(()), torch.ones(())

        PATCHES[kind][0]()
        trainer = trainer_of(kind, tmp_path, cls=Own)
        assert float(trainer.compute_loss(trainer.model, batch(kind)).detach()) == 42.0


def test_the_module_is_imported_without_trl() -> None:
    program = "import sys; sys.modules['trl'] = sys.modules['transformers'] = None; import kdkernels.compat.trl"
    subprocess.run([sys.executable, "-c", program], check=True, env=child_environment())


def test_the_swap_of_the_readme_patches_and_takes_back() -> None:
    (block,) = (content for language, content in blocks(README) if language == "python" and "kdkernels.compat" in content)
    before, during = GKDTrainer.compute_loss, []
    patching, taking_back = block.split("...\n")
    scope: dict[str, Any] = {}
    exec(patching, scope)
    during.append(GKDTrainer.compute_loss)
    exec(taking_back, scope)
    assert during != [before]
    assert GKDTrainer.compute_loss is before
