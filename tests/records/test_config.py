"""Settings: what a file and a command line say becomes typed values, and mistakes are named by key and place."""

import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import yaml

from rlhf_env.errors import ConfigError
from rlhf_env.records.config import Layer, build, documented, flat, override_layer, read_layer, to_dict


@dataclass(frozen=True)
class Inner:
    beta: float = 0.1  #: a coefficient
    stops: tuple[str, ...] = ()  #: where to end
    size: tuple[int, float] = (1, 2.0)
    where: Literal["token", "terminal"] = "token"


@dataclass(frozen=True)
class Outer:
    name: str  #: what it is called
    steps: int | None = None
    on: bool = False
    inner: Inner = field(default_factory=Inner)
    free: dict[str, Any] = field(default_factory=dict)


def built(**values: Any) -> Outer:
    return build(Outer, Layer("file.yaml", {"name": "x", **values}))


def overridden(*overrides: str) -> Outer:
    return build(Outer, Layer("file.yaml", {"name": "x"}), override_layer(overrides))


def test_a_setting_takes_the_type_of_its_annotation():
    config = built(
        steps="20", on="true", inner={"beta": "1e-4", "stops": ["a", "b"], "size": [3, 4], "where": "terminal"}
    )
    assert config == Outer("x", 20, True, Inner(1e-4, ("a", "b"), (3, 4.0), "terminal"))
    assert type(config.inner.size[1]) is float


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps=2e5", Outer("x", steps=200_000)),
        ("steps=none", Outer("x", steps=None)),
        ("on=True", Outer("x", on=True)),
        ("name=2024-01-01", Outer("2024-01-01")),
        ("name=none", Outer("none")),
        ("name=a=b", Outer("a=b")),
        ("inner.stops=[a, ' b']", Outer("x", inner=Inner(stops=("a", " b")))),
        ("inner={beta: 2, where: terminal}", Outer("x", inner=Inner(2.0, where="terminal"))),
        ("free.rate=3e-4", Outer("x", free={"rate": 3e-4})),
        ("free.deep.er=[1, two]", Outer("x", free={"deep": {"er": [1, "two"]}})),
    ],
)
def test_an_override_is_text_that_becomes_what_its_setting_is(override, expected):
    assert overridden(override) == expected


def test_later_layers_win_key_by_key():
    first = Layer(
        "first", {"name": "x", "steps": 1, "inner": {"beta": 1, "where": "terminal"}, "free": {"a": 1, "b": 2}}
    )
    second = Layer("second", {"steps": 2, "inner": {"beta": 2}, "free": {"b": 3}})
    assert build(Outer, first, second) == Outer("x", 2, False, Inner(2.0, where="terminal"), {"a": 1, "b": 3})


def test_a_section_without_settings_is_an_empty_one():
    defaults = build(Outer, Layer("file.yaml", {"name": "x"}))
    assert build(Outer, Layer("file.yaml", {"name": "x", "inner": None, "free": None})) == defaults


def test_flat_settings_have_dotted_names():
    assert flat({"a": {"b": {"c": 1}, "d": []}, "e": None}) == {"a.b.c": 1, "a.d": [], "e": None}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stepz": 1}, "file.yaml: there is no setting stepz; did you mean steps?"),
        ({"inner": {"betta": 1}}, "file.yaml: there is no setting inner.betta; did you mean inner.beta?"),
        ({"beta": 1}, "file.yaml: there is no setting beta; did you mean inner.beta?"),
        ({"qqq": 1}, "file.yaml: there is no setting qqq; there are name, steps, on, free"),
        ({"steps": 1.5}, "file.yaml: steps must be a whole number or none, it is 1.5"),
        ({"steps": True}, "file.yaml: steps must be a whole number or none, it is True"),
        ({"on": 1}, "file.yaml: on must be true or false, it is 1"),
        ({"name": 3}, "file.yaml: name must be a text, it is 3"),
        ({"inner": 3}, "file.yaml: inner must be a mapping of settings, it is 3"),
        ({"inner": {"beta": "x"}}, "file.yaml: inner.beta must be a finite number, it is 'x'"),
        ({"inner": {"beta": float("nan")}}, "file.yaml: inner.beta must be a finite number, it is nan"),
        ({"inner": {"beta": None}}, "file.yaml: inner.beta must be a finite number, it is None"),
        ({"inner": {"stops": "ab"}}, "file.yaml: inner.stops must be a list, it is 'ab'"),
        ({"inner": {"stops": ["a", 2]}}, "file.yaml: inner.stops[1] must be a text, it is 2"),
        ({"inner": {"size": [1]}}, "file.yaml: inner.size must be a list of 2, it is [1]"),
        ({"inner": {"where": "tokn"}}, "inner.where must be one of token, terminal, it is 'tokn'; did you mean token?"),
        ({"free": [1]}, "file.yaml: free must be a mapping, it is [1]"),
    ],
)
def test_a_mistake_is_named_by_its_place_and_key(values, message):
    with pytest.raises(ConfigError) as caught:
        built(**values)
    assert message in str(caught.value)


def test_a_missing_setting_is_named():
    with pytest.raises(ConfigError, match="setting agent.name is missing"):
        build(Outer, prefix="agent.")


@pytest.mark.parametrize("override", ["beta", "=3", "inner.=3", ".beta=3"])
def test_an_override_without_key_or_value_is_refused(override):
    with pytest.raises(ConfigError, match="write KEY=VALUE"):
        override_layer([override])


def test_plain_data_from_a_config_builds_an_equal_one():
    config = Outer(
        "x", 5, True, Inner(1e-05, ("a", "none"), (7, 0.5), "terminal"), {"n": {"m": [1, "2"]}, "text": "1e-4"}
    )
    plain = to_dict(config)
    assert plain["inner"] == {"beta": 1e-05, "stops": ["a", "none"], "size": [7, 0.5], "where": "terminal"}
    assert build(Outer, Layer("again", yaml.safe_load(yaml.safe_dump(plain)))) == config


def test_a_file_may_write_numbers_without_a_point(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_bytes(b"\xef\xbb\xbfname: x\nfree: {rate: 1e-4, word: 1e-4x}\n")
    assert build(Outer, read_layer(file)) == Outer("x", free={"rate": 0.0001, "word": "1e-4x"})


def test_an_empty_file_says_nothing(tmp_path):
    (tmp_path / "a.yaml").write_text("# nothing\n")
    assert read_layer(tmp_path / "a.yaml").values == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [x\n", "a.yaml:2: "),
        ("name: x\nsteps: 1\nname: y\n", "a.yaml:3: 'name' occurs twice"),
        ("- a\n", "a.yaml: a mapping of settings was expected"),
        ("name: !!python/object/apply:os.getcwd []\n", "a.yaml:1: "),
    ],
)
def test_a_broken_file_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_layer(tmp_path / "a.yaml")
    assert message in str(caught.value)


def test_a_missing_file_is_one_line():
    with pytest.raises(ConfigError, match=r"^nowhere/a\.yaml: No such file or directory$"):
        read_layer("nowhere/a.yaml")


def test_the_sentence_beside_a_setting_is_its_documentation():
    assert documented(Outer) == {
        "name": "what it is called",
        "steps": "",
        "on": "",
        "inner.beta": "a coefficient",
        "inner.stops": "where to end",
        "inner.size": "",
        "inner.where": "",
        "free": "",
    }


def test_reading_settings_needs_no_torch():
    code = "import sys, rlhf_env.records.config, rlhf_env.training.config; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_a_misspelt_section_is_recognised():
    with pytest.raises(ConfigError, match=r"there is no setting inne; did you mean inner\?"):
        build(Outer, Layer("file.yaml", {"name": "x", "inne": {"beta": 1}}))


# --- lists of settings -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Several:
    parts: tuple[Inner, ...] = ()  #: each with settings of its own


def test_a_list_may_hold_settings_each_with_its_defaults():
    layer = Layer("a file", {"parts": [{"beta": "0.5"}, {"stops": ["x"]}, None]})
    built = build(Several, layer)
    assert built == Several((Inner(beta=0.5), Inner(stops=("x",)), Inner()))
    assert build(Several, Layer("again", to_dict(built))) == built
    assert build(Several, override_layer(["parts=[{beta: 1e-2}]"])) == Several((Inner(beta=0.01),))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{}, {"betta": 1}], r"f: there is no setting parts\[1\]\.betta; did you mean parts\[1\]\.beta\?"),
        ([{"beta": "x"}], r"f: parts\[0\]\.beta must be a finite number, it is 'x'"),
        ([3], r"f: parts\[0\] must be a mapping of settings, it is 3"),
        ({"beta": 1}, "f: parts must be a list"),
    ],
)
def test_mistakes_in_a_list_are_named_by_their_place(parts, message):
    with pytest.raises(ConfigError, match=message):
        build(Several, Layer("f", {"parts": parts}))
