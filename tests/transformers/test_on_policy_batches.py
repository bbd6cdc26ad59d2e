"""Where batches on policy come from: the data, the student, or the buffer; and that a run goes on from a saved state."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.writing import Parrot, data, lively, responses, rows

transformers = pytest.importorskip("transformers")
from kdkernels.transformers.on_policy import OnPolicy  # noqa: E402

Z = 5.0  # standard deviations that a count may be off: less than once in a million counts by chance


@pytest.fixture(scope="module")
def llama() -> Any:
    return lively("llama")


# ---- where batches come from ----


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_share_of_the_students_batches_is_the_fraction(fraction: float) -> None:
    writer, model, batch, steps = OnPolicy(fraction, seed=7), Parrot(), data(), 1000
    sources = Counter(writer.batch(model, batch, step=step, micro=0, progress=0.5)[1] for step in range(steps))
    assert abs(sources["generated"] - fraction * steps) <= Z * math.sqrt(steps * fraction * (1 - fraction))
    assert sources["generated"] + sources["data"] == steps
    assert not writer.state_dict()["lengths"].numel()  # no buffer


@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
def test_a_full_buffer_takes_over_as_training_goes_on(progress: float) -> None:
    writer, model, batch, steps, phi = OnPolicy(0.6, schedule="adaptive", replay_size=6), Parrot(), data(), 2000, 0.6
    for step in range(steps, steps + 50):
        writer.batch(model, batch, step=step, micro=0, progress=1.0)
    assert len(writer.state_dict()["lengths"]) == 6
    sources = Counter(writer.batch(model, batch, step=step, micro=0, progress=progress)[1] for step in range(steps))
    shares = {"generated": phi * (1 - progress), "replayed": phi * progress, "data": 1 - phi}
    for source, share in shares.items():
        assert abs(sources[source] - share * steps) <= Z * math.sqrt(steps * share * (1 - share))


def test_until_the_buffer_is_full_batches_are_written_anew() -> None:
    writer, model, batch = OnPolicy(1.0, schedule="adaptive", replay_size=10), Parrot(), data()
    sources = [writer.batch(model, batch, step=step, micro=0, progress=1.0)[1] for step in range(12)]
    assert sources == ["generated"] * 4 + ["replayed"] * 8


def test_the_oldest_sequence_makes_room_and_a_draw_repeats_none() -> None:
    """The parrot numbers its batches, so that a sequence tells its age."""
    writer, model, batch = OnPolicy(1.0, schedule="adaptive", replay_size=7), Parrot(), data()
    for step in range(5):
        writer.batch(model, batch, step=step, micro=0, progress=0.0)
    texts = [[*row[:prompt], age] for age in range(5) for row, prompt in zip(rows(batch), (3, 6, 1), strict=True)]
    seen: Counter[str] = Counter()
    for step in range(5, 205):
        found, source = writer.batch(model, batch, step=step, micro=0, progress=1.0)
        assert source == "replayed"
        assert [len(one) for one in responses(found)] == [1, 1, 1]
        drawn = [str(row) for row in rows(found)]
        assert len(set(drawn)) == 3
        seen.update(drawn)
    assert set(seen) == {str(text) for text in texts[-7:]}
    assert all(abs(count - 200 * 3 / 7) <= Z * math.sqrt(200 * 3 / 7 * 4 / 7) for count in seen.values())
    assert model.asked == 5


def test_ranks_draw_different_sequences() -> None:
    writer, model, batch = OnPolicy(1.0, schedule="adaptive", replay_size=30), Parrot(), data()
    for step in range(10):
        writer.batch(model, batch, step=step, micro=0, progress=0.0)
    first, other, again = (rows(writer.batch(model, batch, step=10, micro=0, progress=1.0, rank=rank)[0]) for rank in (0, 1, 0))
    assert first == again != other


GROWTH = [
    ([3.0], [0.2]),
    ([3.0, 2.0, 1.0], [0.2, 0.2, 0.2]),
    ([3.0, 3.0], [0.2, 0.3]),
    ([2.0, 3.0, 2.5, 2.6], [0.2, 0.3, 0.3, 0.4]),  # held against the evaluation before, not the best
    ([1.0, math.nan, 0.5, math.inf, 0.6], [0.2, 0.2, 0.2, 0.2, 0.3]),
    ([1.0] * 11, [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0, 1.0]),
]


@pytest.mark.parametrize(("losses", "fractions"), GROWTH)
def test_the_adaptive_fraction_grows_where_the_validation_loss_does_not_fall(losses: list[float], fractions: list[float]) -> None:
    adaptive, constant = OnPolicy(0.2, schedule="adaptive"), OnPolicy(0.2)
    for loss, fraction in zip(losses, fractions, strict=True):
        adaptive.observe(loss)
        constant.observe(loss)
        assert adaptive.fraction == pytest.approx(fraction)
        assert adaptive.fraction <= 1.0
        assert constant.fraction == 0.2


# ---- state ----


def test_a_run_that_goes_on_from_a_saved_state_is_the_same_run(llama: Any, tmp_path: Any) -> None:
    options: dict[str, Any] = {
        "schedule": "adaptive",
        "replay_size": 8,
        "max_new_tokens": 4,
        "eos_token_id": list(range(20)),
        "seed": 2,
    }

    def run(writer: OnPolicy, start: int, stop: int) -> list[Any]:
        found = []
        for step in range(start, stop):
            batch, source = writer.batch(llama, data(), step=step, micro=0, progress=step / 16)
            if step % 2 == 0:
                writer.observe(1.0)
            found.append((source, rows(batch), batch["labels"].tolist(), writer.fraction))
        return found

    whole = OnPolicy(0.3, **options)
    expected = run(whole, 0, 16)
    assert {source for source, *_ in expected[8:]} >= {"generated", "replayed"}
    first, second = OnPolicy(0.3, **options), OnPolicy(0.3, **options)
    run(first, 0, 8)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert run(second, 8, 16) == expected[8:]
    assert str(second.state_dict()) == str(whole.state_dict())


def test_of_a_larger_buffer_the_newest_stay_and_an_empty_one_is_a_state_too() -> None:
    large, small = (OnPolicy(1.0, schedule="adaptive", replay_size=size) for size in (9, 4))
    small.load_state_dict(large.state_dict())
    assert not small.state_dict()["lengths"].numel()
    model = Parrot()
    for step in range(3):
        large.batch(model, data(), step=step, micro=0, progress=0.0)
    small.load_state_dict(large.state_dict())
    assert small.state_dict()["prompts"].tolist() == [1, 3, 6, 1]
    assert torch.equal(small.state_dict()["tokens"], large.state_dict()["tokens"][-(2 + 4 + 7 + 2) :])


def test_a_constant_schedule_keeps_the_fraction_it_was_given() -> None:
    writer = OnPolicy(0.3)
    writer.load_state_dict(OnPolicy(0.9, schedule="adaptive").state_dict())
    assert writer.fraction == 0.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("prompts"), "keys"),
        (lambda state: state.update(lengths=state["lengths"] + 1), "add up"),
        (lambda state: state.update(prompts=state["lengths"]), "shorter prompt"),
        (lambda state: state.update(prompts=state["prompts"][:-1]), "prompts"),
        (lambda state: state.update(fraction=1.5), r"\[0, 1\]"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(change: Callable[[dict[str, Any]], None], message: str) -> None:
    writer = OnPolicy(1.0, schedule="adaptive")
    writer.batch(Parrot(), data(), step=0, micro=0, progress=0.0)
    state, before = writer.state_dict(), str(writer.state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        writer.load_state_dict(state)
    assert str(writer.state_dict()) == before
