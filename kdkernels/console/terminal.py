"""What the commands show: a console that outlives its reader, and a bar that nothing breaks into."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from kdkernels.console.arguments import drop_output
from kdkernels.errors import CommandError

BAR = 20  # columns of the bar itself, which no text takes from it
TIME = 8  # of the time left


class Output(Console):
    """A console whose reader may go: the rest is not shown, and the work goes on."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        drop_output()

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError as error:  # not of --out, which is what else is written
            raise CommandError(f"standard output cannot be written: {error.strerror}") from error


def say(console: Console, text: str) -> None:
    """A line of plain text; the terminal breaks it, not the console."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


@contextmanager
def without_file_bars() -> Iterator[None]:
    """Without the bars that transformers draws for every file."""
    from transformers.utils import logging as library

    drawn = library.is_progress_bar_enabled()
    library.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            library.enable_progress_bar()


class Bar(Progress):
    """A bar with a count, the time left and a text (a task's description); only on a terminal.

    What is printed, warned or logged while it is there stands above it, also from handlers that were made before: transformers'
    own holds on to the standard error of its beginning, and would write into the bar's line.
    """

    def __init__(self, console: Console | None, *, wide: bool = False) -> None:
        """console: None shows nothing. wide: the bar takes all the terminal's columns that the rest leaves."""
        # a standard error that goes to a file stays there
        to_terminal = sys.stderr is not None and sys.stderr.isatty()
        super().__init__(
            BarColumn(None if wide else BAR, table_column=Column(min_width=BAR, no_wrap=True, ratio=1 if wide else None)),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=console,
            disable=console is None or not console.is_terminal,
            redirect_stderr=to_terminal,
            expand=wide,
        )
        self._moved: list[tuple[logging.StreamHandler[Any], Any]] = []

    def start(self) -> None:
        before = sys.stderr
        super().start()
        if sys.stderr is not before:
            loggers = [logging.getLogger(), *logging.getLogger().manager.loggerDict.values()]
            for handler in {handler for logger in loggers for handler in getattr(logger, "handlers", ())}:
                if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                    self._moved.append((handler, before))
                    handler.setStream(sys.stderr)

    def stop(self) -> None:
        while self._moved:
            handler, stream = self._moved.pop()
            handler.setStream(stream)
        super().stop()

    def fitting(self, parts: list[str], total: int) -> str:
        """As many of the parts, the most telling first, as stand beside a bar up to ``total`` on this terminal."""
        room = self.console.width - BAR - 2 * len(str(total)) - TIME - 4  # with the stroke of the count and three gaps
        text = ""
        for part in parts:
            longer = f"{text}, {part}" if text else part
            if len(longer) > room:
                break
            text = longer
        return text
