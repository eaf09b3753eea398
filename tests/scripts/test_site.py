"""The API pages: every module has one, and building them warns of nothing (warnings are errors here)."""

import re

import pytest

from helpers import ROOT

pytest.importorskip("pdoc", reason="pdoc is not installed")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    from scripts.docs.site import build

    folder = tmp_path_factory.mktemp("site")
    build(folder, show_source=False)
    return folder


def test_every_module_has_a_page(site):
    files = [file for package in ("router", "merge") for file in (ROOT / package).rglob("*.py")]
    expected = {
        str(file.relative_to(ROOT).with_suffix(".html")).replace("/__init__.html", ".html")
        for file in files
        if file.name != "__main__.py" and file.parent.name != "integrations"
    }
    pages = {str(page.relative_to(site)) for page in site.rglob("*.html")}
    assert pages == expected | {"index.html"}


def test_pages_show_docstrings_types_and_what_is_found_on_first_use(site):
    factors = (site / "merge" / "factors.html").read_text("utf-8")
    assert "Eckart-Young" in factors and "ForwardRef" not in factors
    start = (site / "router.html").read_text("utf-8")
    assert re.search(r'id="Router"', start) and "from_library" in start


def test_nothing_of_it_stays_in_the_package(site):
    import router

    assert "__version__" not in vars(router)
