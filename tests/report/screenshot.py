"""A picture of a report as Chromium shows it: `python -m tests.report.screenshot REPORT.html PICTURE.png`."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

from tests.report.chromium import Page, chromium

COLOURS = 255
"""Of the picture; more only make the file larger."""


def take(report: Path, picture: Path) -> None:
    """All plots of the report, light, in a window of 1200 pixels."""
    program = chromium()
    assert program is not None, "no Chromium; `make test-peers` unpacks Debian's"
    with Page(program, 1200, 1600) as page:
        page.call("Emulation.setScrollbarsHidden", hidden=True)
        page.prefer("light")
        page.open(report)
        height = page.run("document.getElementById('facts').getBoundingClientRect().top")
        page.screenshot(page.folder / "seen.png")
        with Image.open(page.folder / "seen.png") as seen:
            plots = seen.convert("RGB").crop((0, 0, seen.width, round(height)))
            plots.quantize(COLOURS, kmeans=2).save(picture, optimize=True)


if __name__ == "__main__":
    take(Path(sys.argv[1]), Path(sys.argv[2]))
