"""The directive `measured`: what `make bench` has kept below docs/measured, as it was kept.

Each folder there is one run's: figures.json, and the plots that it made.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

#: What a plot shows, by the name of its file; they are shown in this order.
PLOTS = {
    "ratios.png": "Times, as multiples of the floor",
    "memory.png": "Memory beyond the floor",
    "curves.png": "How the figures grow",
    "scaling.png": "Threads and shards",
}


def in_words(around: Mapping[str, Any]) -> str:
    """Says where it was measured."""
    build = ", free-threaded" if around["free_threaded"] else ""
    return (
        f"{around['implementation']} {around['python']}{build}, {around['form']} core, "
        f"{around['cores']} cores of {around['processor']}"
    )


class Measured(SphinxDirective):
    """Shows the plots of every run that is kept."""

    def run(self) -> list[nodes.Node]:
        """The plots, below a line that says where they were measured."""
        folder = Path(self.env.srcdir) / "measured"
        shown: list[nodes.Node] = []
        for kept in sorted(folder.glob("*/figures.json")):
            self.env.note_dependency(str(kept))
            shown += self.run_of(kept)
        return shown or [nodes.paragraph(text="No run is kept here.")]

    def run_of(self, kept: Path) -> list[nodes.Node]:
        """One run."""
        figures = json.loads(kept.read_text(encoding="utf-8"))
        measured = f"{in_words(figures['surroundings'])}, by {figures['command']}"
        shown: list[nodes.Node] = [nodes.rubric(text=measured)]
        for name, shows in PLOTS.items():
            if (plot := kept.with_name(name)).exists():
                path = plot.relative_to(self.env.srcdir).as_posix()
                figure = nodes.figure("", nodes.image(uri=f"/{path}", alt=shows))
                figure += nodes.caption(text=shows)
                shown.append(figure)
        return shown


def setup(app: Sphinx) -> dict[str, bool]:
    """Makes the directive known to Sphinx."""
    app.add_directive("measured", Measured)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
