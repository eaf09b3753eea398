"""A saved router of prompts and of a chat, fitted once for all tests of a file."""

import shutil

import pytest

from helpers import CHAT, PLAIN, PROMPTS
from router.api import Router


@pytest.fixture(scope="module")
def fitted(fit_and_save, tmp_path_factory):
    template = tmp_path_factory.mktemp("chats") / "template.jinja"
    template.write_text(PLAIN)
    return fit_and_save([*PROMPTS[:3], CHAT], chat_template=template, false_positive_rate=0.9)


@pytest.fixture()
def saved(fitted, tmp_path):
    return Router.load(shutil.copytree(fitted, tmp_path / "saved"), device="cpu")
