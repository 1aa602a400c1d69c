"""The `hero` command: one mistake, one clear message.

Exit codes: 0; 1 for a mistake or fault; 2 for a command line that cannot be read; 128 + n after
signal n: 130 after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a run must not end for a sign of its messages
            stream.reconfigure(errors="replace")
    if given == ["--version"]:
        print(f"hero {_version()}")
        return 0
    if given[:1] == ["help"]:
        given = [*given[1:], "--help"]
    try:
        return _run(given)
    except KeyboardInterrupt as interrupt:
        _complain("Interrupted.", str(interrupt), given)
        return 128 + int(getattr(interrupt, "number", 2))
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] in ("hero", "hero_kernels"):
            raise
        print(f"error: {missing}. Run: pip install 'hero-kernels[train]'", file=sys.stderr)
        return 1


def _run(given: list[str]) -> int:
    # Imported here, so that Ctrl-C while modules are loaded gets its one line too.
    from hero.commands.arguments import parse
    from hero.config import redacted
    from hero.ranks import launched
    from hero.text import harmless
    from hero.types import Fault

    try:
        command = parse(given)
        if (size := launched()) > 1 and not command.takes_ranks:
            raise ValueError(
                f"{size} processes were started, and this command runs in one: leave the launcher "
                "away. Several processes can run hero train."
            )
        command.run()
    except SystemExit as stop:  # the parser has printed help or what is wrong
        return int(stop.code or 0)
    except BrokenPipeError:  # of `hero recipes | head`: nobody reads on, and nothing may be flushed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, Fault) as mistake:
        hint = "\n".join(getattr(mistake, "__notes__", []))
        _complain(harmless(redacted(str(mistake))), harmless(redacted(hint)), given)
        return 1
    return 0


def _complain(message: str, hint: str, given: list[str]) -> None:
    if "--debug" in given:
        from hero.config import redacted

        print(redacted(traceback.format_exc()), file=sys.stderr)
    rank = os.environ.get("RANK") if "WORLD_SIZE" in os.environ else None
    who = "" if rank is None else f"[rank {rank}] "
    print(f"{who}error: {message}", file=sys.stderr)
    if hint:
        print(f"{who}hint: {hint}", file=sys.stderr)


def _version() -> str:
    try:
        return version("hero-kernels")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
