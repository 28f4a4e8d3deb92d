"""Pictures of one tree: as indented text, its leaves as a table, as an SVG or PNG, and as a page to walk about in; why.py: what they say of rules."""

from treerl.draw.page import Page, explore_tree
from treerl.draw.svg import Picture, draw_tree
from treerl.draw.text import TEXT_LEGEND, format_leaves, format_tree

__all__ = ["TEXT_LEGEND", "Page", "Picture", "draw_tree", "explore_tree", "format_leaves", "format_tree"]
