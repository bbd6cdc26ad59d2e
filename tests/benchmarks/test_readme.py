"""The README's figures are those of the results files."""

from __future__ import annotations

import re

from benchmarks import readme, roofline

TEXT = readme.README.read_text()


def test_the_tables_come_from_the_results_files() -> None:
    assert readme.updated(TEXT) == TEXT, "run python -m benchmarks.readme"


def test_the_median_errors_of_the_roofline_are_what_its_command_prints() -> None:
    found = roofline.rows()
    shown = re.search(r"<!-- roofline -->(.*?)<!-- end -->", TEXT, re.DOTALL)
    assert shown is not None
    for eager, what in ((True, "eager rows"), (False, "rows of Liger's kernels")):
        counted = [row for row in found if row.metric == "speed" and row.eager == eager and not row.reason]
        assert (
            f"{roofline.median_error(found, 'speed', eager=eager):.1%} for the {len(counted)} {what}".replace("%", " %") in shown[1]
        )
