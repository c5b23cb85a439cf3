"""GenerationOptions: what is allowed, and that mistakes are refused."""

import pytest
from pydantic import ValidationError

from dalle.generation.request import GenerationOptions


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
