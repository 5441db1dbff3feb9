"""Standard output and error that never raise: whatever becomes of the console, a command ends by its own result."""

import io
import os
import sys


def make_streams_safe() -> None:
    """Let every line reach standard output and error, as far as they can show it; called when a command starts.

    - Characters that the encoding lacks (cp1252 on Windows, `PYTHONIOENCODING=ascii`) are shown as `?`.
    - A reader that is gone (`| head`, a closed terminal) does not end the command.
    - Without a console (`pythonw`, a service) the output is dropped.

    Streams that a notebook or a test has put in place are left alone.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)

        # Python has no stream at all where there is no console.
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  open until the end
        elif type(stream) is io.TextIOWrapper:
            stream.reconfigure(errors=_error_handler(stream.errors))
            # What it still holds must come before what its successor writes.
            stream.flush()
            setattr(sys, name, _SafeStream(stream))


def _error_handler(errors: str | None) -> str:
    """Return how to encode what an encoding lacks."""
    # Standard error has a way of its own, which loses nothing.
    if errors == "backslashreplace":
        return errors
    return "replace"


class _SafeStream(io.TextIOWrapper):
    """A standard stream without errors.

    It shares the buffer of the one that it stands for, which libraries that asked for it earlier still write to.
    """

    def __init__(self, stream: io.TextIOWrapper) -> None:
        super().__init__(
            stream.buffer,
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        # Dropped, it would close the buffer.
        self._stream = stream

    def close(self) -> None:
        """Flush, and leave the shared buffer open: standard output and error may be one stream, of which one goes."""
        self.flush()

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            self._go_silent()
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            self._go_silent()

    def _go_silent(self) -> None:
        """Send what is still in the buffer, and all that follows, nowhere."""
        # Under the descriptor, not in Python: child processes and C libraries write there too.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)
