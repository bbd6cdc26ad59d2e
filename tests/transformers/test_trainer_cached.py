"""A cached teacher teaches what the model would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from kdkernels.transformers import TopKCache, write_cache
from tests.support.caches import as_version_1
from tests.support.tiny_models import VOCAB, build
from tests.support.training import examples, logs, models, trainer, weights


@pytest.mark.parametrize("method", ["forward_kl", "taid"])
def test_a_cached_teacher_teaches_what_the_model_would(method: str, tmp_path: Path) -> None:
    """With every token listed nothing is lost: not in training, not in evaluation, and the data may be left to the cache."""
    data, held_out = examples(), examples(5, seed=3)
    _, teacher = models(torch.float32)
    # SGD: Adam takes as long steps where a gradient is so small that rounding, in orders of the processor's, is a part of it.
    options = {"method": method, "temperature": 1.5, "ce_weight": 0.2, "taid_alpha": 0.1, "optim": "sgd", "learning_rate": 1.0}
    write_cache(teacher, [*data, *held_out], tmp_path / "cache", top_k=VOCAB, temperature=1.5)
    runs = []
    for name, given in (("model", teacher), ("folder", str(tmp_path / "cache")), ("cache", TopKCache(tmp_path / "cache"))):
        run = trainer(tmp_path / name, teacher=given, train_dataset=data, eval_dataset=held_out, **options)
        run.train()
        runs.append((weights(run.model), logs(run), run.evaluate()))
    for state, logged, evaluated in runs[1:]:
        for name, tensor in runs[0][0].items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-3, atol=2e-4)
        for one, other in zip(logged, runs[0][1], strict=True):
            assert one == pytest.approx(other, rel=1e-3)
        for name in ("eval_loss", "eval_kd", "eval_ce", "eval_agreement"):
            assert evaluated[name] == pytest.approx(runs[0][2][name], rel=1e-3)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_a_few_tokens_of_a_cached_teacher_teach_too(tail: str, tmp_path: Path) -> None:
    """Trained on the cache's own examples, the student's held-out loss against the teacher itself falls."""
    student, teacher = models(torch.float32)
    cache = write_cache(teacher, examples(16), tmp_path / "cache", top_k=8).folder
    given = {"topk_tail": tail, "max_steps": 20, "learning_rate": 3e-2}
    run = trainer(tmp_path / "run", student, cache, train_dataset=None, **given)
    judge = trainer(tmp_path / "judge", student, teacher, eval_dataset=examples(16))
    before = judge.evaluate()["eval_kd"]
    run.train()
    assert judge.evaluate()["eval_kd"] < 0.7 * before


@pytest.mark.parametrize("version", [1, 2])
def test_a_confident_teacher_teaches_from_a_cache_what_it_teaches_itself(version: int, tmp_path: Path) -> None:
    """reverse_kl, of which an outcome without mass is no divergence: it fell while the one against the teacher itself rose."""
    student, teacher = models(torch.float32)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(100)
    write_cache(teacher, examples(16), tmp_path / "cache", top_k=8)
    if version == 1:
        as_version_1(tmp_path / "cache")
    given = {"method": "reverse_kl", "eval_dataset": examples(16), "max_steps": 30, "learning_rate": 3e-2}
    run = trainer(tmp_path / "run", student, tmp_path / "cache", train_dataset=None, **given)
    judge = trainer(tmp_path / "judge", student, teacher, **given)
    found = []
    for taught in (lambda: None, run.train):
        taught()
        found.append((judge.evaluate()["eval_kd"], run.evaluate()["eval_kd"]))
    assert min(found[1]) >= 0
    assert found[1][0] < 0.7 * found[0][0], "the true divergence"
    assert found[1][1] < 0.7 * found[0][1], "the one that the cache gives"


def test_what_a_cached_teacher_cannot_do_is_refused(tmp_path: Path) -> None:
    _, teacher = models(torch.float32)
    folder = tmp_path / "cache"
    write_cache(teacher, examples(4), folder, top_k=4)
    for given, message in (
        ({"method": "okd"}, "method 'okd' trains the teacher along, but the teacher given is a cache"),
        ({"on_policy_fraction": 0.5}, "on_policy_fraction needs a teacher that can judge new text"),
        ({"temperature": 2.0}, "temperature=2.0, but the cache was made for 1.0"),
        ({"method": "reverse_kl", "topk_tail": "renormalize"}, "reverse_kl moves mass outside the top-k"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, teacher=folder, **given)
    with pytest.raises(ValueError, match="is not in the cache"):
        trainer(tmp_path, teacher=folder, train_dataset=examples(4, seed=9)).train()


def test_a_cache_of_a_teacher_with_more_rows_leaves_them_to_the_rest(tmp_path: Path) -> None:
    """The most likely tokens of a padded teacher may be ones that the student has no row for."""
    student, teacher = build("llama").float(), build("llama", seed=1, vocab_size=VOCAB + 40).float()
    data = examples()
    cache = write_cache(teacher, data, tmp_path / "cache", top_k=16)
    assert any(bool((cache.lookup(one["input_ids"])[0] >= VOCAB).any()) for one in data)
    run = trainer(tmp_path / "run", student, cache, train_dataset=data)
    before = weights(student)
    run.train()
    assert all(entry["loss"] > 0 for entry in logs(run))
    assert not torch.equal(weights(student)["lm_head.weight"], before["lm_head.weight"])
