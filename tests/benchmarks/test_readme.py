"""The figures of the README and of docs are those of the results files."""

from __future__ import annotations

import re

import pytest

from benchmarks import readme, roofline

TEXTS = {page.name: page.read_text() for page in readme.PAGES}


@pytest.mark.parametrize("page", TEXTS)
def test_the_tables_come_from_the_results_files(page: str) -> None:
    assert readme.updated(TEXTS[page]) == TEXTS[page], "run python -m benchmarks.readme"


@pytest.mark.parametrize("mark", [*readme.SECTIONS, "door", "overview", "gpu", "roofline"])
def test_every_table_has_its_place(mark: str) -> None:
    assert sum(text.count(f"<!-- {mark} -->") for text in TEXTS.values()) == 1


def test_the_median_errors_of_the_roofline_are_what_its_command_prints() -> None:
    found = roofline.rows()
    shown = re.search(r"<!-- roofline -->(.*?)<!-- end -->", TEXTS["memory-planning.md"], re.DOTALL)
    assert shown is not None
    for eager, what in ((True, "eager rows"), (False, "rows of Liger's kernels")):
        counted = [row for row in found if row.metric == "speed" and row.eager == eager and not row.reason]
        assert (
            f"{roofline.median_error(found, 'speed', eager=eager):.1%} for the {len(counted)} {what}".replace("%", " %") in shown[1]
        )
