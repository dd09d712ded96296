"""The entry point of ``broker``. Imports next to nothing, so that ``broker version`` and credential helpers start fast."""

import sys
from collections.abc import Sequence

EXIT_MISCONFIGURED = 78


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own); give the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        import click  # noqa: F401, PLC0415 - only to say what is missing
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        print(
            "error: the command line needs click, which is not installed\n"
            "hint: pip install 'identity-broker[agent]', or [server], or [all]; the SDK alone needs no command",
            file=sys.stderr,
        )
        return EXIT_MISCONFIGURED
    from broker.cli.root import run  # noqa: PLC0415 - needs click

    return run(given)


if __name__ == "__main__":
    sys.exit(main())
