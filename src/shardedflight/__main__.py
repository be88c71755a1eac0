"""The command line: `shardedflight demo`, `shardedflight bench`.

Standard library only: it has to run without the extras in order to say which one is missing. Each
command is a package with a module `command`, whose `main(arguments)` returns the exit status, and
an extra of the same name.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

_COMMANDS = {
    "demo": "a stampede on a real HTTP server, without and with a flight",
    "bench": "what a flight costs, as ratios measured within one run",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments name and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="shardedflight",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"  {name:<8}{what}" for name, what in _COMMANDS.items()),
    )
    parser.add_argument("command", choices=_COMMANDS, help="what to run; COMMAND --help says more:")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    try:
        command = import_module(f"shardedflight.{chosen.command}.command")
        status: int = command.main(chosen.arguments)
    except ModuleNotFoundError as missing:
        package = (missing.name or "shardedflight").partition(".")[0]
        if package == "shardedflight":
            raise
        sys.stderr.write(
            f"shardedflight {chosen.command} needs {package}, which is not installed: "
            f'pip install "shardedflight[{chosen.command}]"\n'
        )
        return 1
    except KeyboardInterrupt:
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
