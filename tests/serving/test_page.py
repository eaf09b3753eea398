"""The page of the front in a browser: shares of the variants and the last decisions."""

import pytest

httpx = pytest.importorskip("httpx", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")

from serving_stubs import Two, Upstream, serving  # noqa: E402

from router.serving.front import Front  # noqa: E402


@pytest.fixture()
def address():
    """A front of a stub, in a thread."""
    with serving(Front(Two(), "http://upstream", transport=httpx.ASGITransport(Upstream().app)).app) as found:
        yield found


def test_the_page_shows_who_answered_and_how_sure_it_was(address, browser):
    for prompt in ("x", "x too", "<b>y</b>"):
        httpx.post(f"{address}/v1/completions", json={"model": "auto", "prompt": prompt}).raise_for_status()
    page, wrong = browser.new_page(), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#rows tr")
    assert [row.inner_text().split("\t")[1:] for row in page.query_selector_all("#rows tr")] == [
        ["the-base (no adapter fits)", "base 0.60, one 0.40", "0.10"],
        ["variant-0", "one 0.90, base 0.10", "2.00"],
        ["variant-0", "one 0.90, base 0.10", "2.00"],
    ]
    shares = [row.inner_text().split("\t") for row in page.query_selector_all("#shares tbody tr")]
    assert shares == [["variant-0", "2", "67 %"], ["the-base", "1", "33 %"]]
    assert "33 % left to the base model" in page.inner_text("#summary")
    page.close()
    assert wrong == []


def test_before_the_first_request_the_page_says_so(address, browser):
    page = browser.new_page()
    page.goto(address)
    assert page.inner_text("#summary") == "No request yet." and not page.is_visible("#shares")
    page.close()
