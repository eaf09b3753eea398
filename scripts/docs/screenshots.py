"""Pictures of a finished run's report, for the docs: `python -m scripts.docs.screenshots output 117`.

Takes the page in light and dark, wide and narrow, and for one query what docs/reading-a-run.md walks through.
Needs Chromium, and playwright from the extra `test`.
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

PICTURES = Path("docs/img")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def opened(browser: Any, report: Path, width: int, scheme: str = "light") -> Any:
    """The report in a window of that width."""
    window = {"width": width, "height": 2000}
    page = browser.new_page(viewport=window, color_scheme=scheme, reduced_motion="reduce")
    page.goto(report.resolve().as_uri())
    page.wait_for_selector("#rows tr")
    return page


def walk(page: Any, name: str) -> None:
    """What the page tells of one query: its mark in the map, and its row in the table, opened."""
    page.fill("#by-text", name)
    openers = page.locator("#rows .opener")
    texts = [text.strip() for text in openers.all_inner_texts()]
    if name not in texts:
        sys.exit(f"expected the id of a query of the run, got {name!r}")
    number = openers.nth(texts.index(name)).get_attribute("data-toggle")
    page.focus("#map")
    for key in ["Home"] + ["PageDown"] * texts.index(name):
        page.keyboard.press(key)
    _shot(page, "walk-map.png", "#map", "#shown")
    page.locator(f'[data-toggle="{number}"]').click()
    _shot(page, "walk-why.png", f'tr[data-row="{number}"]', f"#why-{number}")
    _shot(page, "walk-variants.png", "#variants-title", "#variants .grid")
    top = page.locator(f'tr[data-row="{number}"] td:nth-child(4)').inner_text().strip()
    group = page.locator("#layers-group option", has_text=top).first.get_attribute("value")
    page.select_option("#layers-group", group)
    _shot(page, "walk-layers.png", "#layers")


def _shot(page: Any, name: str, *parts: str) -> None:
    """A picture of the rectangle around elements, with a margin of 8 pixels."""
    boxes = [page.locator(part).bounding_box() for part in parts]
    left, top = max(0, min(box["x"] for box in boxes) - 8), min(box["y"] for box in boxes) - 8
    sides = ("x", "width"), ("y", "height")
    right, bottom = (max(box[at] + box[size] for box in boxes) + 8 for at, size in sides)
    scrolled = page.evaluate("window.scrollY")  # the picture is of the whole page, the boxes of the window
    clip = {"x": left, "y": top + scrolled, "width": right - left, "height": bottom - top}
    page.screenshot(path=PICTURES / name, clip=clip, full_page=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("output", type=Path, help="the output folder of a finished run")
    parser.add_argument("id", help="a query's id")
    args = parser.parse_args()
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("expected Chromium, found none; install it")
    PICTURES.mkdir(parents=True, exist_ok=True)
    report = args.output / "report.html"
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=FLAGS)
        for scheme in ("light", "dark"):
            for width in (1280, 390):
                page = opened(browser, report, width, scheme)
                page.screenshot(path=PICTURES / f"report-{scheme}-{width}.png")
        walk(opened(browser, report, 1280), args.id)
        browser.close()


if __name__ == "__main__":
    main()
