"""What a call asks for: every mistake is one line that says what is allowed."""

from typing import Any

import pytest

from dalle.generation.request import (
    MAX_SEED,
    GenerationOptions,
    count_images,
    count_seeds,
    read_captions,
    read_options,
)

DEFAULTS = GenerationOptions(temperature=0.9, top_k=50, top_p=0.95, guidance=3.0)


def test_one_caption_is_a_list_of_one() -> None:
    assert read_captions("a cat") == ["a cat"]
    assert read_captions(("a cat", "")) == ["a cat", ""]


@pytest.mark.parametrize("prompt", [[], ["a", 3], [None]])
def test_a_prompt_that_is_no_caption_is_refused(prompt: Any) -> None:
    with pytest.raises(ValueError, match=r"prompt is .*; it must be a caption"):
        read_captions(prompt)


def test_picture_i_has_seed_plus_i_up_to_the_highest_seed() -> None:
    assert count_seeds(7, 3) == [7, 8, 9]
    assert count_seeds(MAX_SEED - 1, 2) == [MAX_SEED - 1, MAX_SEED]


@pytest.mark.parametrize("seed", [-1, MAX_SEED, 1.5, True, "3"])
def test_a_seed_that_leaves_no_room_or_is_no_number_is_refused(seed: Any) -> None:
    with pytest.raises(ValueError, match=rf"seed is .*; for 2 pictures .* 0\.\.{MAX_SEED - 1}"):
        count_seeds(seed, 2)


def test_no_seed_takes_another_one_each_time() -> None:
    assert len({count_seeds(None, 1)[0] for _ in range(8)}) > 1


def test_more_candidates_than_pictures_need_a_clip() -> None:
    assert count_images(3, None) == count_images(3, 3) == 3
    with pytest.raises(ValueError, match=r"num_candidates is 8 for 3 pictures; .* needs a CLIP"):
        count_images(3, 8)
    assert count_images(3, 8, has_ranker=True) == 8
    with pytest.raises(ValueError, match="num_candidates is 2; it must be at least the 3 pictures"):
        count_images(3, 2)


@pytest.mark.parametrize("n", [0, -1, 1.0, True])
def test_a_number_of_pictures_that_is_no_count_is_refused(n: Any) -> None:
    with pytest.raises(ValueError, match="num_images_per_prompt is"):
        count_images(n, None)


def test_settings_left_out_are_the_models_defaults_and_given_ones_win() -> None:
    assert read_options(DEFAULTS, None, None, None, None) == DEFAULTS
    assert read_options(DEFAULTS, 0, None, None, 1.0) == DEFAULTS.model_copy(
        update={"temperature": 0.0, "guidance": 1.0}
    )


def test_top_k_zero_switches_the_default_off() -> None:
    assert read_options(DEFAULTS, None, 0, 1.0, None).top_k is None


def test_a_setting_out_of_range_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"sampling options: temperature = -1") as caught:
        read_options(DEFAULTS, -1, None, None, None)
    assert "\n" not in str(caught.value)
