"""The notebook of examples/ runs from top to bottom, its figures say what its text says, and it is stored with them, small."""

from __future__ import annotations

import base64
import re
from typing import Any

import pytest

pytest.importorskip("ipykernel", reason="needs ipykernel, the process in which a notebook runs")
pytest.importorskip("nbclient", reason="needs nbclient, which runs a notebook without a browser")
pytest.importorskip("matplotlib")
import nbformat

from tests.support.notebook import NOTEBOOK, executed, shown


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("notebook")
    book = executed(folder)
    assert list(folder.iterdir()) == [], "nothing is left behind"
    return book


@pytest.fixture(scope="module")
def stored() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def code(book: Any) -> list[Any]:
    return [cell for cell in book.cells if cell.cell_type == "code"]


def figure(book: Any, pattern: str) -> float:
    """The one number that is printed in such a line."""
    (found,) = re.findall(pattern, "".join(shown(cell)[0] for cell in code(book)), re.MULTILINE)
    return float(found.replace(",", ""))


@pytest.mark.parametrize("which", ["ran", "stored"])
def test_its_figures_say_what_its_text_says(which: str, request: pytest.FixtureRequest) -> None:
    book = request.getfixturevalue(which)
    assert figure(book, r"kdkernels ([\d.]+)$") == pytest.approx(figure(book, r"^written out ([\d.]+),"), abs=2e-6)
    assert figure(book, r"^all (\d+) gradients agree$") == 21
    tensor = 125  # MiB of one of tokens × vocabulary
    assert figure(book, r"^written out: ([\d,]+) MiB$") > 5 * tensor
    assert figure(book, r"^kdkernels: ([\d,]+) MiB$") < tensor
    teacher, alone = (figure(book, rf"^{name}: ([\d.]+) nats a token$") for name in ("teacher", "text alone"))
    assert teacher < alone < figure(book, r"before training ([\d.]+)$")


def test_it_shows_one_picture_of_the_losses(ran: Any) -> None:
    assert sum(len(shown(cell)[1]) for cell in code(ran)) == 1


def test_it_is_stored_as_it_ran_and_small(stored: Any) -> None:
    assert [cell.execution_count for cell in code(stored)] == list(range(1, len(code(stored)) + 1))
    for cell in code(stored):
        printed, pictures = shown(cell)
        assert len(cell.outputs) == bool(printed) + len(pictures), "nothing of standard error, and no error"
        assert ("print(" in cell.source) == bool(printed)
        assert all(len(base64.b64decode(picture.data["image/png"])) < 50_000 for picture in pictures)
    assert NOTEBOOK.stat().st_size < 100_000
    assert not re.search(r"/(?:home|root|tmp|usr|work)/", NOTEBOOK.read_text())
