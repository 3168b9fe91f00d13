# SPDX-License-Identifier: Apache-2.0
"""Link literals in text, such as `asgd` or `asgd(0.1)`, to the symbol they name."""

import re

from docutils import nodes
from public_symbols import public_symbols
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

NAMES = {s.rpartition(".")[2]: s for s in public_symbols()}
NAMES |= {symbol: symbol for symbol in NAMES.values()}
# A name, perhaps followed by one call.
LITERAL = re.compile(r"([\w.]+)(\(.*\))?")


class SymbolLinks(SphinxTransform):
    """Runs before Sphinx resolves references."""

    default_priority = 500

    def apply(self) -> None:
        """Wrap each such literal in a reference."""
        for node in list(self.document.findall(nodes.literal)):
            match = LITERAL.fullmatch(node.astext())
            symbol = match and NAMES.get(match[1])
            if not symbol or self.is_linked(node):
                continue
            reference = addnodes.pending_xref(
                "", node.deepcopy(), refdomain="py", reftype="obj", reftarget=symbol
            )
            reference["refdoc"] = self.env.docname
            node.replace_self(reference)

    def is_linked(self, node: nodes.Node) -> bool:
        """Return whether the literal is in a link, a heading or a signature."""
        ends = (
            nodes.reference,
            addnodes.pending_xref,
            nodes.title,
            addnodes.desc_signature,
        )
        while node := node.parent:
            if isinstance(node, ends):
                return True
        return False


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the transform to Sphinx."""
    app.add_transform(SymbolLinks)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
