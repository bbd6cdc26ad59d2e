"""A method is one file: its settings become fields and options, its hooks are called, its state is kept in checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from kdkernels.transformers import KDConfig, KDTrainer  # noqa: E402
from kdkernels.transformers import methods as registry  # noqa: E402
from kdkernels.transformers.distill.options import BY_NAME  # noqa: E402
from kdkernels.transformers.methods.base import Lesson  # noqa: E402
from kdkernels.transformers.methods.fixed import Fixed  # noqa: E402
from kdkernels.transformers.settings import COUNT, SHARE, Flag, Settings, said  # noqa: E402
from tests.support.training import examples, logs, models, settings, weights  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")


@dataclasses.dataclass
class HalfSettings(Settings):
    method_of = "half"

    half_share: Annotated[float, SHARE, Flag("S", "of the teacher", name="share")] = said(0.5, "Share of the teacher.")
    half_steps: Annotated[int | None, COUNT] = said(None, "Steps until the whole teacher.")


class Half(Fixed):
    """The target is half the student, and a count of steps is kept."""

    name = key = "half"

    def __init__(self, trainer: Any, target: Any) -> None:
        super().__init__(trainer, target)
        self.steps, self.called = 0, set[str]()

    def begin_run(self) -> None:
        self.steps = 0

    def more(self, lesson: Lesson) -> Mapping[str, Any]:
        return {"t": 0.5} if lesson.training else {}

    def before_step(self) -> None:
        self.called.add("before")

    def after_step(self) -> None:
        self.steps += 1

    def logs(self) -> dict[str, float]:
        return {"steps_seen": float(self.steps)}

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        self.called.add("evaluated")

    def save(self, folder: Path) -> None:
        (folder / "half.txt").write_text("saved")

    def state_dict(self) -> Any:
        return {"steps": self.steps}

    def load_state_dict(self, state: Any) -> None:
        self.steps = state["steps"]


def test_options_follow_from_settings() -> None:
    (option,) = HalfSettings.options()
    assert (option.flag, option.shown, option.told) == ("--share", "S", "of the teacher (default: 0.5)")
    assert (option.needs, option.default, option.sets) == ("half", None, ("half_share",))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"half_share": 2.0}, r"half_share is a number in \[0, 1\], got 2.0"),
        ({"half_share": None}, r"half_share is a number in \[0, 1\], got NoneType"),
        ({"half_steps": 0}, "half_steps is a whole number of at least 1, got 0"),
    ],
)
def test_values_are_held_to_the_kind_of_their_field(given: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        HalfSettings.check_fields(HalfSettings(**given))
    HalfSettings.check_fields(HalfSettings())


def test_every_option_of_a_method_sets_a_field_of_the_configuration() -> None:
    names = {field.name for field in dataclasses.fields(KDConfig)}
    assert {name for option in BY_NAME.values() for name in option.sets} <= names
    flagged = [(name, default) for each in registry.SETTINGS for name, (default, _, flag) in each.stated().items() if flag]
    for name, default in flagged:
        (option,) = (option for option in BY_NAME.values() if name in option.sets)
        assert option.usual == default or name == "method"


def test_another_method_takes_part_in_all_of_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.METHODS, "half", Half)
    found = []
    for method, more in (("half", {}), ("taid", {"taid_t_start": 0.5, "taid_t_end": 0.5})):
        student, teacher = models()
        args = settings(tmp_path / method, method=method, save_strategy="steps", save_steps=2, eval_strategy="steps", **more)
        trainer = KDTrainer(student, args, train_dataset=examples(), eval_dataset=examples(4), teacher=teacher)
        trainer.train()
        found.append(weights(student))
        if method == "half":
            half: Any = trainer.method
            assert half.called == {"before", "evaluated"}
            assert [entry["steps_seen"] for entry in logs(trainer)] == [1.0, 2.0, 3.0, 4.0]
    for name, tensor in found[0].items():  # a share that does not move is what TAID's is then
        assert torch.equal(tensor, found[1][name]), name
    checkpoint = tmp_path / "half" / "checkpoint-2"
    assert (checkpoint / "half.txt").read_text() == "saved"
    student, teacher = models()
    again = KDTrainer(student, settings(tmp_path / "half", method="half"), train_dataset=examples(), teacher=teacher)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert again.method.steps == 4
    for name, tensor in weights(student).items():
        assert torch.equal(tensor, found[0][name]), name


def test_an_argument_parser_of_transformers_takes_the_configuration(tmp_path: Path) -> None:
    argv = [
        "--output_dir",
        str(tmp_path),
        "--method",
        "okd",
        "--okd_target_modules",
        "q_proj",
        "v_proj",
        "--use_cpu",
        "--report_to=none",
    ]
    (args,) = transformers.HfArgumentParser(KDConfig).parse_args_into_dataclasses(argv)
    assert (args.method, args.okd_target_modules, args.okd_lora_rank) == ("okd", ["q_proj", "v_proj"], 32)
