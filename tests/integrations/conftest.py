"""A saved router of prompts and of a chat, fitted once for all tests of a file."""

import shutil

import pytest

from helpers import CHAT, PLAIN, PROMPTS, write_tiny_library
from router.api import Router


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, tiny_base):
    folder = tmp_path_factory.mktemp("fitted")
    (folder / "template.jinja").write_text(PLAIN)
    how = {"base_model": str(tiny_base), "device": "cpu", "dtype": "float32", "false_positive_rate": 0.9}
    library = write_tiny_library(folder / "library")
    router = Router.from_library(library, chat_template=folder / "template.jinja", **how)
    return router.fit([*PROMPTS[:3], CHAT]).save(folder / "saved")


@pytest.fixture()
def saved(fitted, tmp_path):
    return Router.load(shutil.copytree(fitted, tmp_path / "saved"), device="cpu")
