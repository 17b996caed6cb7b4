"""Draw the folders of jaxcomm and their imports into docs/architecture.md.

python docs/draw_architecture.py; a test compares the page with what this would write.
"""

from __future__ import annotations

from pathlib import Path

import grimp

PAGE = Path(__file__).with_name("architecture.md")
BEGIN, END = "<!-- made by draw_architecture.py -->\n", "<!-- until here -->\n"
# What nearly everything imports would hide the rest.
LEFT_OUT = {"errors", "compat", "plots", "terminal", "__main__"}


def arrows() -> list[tuple[str, str]]:
    """Imports between folders, without those that a longer way says already."""
    graph = grimp.build_graph(
        "jaxcomm", exclude_type_checking_imports=True, cache_dir=None
    )
    folders = sorted(
        name.removeprefix("jaxcomm.") for name in graph.find_children("jaxcomm")
    )
    for folder in folders:
        graph.squash_module(f"jaxcomm.{folder}")
    below = {
        folder: {
            name.removeprefix("jaxcomm.")
            for name in graph.find_modules_directly_imported_by(f"jaxcomm.{folder}")
        }
        - LEFT_OUT
        - {"jaxcomm", folder}
        for folder in folders
        if folder not in LEFT_OUT
    }

    def reached(folder: str) -> set[str]:
        found = set(below[folder])
        for name in below[folder]:
            found |= reached(name)
        return found

    return [
        (folder, name)
        for folder in below
        for name in sorted(below[folder])
        if not any(name in reached(other) for other in below[folder] - {name})
    ]


def picture() -> str:
    """The arrows as a Mermaid block."""
    lines = [f"  {above} --> {below}" for above, below in arrows()]
    return "\n".join(["```mermaid", "flowchart TD", *lines, "```", ""])


def page(text: str) -> str:
    """The page with a fresh picture."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return before + BEGIN + picture() + END + after


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
