"""The site that ``make docs`` built, in a browser: phone and desktop, light and dark."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.browser import BROWSER, layout_problems, screenshot
from tests.paths import ROOT

SITE = ROOT / "build" / "site"
BUILT = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("index.html"))
DECISIONS = [name for name in BUILT if name.startswith("decisions/")]
PAGES = [*(name for name in BUILT if name not in DECISIONS), *DECISIONS[::5]]  # these are all of a kind
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium here"),
    pytest.mark.skipif(not PAGES, reason="make docs builds the site"),
]


def test_every_page_fits_and_has_its_pictures(tmp_path: Path) -> None:
    assert len(PAGES) > 20
    assert layout_problems(SITE, PAGES, tmp_path) == []


def test_light_and_dark(tmp_path: Path) -> None:
    light = {}
    for is_dark in (False, True):
        screenshot(SITE / "index.html", tmp_path / f"{is_dark}.png", is_dark=is_dark)
        light[is_dark] = float(np.asarray(Image.open(tmp_path / f"{is_dark}.png").convert("L")).mean())
    assert light[True] < 80 < 180 < light[False]


def test_what_is_wrong_is_found(tmp_path: Path) -> None:
    (tmp_path / "wide.html").write_text("<p>text<div style='width:600px;height:1px'></div><img src='nowhere.png'>")
    (tmp_path / "empty.html").write_text("<p></p>")
    found = layout_problems(tmp_path, ["wide.html", "empty.html"], tmp_path)
    assert [problem.split("http")[0] for problem in found] == [
        "empty.html: empty", "wide.html at 390: 608 pixels wide", "wide.html: no ",
    ]  # fmt: skip
