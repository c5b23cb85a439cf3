"""Recipe: what is stored with a picture, and the batch that is made of it again."""

import json

import pytest
import torch

from dalle.config import validate
from dalle.generation.batch import BatchRecord
from dalle.generation.recipe import Recipe, Versions, batch_to_rerun, tokens_sha256
from dalle.generation.request import Completion, GenerationOptions, Truncation

BATCH = BatchRecord(captions=("a cat", "a dog"), seeds=(4, 5, 6, 7), position=2)
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


def read(caption: str) -> tuple[torch.Tensor, Truncation | None]:
    """Tokens that tell captions apart."""
    return torch.tensor([len(caption), ord(caption[-1])]), None


def test_the_recipes_own_caption_and_seed_take_their_place_in_the_batch() -> None:
    batch, is_consistent = batch_to_rerun(RECIPE, read)
    assert is_consistent and batch.for_recipe(2) == BATCH
    changed = RECIPE.model_copy(update={"seed": 99, "caption": "a fox"})
    batch, is_consistent = batch_to_rerun(changed, read)
    record = batch.for_recipe(2)
    assert record.seeds == (4, 5, 99, 7) and record.captions == ("a cat", "a fox")
    assert batch.text[1].tolist() == [5, ord("x")]
    assert not is_consistent


def test_a_caption_that_is_cut_in_another_place_is_not_the_recipes() -> None:
    def cut(caption: str) -> tuple[torch.Tensor, Truncation | None]:
        return read(caption)[0], Truncation(n_tokens=9, n_kept=5) if caption == "a dog" else None

    assert not batch_to_rerun(RECIPE, cut)[1]


@pytest.mark.parametrize("update", [{"position": 4}, {"seeds": (1, 2, 3)}])
def test_a_batch_that_cannot_have_been_is_refused(update: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="it was changed by hand"):
        batch_to_rerun(RECIPE.model_copy(update={"batch": BATCH.model_copy(update=update)}), read)


MIXED = BATCH.model_copy(update={"n_pictures": (1, 3), "guided": (1, 2, 3)})


def test_the_same_pictures_of_a_batch_are_guided_again() -> None:
    plain = RECIPE.options
    assert batch_to_rerun(RECIPE, read)[0].options == (plain,) * 4
    guided = RECIPE.model_copy(update={"batch": MIXED, "options": plain.model_copy(update={"guidance": 5.0})})
    batch, is_consistent = batch_to_rerun(guided, read)
    assert [one.guidance for one in batch.options] == [1.0, 5.0, 5.0, 5.0]
    assert is_consistent, "position 2 is guided, and so is the recipe"
    unguided = RECIPE.model_copy(update={"batch": MIXED.model_copy(update={"guided": (0,)})})
    batch, is_consistent = batch_to_rerun(unguided, read)
    assert [one.guidance != 1 for one in batch.options] == [True, False, False, False] and is_consistent
    assert not batch_to_rerun(RECIPE.model_copy(update={"batch": MIXED}), read)[1]
    torn = RECIPE.model_copy(update={"batch": MIXED.model_copy(update={"guided": (1,)})})
    with pytest.raises(ValueError, match="it was changed by hand"):
        batch_to_rerun(torn, read)


def test_a_recipe_of_an_older_dalle_is_read() -> None:
    tree = RECIPE.model_dump(mode="json")
    del tree["batch"]["n_pictures"], tree["batch"]["guided"]
    assert validate(Recipe, tree, "recipe") == RECIPE


def test_the_hash_of_tokens_depends_on_values_and_order_not_on_type() -> None:
    tokens = torch.tensor([[1, 2], [3, 4]])
    assert tokens_sha256(tokens) == tokens_sha256(tokens.to(torch.int32))
    assert tokens_sha256(tokens) != tokens_sha256(tokens.T)
    assert tokens_sha256(tokens) == tokens_sha256(tokens.T.contiguous().T)
