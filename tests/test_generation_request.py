"""ImageRequest: every mistake is one line that says what is allowed, and names its field."""

from typing import Any

import pytest
from pydantic import ValidationError

from dalle.generation.fields import FIELDS, MAX_SEED
from dalle.generation.request import (
    GenerationOptions,
    ImageRequest,
    InvalidRequest,
    ModelDefaults,
    RequestFields,
    blaming,
)

DEFAULTS = GenerationOptions(temperature=0.9, top_k=50, top_p=0.95, guidance=3.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_k": 2**16 + 1},
        {"top_k": 2.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"guidance": -1.0},
        {"guidance": float("inf")},
        {"temprature": 1.0},
    ],
)
def test_options_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        GenerationOptions.model_validate(wrong)


def test_the_default_options_are_the_papers() -> None:
    expected = {"temperature": 1.0, "top_k": None, "top_p": None, "guidance": 1.0}
    assert GenerationOptions().model_dump() == expected


def test_one_caption_is_a_prompt_of_one() -> None:
    assert ImageRequest("a cat").prompt == ("a cat",)
    assert ImageRequest(("a cat", "")).prompt == ("a cat", "")


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": ["a", 3]}, "prompt", r"prompt\[1\] = 3: must be text"),
        ({"prompt": None}, "prompt", "prompt = null: must be a list"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt", "num_images_per_prompt = 0: must be greater"),
        ({"num_images_per_prompt": 1.0}, "num_images_per_prompt", "must be an integer"),
        ({"num_images_per_prompt": True}, "num_images_per_prompt", "must be an integer"),
        ({"num_images_per_prompt": 3, "num_candidates": 2}, "num_candidates", "at least the 3 pictures"),
        ({"seed": -1}, "seed", "seed = -1: must be greater than or equal to 0"),
        ({"seed": 1.5}, "seed", "must be an integer"),
        ({"seed": True}, "seed", "must be an integer"),
        ({"seed": "3"}, "seed", "must be an integer"),
        ({"seed": MAX_SEED + 1}, "seed", "must be less than or equal to"),
        ({"temperature": -1}, "temperature", "temperature = -1: must be greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "must be greater than 0"),
        ({"top_k": -1}, "top_k", "must be greater than or equal to 0"),
        ({"guidance": float("nan")}, "guidance", "must be"),
        ({"keep_rows": 0}, "keep_rows", "must be greater than or equal to 1"),
        ({"image": "cat.png"}, "image", "must be a PIL image: open it with"),
        ({"truncate": 1}, "truncate", "must be true or false"),
        ({"temprature": 1}, "temprature", "did you mean temperature"),
    ],
)
def test_a_mistake_is_one_line_that_names_its_field(fields: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        ImageRequest(**({"prompt": "a cat"} | fields))
    assert caught.value.field == field and "\n" not in str(caught.value)


def test_every_field_has_its_facts_and_its_keyword() -> None:
    names = {*ImageRequest.model_fields}
    assert names == {*FIELDS} == {"prompt", *RequestFields.__annotations__}
    for name, facts in FIELDS.items():
        assert facts.help
        for bound in (facts.low, facts.high):
            if bound is not None and (name, bound) != ("top_p", 0):  # which is above 0
                assert getattr(ImageRequest("a", **{name: bound}), name) == bound  # type: ignore[misc]
        if facts.low is not None:
            with pytest.raises(InvalidRequest):
                ImageRequest("a", **{name: facts.low - 1})  # type: ignore[misc]
        if facts.high is not None:
            with pytest.raises(InvalidRequest):
                ImageRequest("a", **{name: facts.high + 1})  # type: ignore[misc]


def test_picture_i_has_seed_plus_i_up_to_the_highest_seed() -> None:
    assert ImageRequest("a", seed=7).seeds(3) == (7, 8, 9)
    assert ImageRequest("a", seed=MAX_SEED - 1).seeds(2) == (MAX_SEED - 1, MAX_SEED)
    with pytest.raises(InvalidRequest, match=rf"seed is {MAX_SEED}; for 2 pictures .* 0\.\.{MAX_SEED - 1}"):
        ImageRequest("a", seed=MAX_SEED).seeds(2)


def test_no_seed_takes_another_one_each_time() -> None:
    assert len({ImageRequest("a", seed=None).seeds(1)[0] for _ in range(8)}) > 1


def test_more_candidates_than_pictures_need_a_clip() -> None:
    assert ImageRequest("a", num_images_per_prompt=3).count_candidates(None, False) == 3
    same = ImageRequest("a", num_images_per_prompt=3, num_candidates=3)
    assert same.count_candidates(None, False) == 3
    more = ImageRequest("a", num_images_per_prompt=3, num_candidates=8)
    assert more.count_candidates(None, True) == 8
    with pytest.raises(InvalidRequest, match=r"num_candidates is 8 for 3 pictures; .* needs a CLIP"):
        more.count_candidates(None, False)


def test_the_models_number_of_candidates_is_used_where_the_request_has_none(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = ImageRequest("a", num_images_per_prompt=3)
    assert plain.count_candidates(16, True) == 16
    assert ImageRequest("a", num_images_per_prompt=20).count_candidates(16, True) == 20
    assert ImageRequest("a", num_candidates=2).count_candidates(16, True) == 2, "the request's wins"
    assert not caplog.messages
    assert plain.count_candidates(16, False) == 3, "a default needs no CLIP"
    assert "16 candidates per caption needs a CLIP, which is missing: drawing 3" in caplog.text
    caplog.clear()
    assert ImageRequest("a", num_images_per_prompt=16).count_candidates(16, False) == 16
    assert not caplog.messages


def test_a_default_number_of_candidates_is_written_only_where_there_is_one() -> None:
    assert "candidates" not in ModelDefaults(temperature=0.5).model_dump(mode="json")
    assert ModelDefaults(candidates=16).model_dump(mode="json")["candidates"] == 16
    assert ModelDefaults.of(DEFAULTS) == ModelDefaults(temperature=0.9, top_k=50, top_p=0.95, guidance=3.0)


def test_settings_left_out_are_the_models_defaults_and_given_ones_win() -> None:
    assert ImageRequest("a").options(ModelDefaults.of(DEFAULTS)) == DEFAULTS
    assert ImageRequest("a", temperature=0, guidance=1.0).options(DEFAULTS) == DEFAULTS.model_copy(
        update={"temperature": 0.0, "guidance": 1.0}
    )


def test_top_k_zero_switches_the_default_off() -> None:
    assert ImageRequest("a", top_k=0, top_p=1.0).options(DEFAULTS).top_k is None


def test_a_mistake_found_later_is_blamed_on_its_field() -> None:
    with pytest.raises(InvalidRequest, match="caption has 9 tokens; the model reads 5") as caught:
        with blaming("prompt"):
            raise ValueError("caption has 9 tokens;\nthe model reads 5")
    assert caught.value.field == "prompt"
    with pytest.raises(InvalidRequest) as caught, blaming("prompt"):
        raise InvalidRequest("seed", "too high")
    assert caught.value.field == "seed"
