"""`python -m proof.fuzz.guided`: one target, with cases that atheris mutates to reach new branches.

Needs `pip install atheris`, which has wheels for Linux and some versions of Python; so it is not
among what the tests install. Most is found by the random cases of `make fuzz`; this one goes on
where they no longer come to anything new.
"""

import argparse
import importlib
import logging
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """The program. Ends the process: with an exit code that is not 0 if a fault was found."""
    parser = argparse.ArgumentParser(prog="python -m proof.fuzz.guided", description=__doc__)
    parser.add_argument("--target", required=True, help="python -m proof.fuzz --list names them")
    parser.add_argument("--seconds", type=int, default=60, help="how long to look (60)")
    arguments = parser.parse_args()
    try:
        atheris: Any = importlib.import_module("atheris")
    except ImportError:
        parser.error("atheris is not installed")
    with atheris.instrument_imports(include=["shardedflight"]):
        program = importlib.import_module("proof.fuzz.__main__")
        targets = {target.name: target for target in program.targets()}
    if arguments.target not in targets:
        parser.error(f"there is no target {arguments.target!r}")
    logging.getLogger("shardedflight").disabled = True
    check: Any = targets[arguments.target].bound(100)
    found = Path("build", "fuzz")
    found.mkdir(parents=True, exist_ok=True)
    options = [f"-max_total_time={arguments.seconds}", f"-artifact_prefix={found}/"]
    atheris.Setup([sys.argv[0], *options], check.hypothesis.fuzz_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
