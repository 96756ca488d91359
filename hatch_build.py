"""README.md as the description of the package, which stands where none of its links within the project leads anywhere.

The project's address, once `[project.urls]` of pyproject.toml has one, makes them absolute; until then they are plain
text. `parity.report.cards` leads its links to the same address.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:)([^)\s]*)\)")
"""A picture or a link to a file, or to a heading of this page or another; not one that is absolute already."""

ADDRESSES = "Source", "Repository", "Homepage"


def described(readme: str, source: str = "") -> str:
    """The page with each link within the project led to `source`, or with its text alone; blocks of code as they are.

    A picture without an address is left out, with its line.
    """

    def led(found: re.Match[str]) -> str:
        picture, text, target = found.groups()
        if not source:
            return "" if picture else text
        view = "raw" if picture else "blob"
        file = f"README.md{target}" if target.startswith("#") else target
        return f"{picture}[{text}]({source.rstrip('/')}/{view}/main/{file})"

    parts = re.split(r"(^```.*?^```$)", readme, flags=re.MULTILINE | re.DOTALL)
    return "".join(p if p.startswith("```") else re.sub(r"\n{3,}", "\n\n", LINK.sub(led, p)) for p in parts)


class Description(MetadataHookInterface):
    """What hatchling asks for `dynamic = ["readme"]`."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Give it the page."""
        page = Path(self.root, "README.md").read_text(encoding="utf-8")
        urls = metadata.get("urls", {})
        text = described(page, next((urls[name] for name in ADDRESSES if name in urls), ""))
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
