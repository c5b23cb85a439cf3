"""DallePipeline: load and save, seeds, completion, recipes, and one clear line for every mistake."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from dalle.files import file_sha256
from dalle.generation.precision import default_dtype
from dalle.generation.request import GenerationOptions, ModelDefaults
from dalle.generation.rerank import CHUNK, Ranker
from dalle.images import center_crop, read_recipe, save_png, to_tensor
from dalle.pipeline import DallePipeline
from dalle.tokenizer import Tokenizer, TokenizerConfig
from tests.tiny import GRID, LARGE, N_TEXT, needs_compiler, tiny_clip, tiny_dvae, tiny_transformer

CAPTIONS = ["a red apple", "a blue boat", "two cats"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from a second thread, and wait long for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CAPTIONS, TokenizerConfig(vocab_size=400, max_tokens=N_TEXT, space_tokens=False))


@pytest.fixture(scope="module")
def pipe(tokenizer: Tokenizer) -> DallePipeline:
    return DallePipeline(tokenizer, tiny_dvae(), tiny_transformer(tokenizer.n_vocab))


@pytest.fixture(scope="module")
def saved(pipe: DallePipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder of `pipe`; tests that damage it take a copy."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def photo() -> Image.Image:
    pixels = torch.rand(40, 60, 3, generator=torch.Generator().manual_seed(3))
    return Image.fromarray((pixels * 255).to(torch.uint8).numpy())


# Drawing


def test_a_call_gives_pictures_seeds_tokens_and_captions_in_order(pipe: DallePipeline) -> None:
    out = pipe(CAPTIONS[:2], num_images_per_prompt=2, seed=5)
    assert [image.size for image in out.images] == [(32, 32)] * 4
    assert out.seeds == (5, 6, 7, 8)
    assert out.captions == (CAPTIONS[0], CAPTIONS[0], CAPTIONS[1], CAPTIONS[1])
    assert out.tokens.shape == (4, GRID, GRID) and out.tokens.dtype == torch.int64
    assert out.scores is None and not out.is_stopped
    assert len({tuple(tokens.flatten().tolist()) for tokens in out.tokens}) == 4


def test_the_same_seed_gives_the_same_tokens_alone_and_in_any_batch(pipe: DallePipeline) -> None:
    together = pipe(CAPTIONS, num_images_per_prompt=3, seed=20)
    for i in (0, 4, 8):
        alone = pipe(CAPTIONS[i // 3], seed=20 + i)
        assert torch.equal(alone.tokens[0], together.tokens[i])
        assert alone.images[0].tobytes() == together.images[i].tobytes()
    small = pipe(CAPTIONS, num_images_per_prompt=3, seed=20, rows_per_batch=2)
    assert torch.equal(small.tokens, together.tokens)


def test_no_seed_is_random_and_found_in_the_output(pipe: DallePipeline) -> None:
    first, second = pipe("two cats", seed=None), pipe("two cats", seed=None)
    assert first.seeds != second.seeds
    assert torch.equal(pipe("two cats", seed=first.seeds[0]).tokens, first.tokens)


def test_output_type_tokens_leaves_out_the_pictures(pipe: DallePipeline) -> None:
    out = pipe("two cats", output_type="tokens")
    assert out.images == () and len(out.tokens) == len(out.recipes) == 1


def test_the_models_defaults_are_used_and_a_call_overrides_them(pipe: DallePipeline) -> None:
    greedy = DallePipeline(
        pipe.tokenizer, pipe.dvae, pipe.transformer, GenerationOptions(temperature=0, top_k=3, guidance=2)
    )
    out = greedy("two cats", num_images_per_prompt=2)
    assert torch.equal(out.tokens[0], out.tokens[1])  # argmax does not hear the seed
    assert out.recipes[0]["options"] == {"temperature": 0.0, "top_k": 3, "top_p": None, "guidance": 2.0}
    plain = greedy("two cats", temperature=1, top_k=0, guidance=1)
    assert torch.equal(plain.tokens, pipe("two cats").tokens)


def test_an_empty_caption_draws(pipe: DallePipeline) -> None:
    assert len(pipe("").images) == 1


def test_progress_counts_the_rows_of_all_batches(pipe: DallePipeline) -> None:
    seen: list[tuple[int, int]] = []
    pipe("two cats", num_images_per_prompt=3, rows_per_batch=2, progress=lambda *at: seen.append(at))
    assert seen == [(done, 2 * GRID) for done in range(1, 2 * GRID + 1)]


def test_stopping_returns_the_pictures_that_were_finished(pipe: DallePipeline) -> None:
    whole = pipe("two cats", num_images_per_prompt=2)
    calls: list[int] = []

    def stop_in_second_batch(caller: DallePipeline, row: int, tokens: Tensor) -> bool:
        assert caller is pipe
        calls.append(row)
        return len(calls) == GRID + 1

    out = pipe(
        "two cats", num_images_per_prompt=2, rows_per_batch=1, callback_on_row_end=stop_in_second_batch
    )
    assert calls == [0, 1, 2, 3, 0]
    assert out.is_stopped and out.seeds == (0,) and len(out.images) == len(out.recipes) == 1
    assert torch.equal(out.tokens[0], whole.tokens[0])


def test_an_interrupt_leaves_the_pipeline_usable(pipe: DallePipeline) -> None:
    def interrupt(caller: DallePipeline, row: int, tokens: Tensor) -> bool:
        raise KeyboardInterrupt

    expected = pipe("two cats").tokens
    with pytest.raises(KeyboardInterrupt):
        pipe("two cats", callback_on_row_end=interrupt)
    assert torch.equal(pipe("two cats").tokens, expected)


# Completion


def test_completion_keeps_the_top_rows_and_draws_the_rest(pipe: DallePipeline, photo: Image.Image) -> None:
    out = pipe("two cats", num_images_per_prompt=3, image=photo, keep_rows=2)
    with torch.no_grad():
        expected = pipe.dvae.encode(to_tensor([center_crop(photo, 32)]))[0]
    assert torch.equal(out.tokens[:, :2], expected[:2].expand(3, -1, -1))
    assert len({tuple(tokens[2:].flatten().tolist()) for tokens in out.tokens}) == 3


def test_a_decoder_that_draws_more_pixels_completes_from_the_same_tokens(
    pipe: DallePipeline, photo: Image.Image
) -> None:
    dvae = tiny_dvae(**LARGE)
    dvae.encoder.load_state_dict(pipe.dvae.encoder.state_dict())
    large = DallePipeline(pipe.tokenizer, dvae, pipe.transformer)
    drawn = large(CAPTIONS[0], seed=1, image=photo, keep_rows=2)
    assert drawn.images[0].size == (64, 64)
    assert torch.equal(drawn.tokens, pipe(CAPTIONS[0], seed=1, image=photo, keep_rows=2).tokens)
    assert large.sampler.decode_together(drawn.tokens[:, :3]).shape == (1, 3, 48, 64)
    image, is_equal = large.rerun(drawn.recipes[0])
    assert is_equal and image.tobytes() == drawn.images[0].tobytes()


def test_a_mask_draws_its_cells_anew_and_its_recipe_draws_them_again(
    pipe: DallePipeline, photo: Image.Image
) -> None:
    mask = Image.new("L", photo.size)
    mask.paste(
        255, (photo.width // 2 - 5, photo.height // 2 - 5, photo.width // 2 + 5, photo.height // 2 + 5)
    )
    out = pipe("two cats", num_images_per_prompt=3, image=photo, mask=mask)
    with torch.no_grad():
        kept = pipe.dvae.encode(to_tensor([center_crop(photo, 32)]))[0]
    is_drawn = torch.zeros(4, 4, dtype=torch.bool)
    is_drawn[1:3, 1:3] = True
    assert torch.equal(out.tokens[:, ~is_drawn], kept[~is_drawn].expand(3, -1))
    assert len({tuple(tokens[is_drawn].tolist()) for tokens in out.tokens}) == 3
    again, agrees = pipe.rerun(out.recipes[1])
    assert agrees and again == out.images[1]


def test_transparent_parts_of_a_kept_picture_are_white(pipe: DallePipeline) -> None:
    clear = pipe("", image=Image.new("RGBA", (32, 32), (0, 0, 0, 0)), keep_rows=4)
    white = pipe("", image=Image.new("RGB", (32, 32), "white"), keep_rows=4)
    assert torch.equal(clear.tokens, white.tokens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep_rows": 2}, "image is missing; a completion needs image and either keep_rows"),
        ({"image": Image.new("RGB", (8, 8))}, "keep_rows is missing"),
        ({"image": Image.new("RGB", (8, 8)), "keep_rows": 5}, r"keep_rows is 5; .* choose 1\.\.4"),
        ({"image": Image.new("RGB", (8, 8)), "keep_rows": 0}, "keep_rows = 0: must be greater"),
        ({"image": Image.new("RGB", (8, 8)), "mask": "m.png"}, 'mask = "m.png": must be a PIL image'),
        ({"image": "cat.png", "keep_rows": 1}, 'image = "cat.png": must be a PIL image'),
        ({"num_candidates": 4}, "needs a CLIP"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"temperature": -1.0}, "temperature = -1"),
        ({"top_p": 2.0}, "top_p = 2"),
        ({"output_type": "np"}, "output_type is 'np'"),
        ({"rows_per_batch": 0}, "rows_per_batch is 0"),
        ({"prompt": []}, "prompt = "),
    ],
)
def test_a_wrong_argument_is_one_clear_line(
    pipe: DallePipeline, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        pipe(**({"prompt": "a cat"} | arguments))
    assert "\n" not in str(caught.value)


def test_a_caption_too_long_is_refused_or_cut_in_the_open(
    pipe: DallePipeline, caplog: pytest.LogCaptureFixture
) -> None:
    caption = "apple " * 40
    n_tokens = pipe.tokenizer.count(caption)
    with pytest.raises(ValueError, match=f"caption has {n_tokens} tokens; the model reads {N_TEXT}"):
        pipe(caption)
    with caplog.at_level(logging.WARNING):
        out = pipe([caption, "two cats"], truncate=True)
    assert f"caption has {n_tokens} tokens" in caplog.text
    assert len(caplog.messages[0]) < 160  # of a caption that may have a million characters
    assert out.recipes[0]["truncation"] == {"n_tokens": n_tokens, "n_kept": N_TEXT}
    assert out.recipes[1]["truncation"] is None
    assert pipe.rerun(out.recipes[0])[1]


# Recipes


def test_rerun_agrees_for_every_picture_of_every_batch(pipe: DallePipeline, photo: Image.Image) -> None:
    out = pipe(
        CAPTIONS, num_images_per_prompt=3, rows_per_batch=7, guidance=1.5, top_p=0.9, image=photo, keep_rows=1
    )
    assert [len(recipe["batch"]["seeds"]) for recipe in out.recipes] == [6] * 6 + [3] * 3  # type: ignore[index]
    for i, recipe in enumerate(out.recipes):
        image, agrees = pipe.rerun(recipe)
        assert agrees
        assert image.tobytes() == out.images[i].tobytes()


def test_a_changed_recipe_does_not_agree(pipe: DallePipeline) -> None:
    recipe = pipe(CAPTIONS, seed=3).recipes[1]
    assert pipe.rerun(recipe)[1]
    batch: Any = recipe["batch"]
    options: Any = recipe["options"]
    for change in (
        {"seed": 99},
        {"caption": "two cats"},
        {"options": options | {"temperature": 0.1}},
        {"batch": batch | {"seeds": [3, 99, 5]}},
        {"tokens_sha256": "0" * 64},
    ):
        assert not pipe.rerun(recipe | change)[1], change


def test_rerun_samples_with_the_recorded_threads_and_puts_them_back(pipe: DallePipeline) -> None:
    recipe = pipe("two cats").recipes[0]
    assert recipe["threads"] == 1
    torch.set_num_threads(2)
    seen: list[int] = []

    def watch(*_: object) -> None:
        seen.append(torch.get_num_threads())

    parts = [pipe.transformer.norm, *pipe.dvae.decoder.modules()]
    hooks = [part.register_forward_pre_hook(watch) for part in parts]
    try:
        assert pipe.rerun(recipe)[1]
        assert pipe.rerun(recipe | {"threads": 3})[1]
    finally:
        for hook in hooks:
            hook.remove()
    n_steps = len(seen) // 2
    assert seen == [1] * n_steps + [3] * n_steps and n_steps > 1
    assert torch.get_num_threads() == 2


def test_rerun_counts_the_rows_of_its_batch(pipe: DallePipeline) -> None:
    recipe = pipe(CAPTIONS, num_images_per_prompt=2).recipes[3]
    seen: list[tuple[int, int]] = []
    assert pipe.rerun(recipe, progress=lambda *at: seen.append(at))[1]
    assert seen == [(done, GRID) for done in range(1, GRID + 1)]


def test_a_recipe_of_another_model_is_refused(pipe: DallePipeline) -> None:
    recipe = pipe("two cats").recipes[0]
    with pytest.raises(ValueError, match=r"recipe was made with model .*: load the recipe's model"):
        pipe.rerun(recipe | {"model_sha256": "1" * 64})


def test_what_is_no_recipe_is_refused(pipe: DallePipeline) -> None:
    with pytest.raises(ValueError, match="recipe: "):
        pipe.rerun({"prompt": "a cat"})


def test_a_recipe_in_a_png_draws_the_picture_again(pipe: DallePipeline, saved: Path, tmp_path: Path) -> None:
    out = pipe("a red apple", seed=8)
    save_png(out.images[0], tmp_path / "apple.png", out.recipes[0])
    image, agrees = DallePipeline.from_pretrained(saved, dtype="float32").rerun(
        read_recipe(tmp_path / "apple.png")
    )
    assert agrees and image.tobytes() == out.images[0].tobytes()


def test_a_recipe_of_another_dtype_is_drawn_in_that_dtype(saved: Path) -> None:
    exact = DallePipeline.from_pretrained(saved, dtype="float32")
    half = DallePipeline.from_pretrained(saved, dtype="bfloat16")
    recipe = half("a red apple", num_images_per_prompt=2).recipes[1]
    assert recipe["dtype"] == "bfloat16"
    assert exact.rerun(recipe)[1]
    assert half.rerun(exact("a red apple").recipes[0])[1]
    assert exact.dtype == torch.float32 and half.dtype == torch.bfloat16


# Loading and saving


def test_save_and_load_give_the_same_model(pipe: DallePipeline, saved: Path) -> None:
    loaded = DallePipeline.from_pretrained(str(saved), dtype="float32")
    assert set(loaded.components) == {"tokenizer", "dvae", "transformer"}
    for name in ("dvae", "transformer"):
        ours, theirs = getattr(pipe, name).state_dict(), getattr(loaded, name).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert loaded.tokenizer.fingerprint == pipe.tokenizer.fingerprint
    assert loaded.model_sha256 == pipe.model_sha256
    assert torch.equal(loaded(CAPTIONS[0]).tokens, pipe(CAPTIONS[0]).tokens)


def test_an_unsaved_models_hash_is_that_of_its_saved_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    fresh = DallePipeline(tokenizer, tiny_dvae(), tiny_transformer(tokenizer.n_vocab))
    before = fresh.model_sha256
    fresh.save_pretrained(tmp_path / "model")
    assert fresh.model_sha256 == before
    assert DallePipeline.from_pretrained(tmp_path / "model").model_sha256 == before


def test_the_index_names_components_and_defaults(pipe: DallePipeline, tmp_path: Path) -> None:
    defaults = ModelDefaults(temperature=0.9, guidance=3)
    DallePipeline(pipe.tokenizer, pipe.dvae, pipe.transformer, defaults).save_pretrained(tmp_path / "m")
    index = json.loads((tmp_path / "m" / "model_index.json").read_text())
    assert index["_class_name"] == "DallePipeline" and index["_dalle_version"]
    assert index["components"] == {
        "tokenizer": "Tokenizer",
        "dvae": "DiscreteVAE",
        "transformer": "Transformer",
    }
    assert index["defaults"] == {"temperature": 0.9, "top_k": None, "top_p": None, "guidance": 3.0}
    assert DallePipeline.from_pretrained(tmp_path / "m").defaults == defaults


def test_saving_keeps_the_model_card(saved: Path, tmp_path: Path) -> None:
    source = shutil.copytree(saved, tmp_path / "source")
    (source / "README.md").write_text("# A card\n")
    DallePipeline.from_pretrained(source, dtype="float32").save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "README.md").read_text() == "# A card\n"
    DallePipeline.from_pretrained(source, dtype="float32").save_pretrained(source)  # onto itself
    assert (source / "README.md").read_text() == "# A card\n"


def test_saving_into_a_runs_folder_leaves_the_run_alone(pipe: DallePipeline, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    pipe.save_pretrained(tmp_path)
    assert "run/config.json" not in (tmp_path / "manifest.json").read_text()
    DallePipeline.from_pretrained(tmp_path)


def test_a_failed_save_leaves_no_folder(
    pipe: DallePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(pipe.transformer, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        pipe.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


FILES = (
    "model_index.json",
    "tokenizer/tokenizer.json",
    "dvae/config.json",
    "dvae/model.safetensors",
    "transformer/model.safetensors",
)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_one_line_that_names_it(saved: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / name).unlink()
    with pytest.raises(ValueError, match=name) as caught:
        DallePipeline.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_one_line_that_names_the_file(saved: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(saved, tmp_path / "model")
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(bytes(data))
    with pytest.raises(ValueError, match=name) as caught:
        DallePipeline.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_manifest_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "model")
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"manifest\.json: no such file"):
        DallePipeline.from_pretrained(folder)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no model_index\.json"):
        DallePipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("source", ["no/such/folder", "../nowhere", Path("nowhere")])
def test_a_source_that_is_neither_folder_nor_hub_id_is_refused(source: str | Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        DallePipeline.from_pretrained(source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_image_vocab": 32}, "the dVAE has 64 codes; the transformer was made for 32"),
        ({"grid_size": 8}, "the dVAE's grid side is 4 tokens; the transformer was made for 8"),
        ({"n_text_vocab": 9}, r"the tokenizer has \d+ vocabulary entries; the transformer was made for 9"),
        ({"n_text_tokens": 5}, "the tokenizer pads captions to 12 tokens; the transformer was made for 5"),
    ],
)
def test_components_that_do_not_fit_are_refused(
    pipe: DallePipeline, changes: dict[str, int], message: str
) -> None:
    transformer = tiny_transformer(**({"n_text_vocab": pipe.tokenizer.n_vocab} | changes))
    with pytest.raises(ValueError, match=message):
        DallePipeline(pipe.tokenizer, pipe.dvae, transformer)


# Dtype


def test_int8_is_a_choice_of_drawing_and_part_of_the_recipe(saved: Path) -> None:
    rounded = DallePipeline.from_pretrained(saved, dtype="int8")
    assert rounded.dtype == torch.int8
    assert next(rounded.transformer.parameters()).dtype == torch.bfloat16
    out = rounded("a red circle", seed=3)
    assert out.recipes[0]["dtype"] == "int8"
    image, agrees = DallePipeline.from_pretrained(saved, dtype="float32").rerun(out.recipes[0])
    assert agrees and image.tobytes() == out.images[0].tobytes()
    assert rounded.to("cpu", "bfloat16").dtype == torch.bfloat16


@needs_compiler
def test_compiled_attention_is_a_choice_of_loading_and_part_of_the_recipe(saved: Path) -> None:
    plain = DallePipeline.from_pretrained(saved, dtype="float32")
    compiled = DallePipeline.from_pretrained(saved, dtype="float32", native=True)
    out = compiled("a red circle", num_images_per_prompt=2, n_threads=2)
    assert (out.recipes[0]["native"], out.recipes[0]["threads"]) == (True, 2)
    assert torch.equal(out.tokens, plain("a red circle", num_images_per_prompt=2).tokens)
    assert plain.rerun(out.recipes[1])[1]
    assert not plain.is_native and plain("a red circle").recipes[0]["native"] is False
    with pytest.raises(ValueError, match=r"n_threads is 0; choose 1\.\."):
        plain("a red circle", n_threads=0)


def test_dtype_is_of_the_transformer_only_and_auto_is_the_machines(saved: Path) -> None:
    half = DallePipeline.from_pretrained(saved, dtype="bfloat16")
    assert half.dtype == torch.bfloat16 and next(half.dvae.parameters()).dtype == torch.float32
    auto = DallePipeline.from_pretrained(saved)
    assert auto.dtype == default_dtype("cpu")
    assert auto.to("cpu") is auto and auto.dtype == default_dtype("cpu")
    with pytest.raises(ValueError, match="dtype is float8; allowed are auto, float32, bfloat16, int8"):
        DallePipeline.from_pretrained(saved, dtype="float8")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_the_same_tokens_in_float32(pipe: DallePipeline, saved: Path) -> None:
    on_gpu = DallePipeline.from_pretrained(saved, dtype="float32", device="cuda")
    out = on_gpu(CAPTIONS, num_images_per_prompt=2, guidance=1.5, top_k=20, top_p=0.9)
    expected = pipe(CAPTIONS, num_images_per_prompt=2, guidance=1.5, top_k=20, top_p=0.9)
    assert torch.equal(out.tokens, expected.tokens)
    assert on_gpu.rerun(out.recipes[3])[1]
    assert DallePipeline.from_pretrained(saved, device="cuda").dtype == torch.bfloat16


def test_back_from_bfloat16_the_weights_have_all_their_digits(pipe: DallePipeline, saved: Path) -> None:
    loaded = DallePipeline.from_pretrained(saved, dtype="bfloat16").to("cpu", "float32")
    ours, theirs = pipe.transformer.state_dict(), loaded.transformer.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# The Hub


def test_a_hub_id_is_read_offline_from_the_cache(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for path in saved.rglob("*"):
        if path.is_file():  # as the Hub's client lays it out: links to blobs
            blob = repository / "blobs" / path.relative_to(saved).as_posix().replace("/", "-")
            link = repository / "snapshots" / commit / path.relative_to(saved)
            blob.parent.mkdir(exist_ok=True)
            link.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, blob)
            link.symlink_to(blob)
    loaded = DallePipeline.from_pretrained("someone/tiny", cache_dir=tmp_path, dtype="float32")
    expected = DallePipeline.from_pretrained(saved, dtype="float32")
    assert loaded.name == "someone/tiny" and loaded.model_sha256 == expected.model_sha256
    with pytest.raises(ValueError, match="someone/other not found locally or on the Hub") as caught:
        DallePipeline.from_pretrained("someone/other", cache_dir=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_local_folder_wins_over_a_hub_id(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(saved, tmp_path / "someone" / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    DallePipeline.from_pretrained("someone/tiny")


def test_push_to_hub_uploads_a_whole_model_folder(
    pipe: DallePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def upload(self: object, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        shutil.copytree(folder_path, tmp_path / repo_id)

    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", lambda self, repo_id, **_: f"https://hub/{repo_id}"
    )
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    assert pipe.push_to_hub("someone/tiny") == "https://hub/someone/tiny"
    assert DallePipeline.from_pretrained(tmp_path / "someone" / "tiny").model_sha256 == pipe.model_sha256


class NotAnOSError(Exception):
    """As those of the HTTP libraries under the Hub's client, which differ from version to version."""


def fail_to_connect(*_: object, **__: object) -> None:
    raise NotAnOSError("connection refused:\nis there a network?")


def test_a_hub_that_cannot_be_reached_is_one_line(
    pipe: DallePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", fail_to_connect)
    with pytest.raises(ValueError, match="cannot push to 'someone/tiny': connection refused: is there a net"):
        pipe.push_to_hub("someone/tiny")
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail_to_connect)
    with pytest.raises(ValueError, match="someone/tiny not found locally or on the Hub: conn"):
        DallePipeline.from_pretrained("someone/tiny")


# Ranking


def build_ranker(tokenizer: Tokenizer) -> Ranker:
    return Ranker(tiny_clip(tokenizer), tokenizer)


@pytest.fixture(scope="module")
def ranker(tokenizer: Tokenizer) -> Ranker:
    return build_ranker(tokenizer)


def test_the_best_of_all_candidates_are_kept_best_first_for_each_caption(
    pipe: DallePipeline, ranker: Ranker
) -> None:
    every = pipe(CAPTIONS[:2], num_images_per_prompt=7, seed=3)
    expected = []
    for caption in range(2):
        rows = range(7 * caption, 7 * caption + 7)
        scores = ranker.score_images(CAPTIONS[caption], [every.images[row] for row in rows])
        best = sorted(rows, key=lambda row, own=scores, first=rows[0]: -own[row - first])[:3]
        expected += [(every.seeds[row], scores[row - rows[0]], CAPTIONS[caption]) for row in best]
    out = pipe(CAPTIONS[:2], num_images_per_prompt=3, num_candidates=7, seed=3, ranker=ranker)
    assert [(seed, caption) for seed, _, caption in expected] == list(
        zip(out.seeds, out.captions, strict=True)
    )
    assert out.scores == pytest.approx([score for _, score, _ in expected], abs=2e-3)  # pictures have 8 bits
    assert [recipe["rank"] for recipe in out.recipes] == [0, 1, 2, 0, 1, 2]
    assert [recipe["score"] for recipe in out.recipes] == list(out.scores)
    for place, seed in enumerate(out.seeds):
        assert torch.equal(out.tokens[place], every.tokens[seed - 3])
        assert out.images[place].tobytes() == every.images[seed - 3].tobytes()


def test_a_kept_candidate_is_drawn_again_from_its_recipe(pipe: DallePipeline, ranker: Ranker) -> None:
    out = pipe(CAPTIONS[0], num_candidates=9, seed=1, ranker=ranker, rows_per_batch=4)
    image, agrees = pipe.rerun(out.recipes[0])
    assert agrees and image.tobytes() == out.images[0].tobytes()


def test_more_candidates_never_lower_the_best_score(pipe: DallePipeline, ranker: Ranker) -> None:
    best = [pipe(CAPTIONS[0], num_candidates=n, ranker=ranker).scores[0] for n in (1, 4, 16)]  # type: ignore[index]
    assert best[0] <= best[1] + 1e-6 and best[1] <= best[2] + 1e-6  # of other chunks: rounded otherwise


def test_ranking_counts_as_progress_and_stays_in_chunks(pipe: DallePipeline, ranker: Ranker) -> None:
    seen: list[tuple[int, int]] = []
    n = CHUNK + 5
    pipe(CAPTIONS[0], num_candidates=n, ranker=ranker, rows_per_batch=n, progress=lambda *x: seen.append(x))
    assert seen == [(i, GRID + 2) for i in range(1, GRID + 3)]


def test_a_stopped_run_ranks_what_is_finished(pipe: DallePipeline, ranker: Ranker) -> None:
    n_rows = 0

    def stop(_: DallePipeline, __: int, ___: Tensor) -> bool:
        nonlocal n_rows
        n_rows += 1
        return n_rows > GRID  # within the second batch

    out = pipe(
        CAPTIONS[0], num_images_per_prompt=2, num_candidates=8, ranker=ranker, rows_per_batch=4, callback_on_row_end=stop
    )  # fmt: skip
    assert out.is_stopped and len(out.images) == 2 and set(out.seeds) <= {0, 1, 2, 3}


def test_a_model_with_a_clip_ranks_by_itself_and_keeps_it_when_saved(
    tokenizer: Tokenizer, ranker: Ranker, tmp_path: Path
) -> None:
    dvae, transformer = tiny_dvae(), tiny_transformer(tokenizer.n_vocab)
    whole = DallePipeline(tokenizer, dvae, transformer, ranker=ranker)
    out = whole(CAPTIONS[0], num_images_per_prompt=2, num_candidates=6)
    whole.save_pretrained(tmp_path / "model")
    index = json.loads((tmp_path / "model" / "model_index.json").read_text())
    assert index["components"]["clip"] == "CLIP"
    assert "clip/model.safetensors" in json.loads((tmp_path / "model" / "manifest.json").read_text())["files"]
    loaded = DallePipeline.from_pretrained(tmp_path / "model", dtype="float32")
    again = loaded(CAPTIONS[0], num_images_per_prompt=2, num_candidates=6)
    assert (again.seeds, again.scores) == (out.seeds, out.scores)
    assert (out.recipes[0]["ranker"], out.recipes[0]["ranker_sha256"]) == ("unsaved", None)
    assert again.recipes[0]["ranker"] == str(tmp_path / "model")
    assert again.recipes[0]["ranker_sha256"] == file_sha256(tmp_path / "model" / "clip" / "model.safetensors")
    unranked = DallePipeline(tokenizer, dvae, transformer)(CAPTIONS[0])
    assert unranked.recipes[0]["ranker"] is None
    plain = loaded(CAPTIONS[0], num_images_per_prompt=2)
    assert plain.scores is not None and list(plain.scores) == sorted(plain.scores, reverse=True)


def test_a_models_default_number_of_candidates_is_drawn_and_kept_when_saved(
    pipe: DallePipeline, ranker: Ranker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    defaults = ModelDefaults(candidates=5)
    choosing = DallePipeline(pipe.tokenizer, pipe.dvae, pipe.transformer, defaults, ranker)
    out = choosing(CAPTIONS[0], num_images_per_prompt=2)
    expected = pipe(CAPTIONS[0], num_images_per_prompt=2, num_candidates=5, ranker=ranker)
    assert out.seeds == expected.seeds and len(out.images) == 2
    assert len(choosing(CAPTIONS[0], num_candidates=1, num_images_per_prompt=1).seeds) == 1
    choosing.save_pretrained(tmp_path / "model")
    assert DallePipeline.from_pretrained(tmp_path / "model").defaults == defaults
    plain = DallePipeline(pipe.tokenizer, pipe.dvae, pipe.transformer, defaults)
    assert plain(CAPTIONS[0], num_images_per_prompt=2).seeds == (0, 1)
    assert "needs a CLIP, which is missing: drawing 2" in caplog.text


def test_a_ranker_that_cannot_read_the_caption_is_refused_before_anything_is_drawn(
    pipe: DallePipeline,
) -> None:
    short = Tokenizer.train(CAPTIONS, TokenizerConfig(vocab_size=400, max_tokens=2, space_tokens=False))
    narrow = Ranker(tiny_clip(short), short)

    def never(*_: object) -> bool:
        raise AssertionError("something was drawn")

    with pytest.raises(ValueError, match=r"caption has \d+ tokens; the model reads 2"):
        pipe(CAPTIONS[0], num_candidates=4, ranker=narrow, callback_on_row_end=never)
