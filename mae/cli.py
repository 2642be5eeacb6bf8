"""The program `mae`: listens for signals before it loads what takes seconds to load."""

import sys
from collections.abc import Sequence

from mae import signals

TRAINING = ("pretrain", "probe", "finetune")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code, as `commands.run` does."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] and args[0] in TRAINING:
        signals.note_early()
    from mae.commands import run

    return run(args)


if __name__ == "__main__":
    sys.exit(main())
