"""What the tests of caches share."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("safetensors")

from kdkernels.transformers.cache import write_cache
from tests.support.caches import EXAMPLES, OPTIONS


@pytest.fixture(scope="module")
def whole(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache made without an interruption."""
    folder = tmp_path_factory.mktemp("cache") / "whole"
    write_cache(llama, EXAMPLES, folder, **OPTIONS)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy, to do harm to."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))
