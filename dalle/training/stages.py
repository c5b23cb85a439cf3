"""The stages of a run, each from what it needs to a component in the model folder, or reused from --init-from."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dalle import files, weights
from dalle.clip import CLIP
from dalle.config import Config, validate
from dalle.data.tokens import Crop, TokenStore, encode_part
from dalle.dvae import DiscreteVAE, DVAEConfig
from dalle.generation.rerank import Ranker
from dalle.image_tokenizer import ImageTokenizer
from dalle.model_folder import OPTIONAL, check_fit, load_image_tokenizer
from dalle.tokenizer import Tokenizer
from dalle.training.clip import CLIPStage
from dalle.training.decoder import DecoderStage
from dalle.training.dvae import DVAEStage
from dalle.training.forecast import work_after
from dalle.training.log import LINE_SECONDS, duration
from dalle.training.loop import Stage, train_stage
from dalle.training.recipe import DistributedConfig, clip_config, transformer_config
from dalle.training.run import Run
from dalle.training.transformer import Sequences, TransformerStage
from dalle.training.wrong_tokens import Source, TransformerDraws, of_another_picture
from dalle.transformer import Transformer

logger = logging.getLogger(__name__)


def tokenizer_stage(run: Run) -> Tokenizer:
    folder = run.out / "tokenizer"
    inputs = {"settings": run.recipe.tokenizer.model_dump(mode="json"), "data": run.pairs.fingerprint}
    given = run.given("tokenizer")
    if given:
        inputs = {"given": files.file_sha256(given / "tokenizer.json")}
    with run.world.main_first():
        if not run.finished("tokenizer", inputs, _file_hash(folder / "tokenizer.json")):
            if given:
                Tokenizer.from_pretrained(given)  # refuses a damaged one
                logger.info("tokenizer: reused from %s; [tokenizer] has no effect", given)
                _copy(given, folder, "tokenizer.json")
            else:
                captions = [caption for pair in run.train for caption in pair.captions]
                Tokenizer.train(captions, run.recipe.tokenizer).save_pretrained(folder)
            run.record("tokenizer", inputs, files.file_sha256(folder / "tokenizer.json"))
    return Tokenizer.from_pretrained(folder)


def refuse_misfit(run: Run, tokenizer: Tokenizer) -> None:
    """A given transformer must fit its tokenizer and dVAE: said before hours are spent on a dVAE."""
    given, dvae = run.given("transformer"), run.given("dvae")
    if given is None:
        return
    with torch.device("meta"):  # only its sizes count
        unborn = DiscreteVAE(run.recipe.dvae)
    check_fit(
        tokenizer, DiscreteVAE.from_pretrained(dvae) if dvae else unborn, Transformer.from_pretrained(given)
    )


def tokens_folder(run: Run) -> Path:
    """Where stage dvae writes: where a decoder follows, what it makes is no part of the model yet."""
    return run.out / "dvae" if run.recipe.decoder_training is None else run.folder / "dvae"


def dvae_stage(run: Run) -> ImageTokenizer:
    recipe, folder = run.recipe, tokens_folder(run)
    given = run.given("dvae")
    config = recipe.dvae if recipe.decoder_training is None else recipe.dvae.mirrored()
    inputs: dict[str, Any] = {
        "model": config.model_dump(mode="json"),
        "training": recipe.dvae_training.model_dump(mode="json"),
        "data": run.pairs.fingerprint,
    }
    if given and "dvae" not in run.continued:
        inputs = {"given": files.file_sha256(given / "model.safetensors")}
        with run.world.main_first():
            if not run.finished("dvae", inputs, _file_hash(folder / "model.safetensors")):
                load_image_tokenizer(given, run.kind("dvae"))  # refuses a damaged one
                logger.info("dvae: reused from %s, not trained; [dvae_training] has no effect", given)
                _copy(given, folder, "model.safetensors")
                run.record("dvae", inputs, files.file_sha256(folder / "model.safetensors"))
        reused = load_image_tokenizer(folder, run.kind("dvae"))
        reused.to(run.device)
        return reused
    if given:
        inputs |= {"model": {}, "given": files.file_sha256(given / "model.safetensors")}
    if not run.finished("dvae", inputs, _file_hash(folder / "model.safetensors")):
        torch.manual_seed(recipe.seed)  # the models draw their first weights from the global generator
        model = (DiscreteVAE.from_pretrained(given) if given else DiscreteVAE(config)).to(run.device)
        stage = DVAEStage(
            model,
            recipe.dvae_training,
            run.train,
            run.held_out,
            run.bad,
            seed=recipe.seed,
            balance=recipe.balance,
            world=run.world,
        )
        state = _run_stage(run, stage, inputs)
        _save(run, "dvae", config, lambda: _stored(run, state), inputs, folder)
    return DiscreteVAE.from_pretrained(folder).to(run.device).eval()


def decoder_stage(run: Run, stages: tuple[str, ...]) -> DiscreteVAE:
    """Train the decoder that the recipe's [dvae] describes for the tokens of stage dvae, or take over a given one.

    A given dVAE is taken over whole, unless its decoder has other sizes or `stages` names the decoder without the dvae:
    then one of the same sizes is trained on.
    """
    recipe, source, folder = run.recipe, tokens_folder(run), run.out / "dvae"
    assert recipe.decoder_training is not None
    config = validate(DVAEConfig, files.read_json(source / "config.json"), str(source / "config.json"))
    is_trained = run.given("dvae") is None or "decoder" in stages
    if "decoder" in run.records():
        is_trained = "given" not in run.records()["decoder"]["inputs"]
    elif is_trained and run.given("dvae") is not None and "dvae" in stages:
        is_trained = config.trunk == "light" and not config.draws_as(recipe.dvae)
    inputs: dict[str, Any] = {"given": files.file_sha256(source / "model.safetensors")}
    if is_trained:
        wanted = config.drawing_as(recipe.dvae)
        tensors = weights.load_tensors(source / "model.safetensors")
        encoder = {name: tensor for name, tensor in tensors.items() if name.startswith("encoder.")}
        inputs = {
            "model": wanted.model_dump(mode="json"),
            "training": recipe.decoder_training.model_dump(mode="json"),
            "encoder": weights.tensors_sha256(encoder),
            "data": run.pairs.fingerprint,
        }
        own = {name: tensor for name, tensor in tensors.items() if name.startswith("decoder.")}
        if run.given("dvae") is not None and config.draws_as(wanted):
            inputs["continued"] = weights.tensors_sha256(own)
        else:
            own = {}
        if recipe.decoder_training.replaced_by == "transformer":
            inputs["transformer"] = _file_hash(_drawing_transformer(run) / "model.safetensors")
    if not run.finished("decoder", inputs, _file_hash(folder / "model.safetensors")):
        if is_trained:
            _train_decoder(run, wanted, encoder, own, inputs)
        else:
            _keep(run, "decoder", source, folder)
    return DiscreteVAE.from_pretrained(folder).to(run.device).eval()


def _drawing_transformer(run: Run) -> Path:
    folder = run.given("transformer")
    if folder is None:
        raise ValueError(
            "decoder_training.replaced_by is transformer, and none is given: name a model with one by --init-from, or set "
            "it to picture"
        )
    return folder


def _train_decoder(
    run: Run, wanted: DVAEConfig, encoder: dict[str, Tensor], own: dict[str, Tensor], inputs: dict[str, Any]
) -> None:
    """Train it from `own` weights, which may be those of a given one; from random ones if there are none."""
    recipe, folder = run.recipe, run.out / "dvae"
    assert recipe.decoder_training is not None
    torch.manual_seed(recipe.seed)
    model = DiscreteVAE(wanted).to(run.device)
    weights.load_strict(model, model.state_dict() | encoder | own, "dvae")
    wrong: Source = of_another_picture
    if recipe.decoder_training.replaced_by == "transformer":
        tokenizer = Tokenizer.from_pretrained(run.out / "tokenizer")
        transformer = Transformer.from_pretrained(_drawing_transformer(run)).float().to(run.device)
        check_fit(tokenizer, model, transformer)
        wrong = TransformerDraws(transformer, tokenizer, run.train)
    stage = DecoderStage(
        model,
        recipe.decoder_training,
        run.train,
        run.held_out,
        run.bad,
        seed=recipe.seed,
        balance=recipe.balance,
        world=run.world,
        wrong=wrong,
    )
    # Several megabytes: each process can hold all of it, whatever the transformer needs.
    whole = recipe.distributed.model_copy(update={"mode": "ddp", "shard_size": None})
    state = _run_stage(run, stage, inputs, whole)
    decoder = {name: tensor for name, tensor in state.items() if name.startswith("decoder.")}
    # The encoder is stored as it was read, so that tokens stay the same bit for bit.
    _save(run, "decoder", wanted, lambda: encoder | _stored(run, decoder), inputs, folder)


def transformer_stage(run: Run, tokenizer: Tokenizer, dvae: ImageTokenizer) -> None:
    recipe, folder = run.recipe, run.out / "transformer"
    given = run.given("transformer")
    inputs: dict[str, Any] = {
        "model": recipe.transformer.model_dump(mode="json"),
        "training": recipe.transformer_training.model_dump(mode="json"),
        "tokenizer": tokenizer.fingerprint,
        "dvae": files.file_sha256(tokens_folder(run) / "model.safetensors"),
        "data": run.pairs.fingerprint,
    }
    if given:
        inputs |= {"model": {}, "given": files.file_sha256(given / "model.safetensors")}
    if run.finished("transformer", inputs, _file_hash(folder / "model.safetensors")):
        return
    stores = _encode(run, dvae)
    torch.manual_seed(recipe.seed)
    if given:
        model = Transformer.from_pretrained(given)
        logger.info("transformer: goes on from the weights in %s", given)
    else:
        config = transformer_config(recipe.transformer, dvae, tokenizer.n_vocab, tokenizer.max_tokens)
        model = Transformer(config)
    check_fit(tokenizer, dvae, model)
    model.to(device=run.device, dtype=torch.float32)
    stage = TransformerStage(
        model,
        recipe.transformer_training,
        tokenizer,
        dvae,
        sequences(stores, run.train),
        sequences(stores[:1], run.held_out),
        seed=recipe.seed,
        balance=recipe.balance,
        sampling=recipe.sampling,
        world=run.world,
    )
    if stage.n_truncated:
        logger.warning(
            "%d pictures have no caption that fits %d tokens: cut", stage.n_truncated, tokenizer.max_tokens
        )
    state = _run_stage(run, stage, inputs)
    _save(run, "transformer", model.config, lambda: _stored(run, state), inputs, folder)


def clip_stage(run: Run, tokenizer: Tokenizer, dvae: ImageTokenizer | None) -> None:
    recipe, folder, given = run.recipe, run.out / "clip", run.given("clip")
    assert recipe.clip is not None and recipe.clip_training is not None  # the recipe's validator said so
    drawing = run.out / "dvae" if "decoder" in run.records() else tokens_folder(run)
    seen = drawing / "model.safetensors" if recipe.clip_training.reconstructed else None
    inputs: dict[str, Any] = {
        "model": recipe.clip.model_dump(mode="json"),
        "training": recipe.clip_training.model_dump(mode="json"),
        "seed": recipe.seed,
        "tokenizer": tokenizer.fingerprint,
        "dvae": files.file_sha256(seen) if seen else None,
        "data": run.pairs.fingerprint,
    }
    if given:
        inputs |= {"model": {}, "given": files.file_sha256(given / "model.safetensors")}
    if run.finished("clip", inputs, _file_hash(folder / "model.safetensors")):
        return
    torch.manual_seed(recipe.seed)
    if given:
        model = CLIP.from_pretrained(given)
        logger.info("clip: goes on from the weights in %s", given)
        if recipe.clip_training.image_size is not None:
            model = model.at_image_size(recipe.clip_training.image_size)
    else:
        model = CLIP(clip_config(recipe.clip, tokenizer.n_vocab, tokenizer.max_tokens))
    Ranker(model, tokenizer, str(given))  # refuses a given one that reads other tokens
    if model.config.loss == "siglip" and not given:
        model.set_bias_(recipe.clip_training.batch_size * recipe.clip_training.accumulation)
    stage = CLIPStage(
        model.to(device=run.device, dtype=torch.float32),
        recipe.clip_training,
        tokenizer,
        dvae,
        run.train,
        run.held_out,
        run.bad,
        seed=recipe.seed,
        balance=recipe.balance,
        world=run.world,
    )
    state = _run_stage(run, stage, inputs)
    _save(run, "clip", model.config, lambda: _stored(run, state), inputs, folder)


def keep_given_transformer(run: Run) -> None:
    """Take over the transformer of --init-from byte for byte, where no stage has made another."""
    given = run.given("transformer")
    if given is not None and "transformer" not in run.records():
        _keep(run, "transformer", given, run.out / "transformer")


def keep_given_clips(run: Run) -> None:
    """Copy the CLIPs that are given and were not trained, unless captions have other tokens than they read."""
    tokenizer = run.given("tokenizer")
    for name in OPTIONAL:
        given = run.given(name)
        if given is None or name in run.records():
            continue
        clip = CLIP.from_pretrained(given)  # refuses a damaged one
        if clip.config.text_tokens == "dalle" and tokenizer is None:
            logger.warning("%s: left out of %s, whose tokenizer is another one", given, run.out)
            continue
        for path in sorted(given.iterdir()):
            files.write_bytes(run.out / name / path.name, path.read_bytes())


def _encode(run: Run, dvae: ImageTokenizer) -> list[TokenStore]:
    """All pictures as tokens, as often as the recipe says; held-out ones are looked at in the first encoding."""
    training, seed = run.recipe.transformer_training, run.recipe.seed
    further: Crop = "near" if training.crop == "center" else training.crop
    n = training.n_encodings
    names = ["encoding"] if n == 1 else [f"encoding {i} of {n}" for i in range(1, n + 1)]
    folders = [
        encode_part(
            run.pairs,
            dvae,
            run.folder,
            crop=further if i else training.crop,
            seed=seed + i,
            progress=None if run.quiet else _encoding_lines(name),
            rank=run.world.rank,
            n_processes=run.world.size,
            max_bad=run.data.max_bad,
        )
        for i, name in enumerate(names)
    ]
    run.world.wait()  # each process has encoded its shards
    return [TokenStore(folder) for folder in folders]


def _encoding_lines(name: str) -> Callable[[int, int], None]:
    """Says now and then how many pictures are encoded, and how long the rest of them takes."""
    began = last = time.monotonic()
    first: int | None = None  # pictures that were done before

    def say(done: int, total: int) -> None:
        nonlocal last, first
        first = done if first is None else first
        now = time.monotonic()
        if now - last >= LINE_SECONDS:
            last = now
            left = duration((now - began) / max(done - first, 1) * (total - done))
            logger.info("%s: %d/%d pictures  ETA %s", name, done, total, left)

    return say


def sequences(stores: list[TokenStore], pairs: list[Any]) -> Sequences:
    """The readable ones of `pairs` with their tokens in every store; ValueError when there are none."""
    index = {stores[0].keys[row]: row for row in stores[0].valid.tolist()}
    kept = [pair for pair in pairs if pair.key in index]
    if not kept:
        raise ValueError(f"no picture of split {pairs[0].split} can be read; see run/bad_samples.jsonl")
    rows = [index[pair.key] for pair in kept]
    return Sequences(kept, [store.tokens.take(rows) for store in stores])


def _run_stage(
    run: Run, stage: Stage, inputs: dict[str, Any], distributed: DistributedConfig | None = None
) -> dict[str, Tensor]:
    run.begin(stage.name, inputs)
    layout, later = distributed or run.recipe.distributed, work_after(stage.name, run)
    return train_stage(stage, run.folder, run.dtype, run.quiet, run.world, layout, later)


def _save(
    run: Run,
    stage: str,
    config: Config,
    tensors: Callable[[], dict[str, Tensor]],
    inputs: dict[str, Any],
    folder: Path,
) -> None:
    """Write the component that a stage made; the main process alone has all of its tensors."""
    with run.world.main_first():
        if run.world.is_main:
            folder.mkdir(exist_ok=True)
            weights.save_component(folder, config, tensors())
            run.record(stage, inputs, files.file_sha256(folder / "model.safetensors"))


def _stored(run: Run, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A stage's tensors in the dtype that the recipe stores."""
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[run.recipe.weights]
    return {
        name: tensor.detach().cpu().to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in state.items()
    }


def _keep(run: Run, stage: str, source: Path, folder: Path) -> None:
    with run.world.main_first():
        if run.world.is_main:
            folder.mkdir(exist_ok=True)
            _copy(source, folder, "model.safetensors")
            found = files.file_sha256(folder / "model.safetensors")
            run.record(stage, {"given": found}, found)


def _copy(given: Path, folder: Path, file: str) -> None:
    """Reuse a component as it is, byte for byte: writing it anew could change its dtype or its hash."""
    for name in (file, "config.json"):
        files.write_bytes(folder / name, (given / name).read_bytes())


def _file_hash(path: Path) -> str | None:
    return files.file_sha256(path) if path.is_file() else None
