"""Settings: what is read is what was written, and a value that one does not take is refused by its flag."""

import json
from itertools import product
from pathlib import Path

import pytest

from router.main import _settings, parser
from router.settings import Settings, kinds
from router.system.errors import InputError

OTHERS = Settings(
    (Path("a.csv"), Path("b.csv")), Path("out"), ("x", "y@1"), "some/base", Path("t.jinja"), "Q: {input}",
    True, 3, 8, 0.5, 1, 0.01, seed=7, batch_size=2, device="cpu", dtype="float16", device_map="auto",
    apply="beside", max_gen_len=9, max_seq_len=99, scoring="kit",
)  # fmt: skip


@pytest.mark.parametrize("settings", [Settings(), OTHERS])
def test_settings_come_back_from_json(settings):
    assert Settings.from_plain(json.loads(json.dumps(settings.plain()))) == settings


def test_what_no_version_knows_goes_what_is_missing_is_named():
    values = Settings().plain()
    assert Settings.from_plain(values | {"an_older_one": 3}) == Settings()
    for name, default in values.items():
        others = {key: value for key, value in values.items() if key != name}
        if default is None:
            assert Settings.from_plain(others) == Settings()
            continue
        with pytest.raises(ValueError, match=name):
            Settings.from_plain(others)


ENDS = [
    ("seed", 1 << 31), ("n_variants", 0), ("max_gen_len", 1 << 31), ("temperature", 0.0),
    ("temperature", float("inf")), ("false_positive_rate", 5e-324), ("false_positive_rate", 1.0),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"), [*ENDS, *product(kinds(), [object(), b"", [], (7,), -1, float("nan")])]
)
def test_a_value_that_a_setting_refuses_is_named_by_its_flag(name, value):
    with pytest.raises(InputError, match=f"--{name}: "):
        Settings(**{name: value})


def test_a_list_that_is_given_twice_adds_up():
    words = ["-m", "base", "--adapters", "a", "b", "--seed", "1", "--adapters", "c"]
    assert _settings(parser().parse_args(words)) == Settings(adapters=("a", "b", "c"), seed=1)
    assert _settings(parser().parse_args(["-m", "base"])) == Settings()


def test_the_name_of_a_flag_in_0_1_is_understood():
    words = ["-m", "base", "--false_alarm", "0.2"]
    assert parser().parse_args(words).false_positive_rate == 0.2


@pytest.mark.parametrize("name", kinds())
def test_the_help_shows_a_default_that_its_flag_takes(name):
    (flag,) = [action for action in parser()._actions if action.dest == name]
    shown, default = flag.help.rpartition("(default: ")[2][:-1], getattr(Settings(), name)
    if name != "skip_bad":
        value = flag.type(shown)
        assert value == default or (value,) == default
