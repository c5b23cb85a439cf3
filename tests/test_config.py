"""Settings: strict types, one-line errors with the nearest key, presets, overrides, differences."""

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from dalle import config
from dalle.config import Config, differences, load_preset, override, validate


class Codes(Config):
    n_codes: int = Field(ge=1)
    quantizer: Literal["gumbel", "fsq"] = "fsq"
    fsq_levels: tuple[int, ...] = ()


class Layers(Config):
    n_layers: int = Field(ge=1)
    layers: Literal["paper", "dense"] | tuple[str, ...] = "paper"
    dropout: float = 0.0
    is_reversible: bool = False

    @model_validator(mode="after")
    def _check_order(self) -> "Layers":
        if isinstance(self.layers, tuple) and len(self.layers) != self.n_layers:
            raise ValueError(f"layers names {len(self.layers)} of {self.n_layers} layers")
        return self


class Run(Config):
    seed: int = 0
    note: str = ""
    dvae: Codes
    transformer: Layers | None = None
    extra: dict[str, Codes] = Field(default_factory=dict)


SETTINGS = "the settings are seed, note, dvae, transformer, extra"
GOOD: dict[str, Any] = {"dvae": {"n_codes": 64, "fsq_levels": [4, 4, 4]}, "transformer": {"n_layers": 2}}


def error_of(tree: Any, source: str = "preset tiny") -> str:
    with pytest.raises(ValueError) as caught:
        validate(Run, tree, source)
    message = str(caught.value)
    assert not isinstance(caught.value, ValidationError) and message.isprintable()
    return message


@pytest.fixture
def presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tiny.toml").write_text("seed = 3\n[dvae]\nn_codes = 64\n")
    (tmp_path / "laptop.toml").write_text("seed = 4\n")
    (tmp_path / "notes.txt").write_text("no preset")
    monkeypatch.setattr(config, "_preset_folder", lambda: tmp_path)
    return tmp_path


def test_a_valid_tree_becomes_a_frozen_record() -> None:
    run = validate(Run, GOOD, "preset tiny")
    assert run.dvae.fsq_levels == (4, 4, 4)
    with pytest.raises(ValidationError):
        run.dvae.n_codes = 3


def test_a_record_survives_the_round_trip_through_json() -> None:
    run = validate(Run, GOOD | {"extra": {"a": {"n_codes": 1}}}, "preset tiny")
    assert validate(Run, run.model_dump(mode="json"), "config.json") == run


def test_an_int_is_fine_for_a_float_and_a_list_for_a_tuple() -> None:
    layers = Layers(n_layers=2, dropout=1, layers=["row", "conv"])  # type: ignore[arg-type]
    assert (layers.dropout, type(layers.dropout), layers.layers) == (1.0, float, ("row", "conv"))


@pytest.mark.parametrize("wrong", ["64", True, 64.0, None, [64]])
def test_an_int_comes_from_nothing_but_an_int(wrong: object) -> None:
    assert "dvae.n_codes = " in error_of({"dvae": {"n_codes": wrong}})
    assert error_of({"dvae": {"n_codes": wrong}}).endswith(": must be an integer")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"n_layers": 1, "dropout": True}, "transformer.dropout = true: must be a number"),
        ({"n_layers": 1, "dropout": ".5"}, 'transformer.dropout = ".5": must be a number'),
        (
            {"n_layers": 1, "dropout": float("nan")},
            "transformer.dropout = NaN: must be a finite number",
        ),
        ({"n_layers": 1, "is_reversible": 1}, "transformer.is_reversible = 1: must be true or false"),
        ({"n_layers": -1}, "transformer.n_layers = -1: must be greater than or equal to 1"),
        ({"n_layers": 1, "layers": 3}, "transformer.layers = 3: must be 'paper' or 'dense', or a list"),
        ({"n_layers": 2, "layers": ["row"]}, "transformer: layers names 1 of 2 layers"),
        ({}, "transformer.n_layers is missing"),
        (3, "transformer = 3: must be a table"),
    ],
)
def test_a_wrong_value_is_one_line_with_key_value_and_what_is_allowed(
    settings: object, expected: str
) -> None:
    assert error_of(GOOD | {"transformer": settings}, "laptop.toml") == f"laptop.toml: {expected}"


def test_an_item_of_a_list_is_named_by_its_index() -> None:
    line = error_of({"dvae": {"n_codes": 8, "fsq_levels": [4, "2"]}})
    assert line == 'preset tiny: dvae.fsq_levels[1] = "2": must be an integer'


def test_several_wrong_values_share_the_line() -> None:
    line = error_of({"seed": "a", "note": 3, "dvae": {}})
    assert line == (
        'preset tiny: seed = "a": must be an integer; note = 3: must be text in quotes; '
        "dvae.n_codes is missing"
    )
    assert error_of({"seed": "a", "note": 3, "dvae": {}, "extra": 3}).endswith(" (and 1 more)")


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"dvae": {"n_code": 64}}, "dvae.n_code is not a setting; did you mean dvae.n_codes?"),
        (GOOD | {"n_codes": 3}, "n_codes is not a setting; did you mean dvae.n_codes?"),
        (
            GOOD | {"optimizer_of_the_second_stage": {"n_layers": 1}},
            f"optimizer_of_the_second_stage is not a setting; {SETTINGS}",
        ),
        (GOOD | {"transformer": {"seed": 1}}, "transformer.seed is not a setting; did you mean transformer?"),
        (
            GOOD | {"x\ny": 1},
            f'"x\\ny" is not a setting; {SETTINGS}',
        ),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_valid_one(tree: object, expected: str) -> None:
    assert error_of(tree) == f"preset tiny: {expected}"


def test_a_tree_that_is_no_table_is_refused() -> None:
    assert error_of([1, 2], "config.json") == "config.json: must be a table"


def test_a_long_value_is_shortened_and_stays_on_one_line() -> None:
    line = error_of(GOOD | {"seed": "a\nb\u2028" + "x" * 1000})
    assert line.startswith('preset tiny: seed = "a\\nb\\u2028xx') and len(line) < 130


def test_override_parses_toml_values_and_takes_the_rest_as_text() -> None:
    assignments = ["dvae.n_codes=128", "dvae.quantizer=gumbel", "a.b.c = [1, 2]", "x=true", "y=1e-3", 'z="3"']
    assert override(GOOD, assignments) == {
        "dvae": {"n_codes": 128, "fsq_levels": (4, 4, 4), "quantizer": "gumbel"},
        "transformer": {"n_layers": 2},
        "a": {"b": {"c": (1, 2)}},
        "x": True,
        "y": 1e-3,
        "z": "3",
    }


def test_override_sets_nothing_by_none_and_null_and_takes_them_as_text_in_quotes() -> None:
    assignments = ["a=none", "b.c=null", "d='none'", "e=nonesuch", "f=None"]
    expected = {"a": None, "b": {"c": None}, "d": "none", "e": "nonesuch", "f": "None"}
    assert override({"a": {"cap": 2}}, assignments) == expected


@pytest.mark.parametrize("text", ["a=b", "1\nother = 2", "#fff", "", "[1, 2", "[" * 5000])
def test_override_takes_what_is_no_single_toml_value_as_text(text: str) -> None:
    assert override({}, [f"note={text}"]) == {"note": text}


def test_override_leaves_its_argument_alone() -> None:
    tree = {"dvae": {"n_codes": 64}}
    override(tree, ["dvae.n_codes=1", "dvae.new=2"])
    assert tree == {"dvae": {"n_codes": 64}}


def test_the_last_override_of_a_key_wins() -> None:
    assert override({}, ["seed=1", "seed=2"]) == {"seed": 2}


@pytest.mark.parametrize("assignment", ["seed", "=3", ".seed=3", "dvae.=3", ""])
def test_override_refuses_what_is_no_assignment(assignment: str) -> None:
    with pytest.raises(ValueError, match=r"^cannot read the setting .*write it as table\.key=value$"):
        override(GOOD, [assignment])


def test_override_through_a_plain_value_is_refused() -> None:
    with pytest.raises(ValueError) as caught:
        override(GOOD, ["dvae.n_codes.deep=3"])
    assert str(caught.value) == "cannot set dvae.n_codes.deep: dvae.n_codes is 64, not a table"


def test_a_preset_is_read_by_name_or_path(presets: Path) -> None:
    assert (
        load_preset("tiny") == load_preset(str(presets / "tiny.toml")) == {"seed": 3, "dvae": {"n_codes": 64}}
    )


def test_an_unknown_preset_lists_the_presets(presets: Path) -> None:
    with pytest.raises(ValueError) as caught:
        load_preset("tny")
    assert str(caught.value) == (
        'preset "tny" is not known; did you mean tiny?: use laptop, tiny, or the path of a .toml file'
    )


def test_every_shipped_preset_is_found_in_the_package() -> None:
    shipped = {file.stem for file in (Path(config.__file__).parent / "presets").glob("*.toml")}
    assert set(config._presets()) == shipped
    for name in shipped:
        assert isinstance(load_preset(name), dict)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"seed = 1\n[dvae]\nn_codes = \n", "not valid TOML: line 3: Invalid value"),
        (b"seed = 1\r\nseed = 2\r\n", "not valid TOML: line 2: Cannot overwrite a value"),
        (b"seed = 1\nnote = [1,", "not valid TOML: line 2: Invalid value"),
        (b"seed = \xff", "not valid TOML: byte 7 is not UTF-8 text"),
        (b"a = " + b"[" * 5000, "not valid TOML: nested too deeply"),
    ],
)
def test_bad_toml_is_one_line_with_file_and_line(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_preset(str(file))
    assert str(caught.value) == f"{file}: {reason}"


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b"\xef\xbb\xbfseed = 1\r\nnote = 'a'\r\n")
    assert load_preset(str(tmp_path / "mine.toml")) == {"seed": 1, "note": "a"}


def test_a_missing_or_unreadable_preset_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.toml: cannot read the file: No such file or directory$"):
        load_preset(str(tmp_path / "none.toml"))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(ValueError, match=r"folder\.toml: cannot read the file: Is a directory$"):
        load_preset(str(tmp_path / "folder.toml"))


def test_differences_lists_changed_added_and_removed_keys() -> None:
    old = {"seed": 1, "dvae": {"n_codes": 64, "levels": [4, 4], "gone": "x"}, "table": {"a": 1}}
    new = {"seed": 1, "dvae": {"n_codes": 128, "levels": (4, 4)}, "table": 3, "new": {"b": True}}
    assert differences(old, new) == [
        "dvae.n_codes: 64 -> 128",
        'dvae.gone: "x" -> absent',
        'table: {"a": 1} -> 3',
        'new: absent -> {"b": true}',
    ]
    assert differences(old, old) == []
