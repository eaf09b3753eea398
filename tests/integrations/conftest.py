"""A saved router of prompts and of a chat."""

import pytest

from helpers import CHAT, PLAIN, PROMPTS
from router.api import Router


@pytest.fixture()
def saved(saved_of, tmp_path):
    (tmp_path / "template.jinja").write_text(PLAIN)
    how = {"chat_template": tmp_path / "template.jinja", "false_positive_rate": 0.9}
    return Router.load(saved_of([*PROMPTS[:3], CHAT], **how), device="cpu")
