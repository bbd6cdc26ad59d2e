"""The public names, and what each takes: a change here is one that users see, and belongs in CHANGELOG.md.

Divergences are listed by ``kd.divergences()``: a new one changes nothing for who does not ask for it.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

import kdkernels as kd
import kdkernels.transformers
from kdkernels.compat import liger, trl
from tests.support import ROOT

STUDENT = "student_hidden student_head"
TEACHER = "teacher_hidden teacher_head"
LOSS = (
    "divergence temperature square_temperature kd_weight ce_weight token_weight ignore_index reduction normalizer check_labels "
    "return_metrics"
)
CUT = "vocab_size strategy memory_budget"
# What each takes, in any order.
TAKES = {
    kd.linear_kd_loss: f"{STUDENT} {TEACHER} labels t process_group {LOSS} {CUT}",
    kd.linear_okd_loss: f"{STUDENT} {TEACHER} labels teacher_alpha process_group {LOSS} {CUT}",
    kd.linear_topk_kd_loss: f"{STUDENT} topk_ids topk_logprobs labels topk_rest tail t {LOSS} {CUT}",
    kd.kd_loss: f"student_logits teacher_logits labels t {LOSS}",
    kd.LMHead: "weight bias logit_scale softcap",
    kd.TAIDSchedule: "t_start t_end alpha beta adaptive",
    kd.TAIDSchedule.update: "self loss progress",
    kd.plan: "tokens vocab student_dim teacher_dim dtype device memory_budget train_head teacher_dtype strategy divergence "
    "online_teacher train_teacher_head",
    kd.backend: "device dtype",
    kd.free_scratch: "",
    kd.divergences: "",
}
NAMES = {
    kd: "Divergence LMHead LinearKDLoss OKDLoss Plan TAIDSchedule backend divergences free_scratch kd_loss linear_kd_loss "
    "linear_okd_loss linear_topk_kd_loss plan",
    kdkernels.transformers: "KDConfig KDTrainer TopKCache hidden_states lm_head shared_rows verify_lm_head write_cache",
    liger: "LigerFusedLinearJSDLoss",
    trl: "distillation_trainer_patched gkd_trainer_patched patch_distillation_trainer patch_gkd_trainer "
    "unpatch_distillation_trainer unpatch_gkd_trainer",
}


def public(module: Any) -> set[str]:
    """What it exports; of a module without a list, what it defines."""
    defined = {name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    return set(getattr(module, "__all__", {name for name in defined if not name.startswith("_")}))


@pytest.mark.parametrize("module", NAMES, ids=lambda module: module.__name__)
def test_public_names(module: Any) -> None:
    names = set(NAMES[module].split())
    assert public(module) - set(kd.divergences()) == names
    assert all(hasattr(module, name) for name in names)


@pytest.mark.parametrize("function", TAKES, ids=lambda function: function.__name__)
def test_parameters(function: Any) -> None:
    assert set(inspect.signature(function).parameters) == set(TAKES[function].split())


def test_the_version_is_that_of_the_changelog(capsys: pytest.CaptureFixture[str]) -> None:
    from kdkernels.cli import main

    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"kdkernels {kd.__version__}\n"
    (latest, *_) = re.findall(r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert latest == kd.__version__
