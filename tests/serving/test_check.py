"""`proto-route check`: what can be served passes, what cannot is named."""

import shutil

import pytest

from helpers import edit_json
from router.cli import main


@pytest.fixture(params=["run", "router"])
def folder(request, command, router_of, tmp_path):
    if request.param == "run":
        return command("proto_route", "--false_positive_rate", 0.9)[1]
    router = router_of(false_positive_rate=0.9)
    return router.fit(["What is two and two?", "Bonjour"]).save(tmp_path / "saved")


def damaged(folder):
    file = next((folder / "variants").glob("*/adapter_model.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")


def rescaled(folder):
    edit_json(next((folder / "variants").glob("*/adapter_config.json")), lora_alpha=400)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (damaged, "variants"),
        (rescaled, "variants"),
        (lambda folder: shutil.rmtree(folder / "variants"), "variants"),
        (shutil.rmtree, ""),
    ],
)
def test_what_can_be_served_is_told_and_what_cannot_is_refused(folder, capsys, spoil, named):
    assert main(["check", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "3 adapters" in said and "variant-0-" in said
    spoil(folder)
    assert main(["check", str(folder)]) == 2
    assert str(folder / named) in capsys.readouterr().err
