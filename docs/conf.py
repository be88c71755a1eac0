"""How Sphinx makes pages of these documents: `make docs`."""

import os
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "src"), str(HERE / "_extensions")]
# The plain core is the source of both: it has the signatures and docstrings.
os.environ["SHARDEDFLIGHT_PURE"] = "1"

PROJECT = tomllib.loads((HERE.parent / "pyproject.toml").read_text("utf-8"))["project"]

project = "ShardedFlight"
version = release = PROJECT["version"]
html_title = f"{project} {release}"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "measured"]
exclude_patterns = ["_*"]

# Markdown as GitHub shows it: these documents are read there as well.
myst_heading_anchors = 4

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False

# The reference: one entry for each public name, in the order of the source.
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
# In a docstring `x` is code, and a link where it names something of this project.
default_role = "py:obj"

# Every reference has to lead somewhere. What may not is what other projects document, which nobody
# is asked for (the build needs no internet), and code in backticks that is no name.
nitpicky = True
nitpick_ignore_regex = [
    ("py:obj", r".*"),
    ("py:.*", r"(asyncio|collections|concurrent|contextlib|functools|types|typing)\..*"),
    ("py:.*", r"(httpx|opentelemetry|os|prometheus_client|redis)\..*"),
    # What `coalesce` returns is a function to its users: see decorator.md.
    ("py:class", r"shardedflight\._coalesce\.(Coalesced|Decorator)"),
    # An observed execution's and a backend's own.
    ("py:class", r"Subscription|shardedflight\.backends\.redis\._Request"),
    # Type variables.
    ("py:class", r"(shardedflight\.[\w.]+\.)?(K|P|P2|R|R2|S|T|V|AppT|TransportT)"),
]

# `make docs-links`: whether the pages exist; many sites make their anchors by script.
linkcheck_anchors = False
linkcheck_timeout = 20
