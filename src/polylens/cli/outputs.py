"""Where a command's results go: checked before the work, written whole afterwards."""

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from polylens.errors import InvalidInputError
from polylens.files.whole import beside, is_device

# A path that stands for the standard output.
PIPE = Path("-")
# What must fit on the disk before the work begins; results are smaller, but for lenses.
ROOM = 1 << 20


@dataclass(frozen=True)
class Output:
    """Where the figures of a command go, and how much it says meanwhile."""

    json: Annotated[
        Path | None, typer.Option("--json", help="Write the figures as JSON; - for a pipe.")
    ] = None
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No table and no progress, only files.")
    ] = False

    # What not every command can write.
    plot = None
    html = None
    save = None

    @property
    def progress(self) -> bool:
        """Whether to show progress bars: on a terminal only."""
        return not self.quiet and sys.stderr.isatty()

    def check(self) -> None:
        """Before hours of work: can the results be written?

        Raises:
            InvalidInputError: a directory, one that is not there or without rights, a device, a
                full disk, or a kind of figure that there is not.
        """
        for name in ("json", "plot", "html", "save"):
            path = getattr(self, name)
            if path == PIPE and name != "json":
                raise InvalidInputError(f"--{name} needs a file; only --json goes to a pipe")
            if path is not None and path != PIPE:
                check_writable(path)
        if self.plot is not None:
            from matplotlib.backend_bases import FigureCanvasBase

            known = FigureCanvasBase.get_supported_filetypes()
            if self.plot.suffix[1:].lower() not in known:
                raise InvalidInputError(
                    f"{self.plot}: figures are written as {', '.join(sorted(known))}, by the "
                    "name's end"
                )

    def show(self, *results: Any) -> None:
        """Tables for people: not in a pipe that wants JSON, not with --quiet."""
        if not self.quiet:
            Console(stderr=self.json == PIPE).print(*results)

    def figures(self, as_json: str) -> None:
        """Write what `--json` is to hold."""
        if self.json == PIPE:
            sys.stdout.write(as_json + "\n")
        elif self.json is not None:
            self.write(self.json, lambda path: path.write_text(as_json + "\n", encoding="utf-8"))

    def figure(self, draw: Callable[[], Any]) -> None:
        """Write what `--plot` is to show."""
        if self.plot is not None:
            kind = self.plot.suffix[1:].lower()
            self.write(self.plot, lambda path: draw().savefig(path, format=kind))

    def write(self, path: Path, writer: Callable[[Path], Any]) -> None:
        """The file as the writer makes it, there whole or not at all; and say so."""
        with beside(path) as new:
            writer(new)
        self.wrote(path)

    def wrote(self, path: Path) -> None:
        """Say which file there is now."""
        if not self.quiet:
            console = Console(stderr=self.json == PIPE)
            console.print(f"wrote {escape(str(path))}", soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class WithPlot(Output):
    """The same, and a figure."""

    plot: Annotated[
        Path | None, typer.Option("--plot", help="Write the figure (.png, .pdf, .svg).")
    ] = None


@dataclass(frozen=True)
class WithLens(WithPlot):
    """The same, and what there is of a whole lens."""

    html: Annotated[
        Path | None, typer.Option("--html", help="Write one page with everything on the layers.")
    ] = None
    save: Annotated[Path | None, typer.Option("--save", help="Write the lens, for --lens.")] = None


def check_writable(path: Path) -> None:
    """InvalidInputError if a file of this name cannot be written: which, and why."""
    path = path.absolute()
    if path.is_dir():
        raise InvalidInputError(f"{path} is a directory; give the name of a file in it")
    if is_device(path):
        raise InvalidInputError(f"{path} is a device, pipe or socket; give the name of a file")
    if not path.parent.is_dir():
        raise InvalidInputError(
            f"{path} cannot be written: there is no such directory, {path.parent}"
        )
    try:
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError("the file is not ours to write")
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            probe.write(bytes(ROOM))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise InvalidInputError(f"{path} cannot be written: {error.strerror or error}") from error
