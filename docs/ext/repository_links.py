# SPDX-License-Identifier: Apache-2.0
"""Links and files are the repository's: each works on the site as it does there.

A link to a file that a page includes leads to that page, one to any other file to a
copy of it; and links in an included file are relative to that file.
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
    """The page, by its Sphinx name, of each file that one includes."""
    pages = {}
    for page in source.rglob("*.md"):
        name = page.relative_to(source).with_suffix("").as_posix()
        for included in INCLUDE.findall(page.read_text()):
            pages[(page.parent / included).resolve()] = name
    return pages


class RepositoryLinks(SphinxTransform):
    """Before downloads are collected and MyST looks for what links name."""

    default_priority = 500

    def apply(self) -> None:
        """Resolves the links that MyST took for none of a page's."""
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
        """The file that a link of MyST names and is no page, and what follows the #."""
        if node.get("reftype") != "myst" or node["reftarget"] in self.env.found_docs:
            return None, ""
        path = node["reftarget"]
        if node["refdomain"] == "doc":  # outside of docs/; MyST took the suffix off
            path, fragment = path + ".md", node["reftargetid"]
        else:
            path, _, fragment = path.partition("#")
        file = (Path(node.source or self.document["source"]).parent / path).resolve()
        return (file if path and file.is_file() else None), fragment

    def serve(self, node: nodes.Element, file: Path) -> None:
        """A copy of the file goes into the site, and the link to it."""
        folder = Path(self.env.doc2path(self.env.docname)).parent
        target = os.path.relpath(file, folder)
        node.replace_self(
            addnodes.download_reference(
                "", "", *node.children, reftarget=target, refdoc=self.env.docname
            )
        )


def setup(app: Sphinx) -> dict[str, bool]:
    """For Sphinx."""
    app.add_transform(RepositoryLinks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
