"""Standard output and error that outlive what reads them: a pipe that closes, a full disk, a terminal that goes, a narrow encoding."""

from __future__ import annotations

import io
import os
import sys
from typing import Any, cast

from iqlite.errors import IqliteError

PIPES_CLOSED = (BrokenPipeError, ConnectionResetError)


class Outliving(io.FileIO):
    """A raw stream whose reader may go: what can't be written is dropped, and `fault` says why. A closed pipe is no fault: nobody reads."""

    fault = ""
    gone = False

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Writes, or drops what can't be written, from then on silently."""
        if not self.gone:
            try:
                return super().write(data) or 0
            except OSError as error:
                self.gone = True
                self.fault = "" if isinstance(error, PIPES_CLOSED) else error.strerror or str(error)
        return len(memoryview(data).cast("B"))


def outlive() -> None:
    """Puts such streams in the place of this process's own, and stand-ins where it was started without (`>&-`)."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # else the next file that is opened would be taken for a stream
        pass
    os.close(number)
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: PTH123, SIM115
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a narrow encoding, as Windows gives redirected output, loses a sign and not the run
            if type(raw := getattr(stream.buffer, "raw", stream.buffer)) is io.FileIO:  # not Windows' console
                outliving = Outliving(stream.fileno(), "w", closefd=False)
                buffer: Any = outliving if raw is stream.buffer else io.BufferedWriter(cast(io.RawIOBase, outliving))  # python -u has none
                lines = stream.line_buffering
                setattr(sys, name, io.TextIOWrapper(buffer, stream.encoding, "replace", line_buffering=lines, write_through=stream.write_through))  # fmt: skip


def lost() -> None:
    """At the end: IqliteError if something that was to be printed on standard output couldn't be."""
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper):
        return
    stream.flush()
    raw = getattr(stream.buffer, "raw", stream.buffer)
    if isinstance(raw, Outliving) and raw.fault:
        raise IqliteError(f"standard output can't be written ({raw.fault}): what was to be printed is lost, all else is done.")
