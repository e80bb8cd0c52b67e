"""Markup by construction: a string that is not markup already is escaped when it becomes part of it."""

from __future__ import annotations

import html


class Html(str):
    """Finished markup. Any other string is escaped when it becomes a child."""

    __slots__ = ()


def el(tag: str, *children: str, **attributes: str) -> Html:
    """An element; ``class_`` and ``aria_label`` stand for class and aria-label."""
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for name, value in attributes.items()
    )
    inner = "".join(child if isinstance(child, Html) else html.escape(child) for child in children)
    return Html(f"<{tag}{given}>{inner}</{tag}>")
