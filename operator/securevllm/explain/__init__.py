"""The picture for a person: one resource's pods, sockets, flows and routes, as text, Mermaid, HTML and JSON.

``view`` puts the topology into words once; the four forms say the same, because they are made from that one value.
Pure. Words that a user wrote are one printable line in every form: a reason with a line feed, a terminal's escape
sequence or a tag in it can forge nothing.

What is told is what the operator asks of the cluster, never a measurement.
"""

from __future__ import annotations

from securevllm.explain.lines import as_json, mermaid, text
from securevllm.explain.page import html
from securevllm.explain.words import UNSEEN, View, view

__all__ = ["UNSEEN", "View", "as_json", "html", "mermaid", "text", "view"]
