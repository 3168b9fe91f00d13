# SPDX-License-Identifier: Apache-2.0
"""Make links between files of the repository work on the site too.

A link to a file that a page includes leads to that page. A link to any other file leads
to a copy of it. Links in an included file are relative to that file.
"""

import os
import re
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

INCLUDE = re.compile(r"^[`:]{3,}\{include\} (\S+)$", re.MULTILINE)


def pages_of_files(source: Path) -> dict[Path, str]:
    """Return the Sphinx name of the page that includes each included file."""
    pages = {}
    for page in source.rglob("*.md"):
        name = page.relative_to(source).with_suffix("").as_posix()
        for included in INCLUDE.findall(page.read_text()):
            pages[(page.parent / included).resolve()] = name
    return pages


class RepositoryLinks(SphinxTransform):
    """Runs before Sphinx collects downloads and MyST resolves its references."""

    default_priority = 500

    def apply(self) -> None:
        """Resolve links to files that are not pages."""
        pages = pages_of_files(Path(self.env.srcdir))
        for node in list(self.document.findall(addnodes.pending_xref)):
            file, fragment = self.target(node)
            if file is None:
                continue
            page = pages.get(file) or self.env.path2doc(file)
            if page in self.env.found_docs:
                node["refdomain"] = "doc"
                node["reftarget"] = page
                node["reftargetid"] = fragment or None
            else:
                self.serve(node, file)

    def target(self, node: nodes.Element) -> tuple[Path | None, str]:
        """Return the file that a MyST link names (None for a page) and the fragment."""
        if node.get("reftype") != "myst" or node["reftarget"] in self.env.found_docs:
            return None, ""
        path = node["reftarget"]
        if node["refdomain"] == "doc":  # outside docs/, where MyST removed the suffix
            path, fragment = path + ".md", node["reftargetid"]
        else:
            path, _, fragment = path.partition("#")
        file = (Path(node.source or self.document["source"]).parent / path).resolve()
        return (file if path and file.is_file() else None), fragment

    def serve(self, node: nodes.Element, file: Path) -> None:
        """Copy the file into the site and link to the copy."""
        folder = Path(self.env.doc2path(self.env.docname)).parent
        target = os.path.relpath(file, folder)
        node.replace_self(
            addnodes.download_reference(
                "", "", *node.children, reftarget=target, refdoc=self.env.docname
            )
        )


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the transform to Sphinx."""
    app.add_transform(RepositoryLinks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
