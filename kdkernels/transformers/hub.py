"""The hub: what names it has, and whether it can be asked. Where it cannot, huggingface_hub tries half a minute for each file."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator

from huggingface_hub import constants, get_session

# NAME or OWNER/NAME; what is written otherwise can only be a path
NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
SECONDS = 5.0  # a hub that is slower than this is taken to be away


def answers() -> bool:
    """One request, within ``SECONDS``. False also where HF_HUB_OFFLINE is set, which asks nothing."""
    if constants.HF_HUB_OFFLINE:
        return False
    found = threading.Event()

    def ask() -> None:
        with contextlib.suppress(Exception):  # of whichever HTTP library the hub's client is made with
            get_session().head(constants.ENDPOINT, timeout=SECONDS)
            found.set()

    # A thread, as the look-up of a name has no time limit.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(SECONDS)
    return found.is_set()


@contextlib.contextmanager
def asked() -> Iterator[None]:
    """Inside, huggingface_hub looks only at what it has here already, unless the hub answers.

    By its own switch: transformers does not hand local_files_only on to everything that it looks for.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = not answers()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
