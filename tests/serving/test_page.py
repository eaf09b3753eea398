"""The page of the proxy in a browser: shares of the variants and the last decisions."""

import httpx
from serving_stubs import Two, Upstream, serving

from router.serving.proxy import Proxy


def proxy(**how):
    """A proxy of a stub, in a thread."""
    how["transport"] = httpx.ASGITransport(Upstream().app)
    return serving(Proxy(Two(), "http://upstream", **how).app)


def test_the_page_shows_who_answered_and_how_sure_it_was(browser):
    page, wrong = browser.new_page(), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    with proxy() as address:
        page.goto(address)
        assert page.inner_text("#summary") == "No request yet." and not page.is_visible("#shares")
        for prompt in ("x", "x too", "<b>y</b>"):
            body = {"model": "auto", "prompt": prompt}
            httpx.post(f"{address}/v1/completions", json=body).raise_for_status()
        page.reload()
        page.wait_for_selector("#rows tr")
        assert [row.inner_text().split("\t")[1:] for row in page.query_selector_all("#rows tr")] == [
            ["the-base (no adapter fits)", "base 0.60, one 0.40", "0.10"],
            ["variant-0", "one 0.90, base 0.10", "2.00"],
            ["variant-0", "one 0.90, base 0.10", "2.00"],
        ]
        shares = [row.inner_text().split("\t") for row in page.query_selector_all("#shares tbody tr")]
        assert shares == [["variant-0", "2", "67 %"], ["the-base", "1", "33 %"]]
        assert "33 % left to the base model" in page.inner_text("#summary")
        assert not page.is_visible("#ask")
        page.close()
    assert wrong == []


def test_the_page_asks_for_the_key_and_keeps_it_to_itself(browser):
    def ask(prompt):
        body, own = {"model": "auto", "prompt": prompt}, {"authorization": "Bearer secret"}
        httpx.post(f"{address}/v1/completions", json=body, headers=own).raise_for_status()

    with proxy(api_key="secret") as address:
        ask("x")
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("#ask")
        for key in ("wrong", "secret"):
            assert page.query_selector("#rows tr") is None
            page.fill("#key", key)
            page.press("#key", "Enter")
            page.wait_for_selector("#rows tr" if key == "secret" else "text=This is not the API key.")
        assert not page.is_visible("#ask")
        ask("y")
        page.wait_for_selector("#rows tr:nth-child(2)")  # it goes on looking
        kept = page.evaluate("[localStorage.length, sessionStorage.length, document.cookie, location.href]")
        assert kept == [0, 0, "", f"{address}/"]
        page.reload()
        page.wait_for_selector("#ask")
        page.close()
