"""The `hero` command: one mistake, one clear message, exit code 1."""

from __future__ import annotations

import sys
from collections.abc import Sequence

USAGE = """\
usage: hero COMMAND [arguments]

  train [RECIPE]    train an agent (hero recipes lists the recipes)
  sft [RECIPE]      warm start: supervised episodes, answers with hindsight, diagnoses
  eval MODEL        success, score and turns of a model on held-out tasks
  rollout MODEL     play episodes and print them, or write them as JSON lines
  view RUN          make the run's report.html
  model NAME        obtain a small language model offline
  recipes [NAME]    list the recipes, or print one
  doctor            what works on this machine, and what is missing

hero COMMAND --help explains every setting."""

COMMANDS = ("train", "sft", "eval", "rollout", "view", "model", "recipes", "doctor")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a mistake or fault, 2 for usage, 130 after
    Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if given else 2
    name, rest = given[0], given[1:]
    if name not in COMMANDS:
        print(
            f"error: Unknown command {name!r}: expected one of {', '.join(COMMANDS)}.",
            file=sys.stderr,
        )
        return 2
    if "" not in sys.path:
        sys.path.insert(0, "")  # as python -m does: `--env.name my_module:MyEnv` of this folder
    try:
        from hero import commands  # here: it imports torch and transformers, which takes seconds
        from hero.console import Console
    except ImportError as missing:
        print(
            f"error: {missing}. Install what hero needs: pip install 'hero-kernels[train]'",
            file=sys.stderr,
        )
        return 1
    run = {"eval": commands.evaluate}.get(name) or getattr(commands, name)
    try:
        run(rest, Console())
    except KeyboardInterrupt as interrupt:
        Console(sys.stderr).error("Interrupted.", str(interrupt))
        return 130
    except commands.MISTAKES as mistake:
        Console(sys.stderr).error(str(mistake), "\n".join(getattr(mistake, "__notes__", [])))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
