"""`python -m shardedflight.bench`: the same as `shardedflight bench`."""

import sys

try:
    from shardedflight.bench.command import main
except ModuleNotFoundError as missing:
    package = (missing.name or "shardedflight").partition(".")[0]
    if package == "shardedflight":
        raise
    sys.exit(
        f"shardedflight.bench needs {package}, which is not installed: "
        f'pip install "shardedflight[bench]"'
    )

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
