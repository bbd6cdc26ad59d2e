"""What tests of transformers' models share."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="module")
def llama() -> Any:
    from tests.support.tiny_models import build  # transformers may not be installed

    return build("llama")
