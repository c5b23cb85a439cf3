"""Recipe: what is stored with a picture, and the batch it names."""

import json

import pytest
import torch

from dalle.config import validate
from dalle.generation.engine import plan_batches
from dalle.generation.options import GenerationOptions
from dalle.generation.recipe import (
    BatchPlan,
    Completion,
    Recipe,
    Versions,
    batch_plans,
    caption_at,
    count_pictures,
    options_in_batch,
    place_in_batch,
    tokens_sha256,
)

BATCH = BatchPlan(captions=("a cat", "a dog"), seeds=(4, 5, 6, 7), position=2)
RECIPE = Recipe(
    caption="a dog",
    seed=6,
    index=2,
    options=GenerationOptions(top_k=5),
    batch=BATCH,
    completion=Completion(keep_rows=1, known=(3, 3, -1, -1)),
    dtype="float32",
    device="cpu",
    threads=1,
    versions=Versions(dalle="0", torch="0", python="0"),
    model="m",
    model_sha256="0",
    tokens_sha256="0",
)


def test_a_recipe_survives_json() -> None:
    text = json.dumps(RECIPE.model_dump(mode="json"))
    assert validate(Recipe, json.loads(text), "recipe") == RECIPE


def test_a_recipe_with_a_key_missing_or_unknown_is_refused() -> None:
    tree = RECIPE.model_dump(mode="json")
    with pytest.raises(ValueError, match="recipe: seed is missing"):
        validate(Recipe, {key: value for key, value in tree.items() if key != "seed"}, "recipe")
    with pytest.raises(ValueError, match="sede is not a setting; did you mean seed"):
        validate(Recipe, tree | {"sede": 1}, "recipe")


def test_the_recipes_own_caption_and_seed_take_their_place_in_the_batch() -> None:
    assert place_in_batch(RECIPE) == (BATCH, True)
    changed = RECIPE.model_copy(update={"seed": 99, "caption": "a fox"})
    batch, is_consistent = place_in_batch(changed)
    assert batch.seeds == (4, 5, 99, 7) and batch.captions == ("a cat", "a fox")
    assert not is_consistent


@pytest.mark.parametrize("update", [{"position": 4}, {"seeds": (1, 2, 3)}])
def test_a_batch_that_cannot_have_been_is_refused(update: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="it was changed by hand"):
        place_in_batch(RECIPE.model_copy(update={"batch": BATCH.model_copy(update=update)}))


MIXED = BATCH.model_copy(update={"n_pictures": (1, 3), "guided": (1, 2, 3)})


def test_a_batch_of_different_numbers_knows_whose_picture_is_whose() -> None:
    assert count_pictures(BATCH) == [2, 2] and count_pictures(MIXED) == [1, 3]
    owners = [caption_at(MIXED.model_copy(update={"position": position})) for position in range(4)]
    assert owners == [0, 1, 1, 1]
    for update in ({"n_pictures": (1, 2)}, {"n_pictures": (4,)}, {"guided": (4,)}):
        with pytest.raises(ValueError, match="it was changed by hand"):
            count_pictures(MIXED.model_copy(update=update))


def test_the_same_pictures_of_a_batch_are_guided_again() -> None:
    plain = RECIPE.options
    assert options_in_batch(RECIPE) == [plain] * 4
    guided = RECIPE.model_copy(update={"batch": MIXED, "options": plain.model_copy(update={"guidance": 5.0})})
    assert [one.guidance for one in options_in_batch(guided)] == [1.0, 5.0, 5.0, 5.0]
    unguided = RECIPE.model_copy(update={"batch": MIXED.model_copy(update={"guided": (0,)})})
    assert [one.guidance != 1 for one in options_in_batch(unguided)] == [True, False, False, False]
    assert place_in_batch(guided)[1], "position 2 is guided, and so is the recipe"
    assert not place_in_batch(RECIPE.model_copy(update={"batch": MIXED}))[1]


def test_a_recipe_of_an_older_dalle_is_read() -> None:
    tree = RECIPE.model_dump(mode="json")
    del tree["batch"]["n_pictures"], tree["batch"]["guided"]
    assert validate(Recipe, tree, "recipe") == RECIPE


def test_every_row_of_a_call_has_its_batch() -> None:
    plans = batch_plans(plan_batches([2] * 3, 4), ["a", "b", "c"], [0, 1, 2, 3, 4, 5], 4)
    assert [plan.seeds[plan.position] for plan in plans] == [0, 1, 2, 3, 4, 5]
    assert [plan.captions for plan in plans] == [("a", "b")] * 4 + [("c",)] * 2


def test_the_hash_of_tokens_depends_on_values_and_order_not_on_type() -> None:
    tokens = torch.tensor([[1, 2], [3, 4]])
    assert tokens_sha256(tokens) == tokens_sha256(tokens.to(torch.int32))
    assert tokens_sha256(tokens) != tokens_sha256(tokens.T)
    assert tokens_sha256(tokens) == tokens_sha256(tokens.T.contiguous().T)
