"""`dalle train`: tokenizer -> dVAE -> picture tokens -> transformer -> CLIP -> model folder, resumed by the same call.

OUT/                 the model folder, complete when the last stage ends
OUT/run/config.json  the recipe and what it was run on: a resume with anything else is refused
OUT/run/stages.json  each finished stage: what it was made from, and the hash of what came out
OUT/run/checkpoints/STAGE/inputs.json  what an unfinished stage is being made from
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from dalle import weights
from dalle.clip import CLIP
from dalle.config import differences
from dalle.data.pairs import BadSampleLog, PairSet, read_pairs
from dalle.data.tokens import Crop, TokenStore, encode_pairs
from dalle.dvae import DiscreteVAE
from dalle.generation.rerank import Ranker
from dalle.model_folder import check_fit, write_index, write_ranker_index
from dalle.tokenizer import Tokenizer
from dalle.training.card import write_card
from dalle.training.clip import CLIPStage
from dalle.training.dvae import DVAEStage
from dalle.training.log import LINE_SECONDS
from dalle.training.loop import Stage, train_stage
from dalle.training.recipe import Recipe, clip_config, transformer_config
from dalle.training.transformer import Sequences, TransformerStage
from dalle.transformer import Transformer

STAGES = ("tokenizer", "dvae", "transformer", "clip")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One call of `train`: everything its stages share."""

    out: Path
    recipe: Recipe
    data: str
    pairs: PairSet
    train: list[Any]
    held_out: list[Any]
    bad: BadSampleLog
    device: torch.device
    dtype: torch.dtype
    init_from: Path | None
    quiet: bool

    @property
    def folder(self) -> Path:
        """Where everything lives that is not the model."""
        return self.out / "run"


def train(
    data: str,
    out: Path,
    recipe: Recipe,
    *,
    init_from: Path | None = None,
    stages: tuple[str, ...] = STAGES,
    device: torch.device,
    dtype: torch.dtype,
    quiet: bool = False,
) -> Path:
    """Train all `stages` of `recipe` on the pairs in `data`; returns the model folder `out`.

    With `init_from`, its tokenizer and dVAE are reused and its transformer is continued; what it lacks is trained.
    Raises ValueError for bad data, a folder in use, or a resume that differs; `Stopped` after a signal.
    """
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise ValueError(f"stage {unknown[0]!r} is unknown: choose from {', '.join(STAGES)}")
    (out / "run").mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / "run" / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"{out}: another run is training in this folder; wait for it, or choose another --out"
        ) from None
    try:
        run = _prepare(data, out, recipe, init_from, device, dtype, quiet)
        _train(run, _with_settings(recipe, stages))
        return out
    finally:
        lock.release()


def _with_settings(recipe: Recipe, stages: tuple[str, ...]) -> tuple[str, ...]:
    """The stages that the recipe has settings for; ValueError when that is none of those asked for."""
    if recipe.clip is not None:
        return stages
    kept = tuple(stage for stage in stages if stage != "clip")
    if not kept:
        raise ValueError("stage clip needs the settings clip and clip_training, which this preset has not")
    return kept


def _train(run: Run, stages: tuple[str, ...]) -> None:
    """Run the stages in their order, each with what it needs of those before."""
    tokenizer, dvae = _tokenizer_stage(run), None
    clip = run.recipe.clip_training if "clip" in stages else None
    if {"dvae", "transformer"} & set(stages) or (clip is not None and clip.reconstructed > 0):
        if "dvae" not in stages and not _exists(run, "dvae"):
            raise ValueError(
                f"stage {stages[0]} needs a dVAE, and {run.out} has none: add dvae to --stages, or give --init-from"
            )
        if "transformer" in stages:
            _refuse_misfit(run, tokenizer)
        dvae = _dvae_stage(run)
    if "transformer" in stages and dvae is not None:
        _transformer_stage(run, tokenizer, dvae)
    if clip is not None:
        _clip_stage(run, tokenizer, dvae)
    _finish(run)


def _prepare(
    data: str,
    out: Path,
    recipe: Recipe,
    init_from: Path | None,
    device: torch.device,
    dtype: torch.dtype,
    quiet: bool,
) -> Run:
    pairs = read_pairs(data)
    pairs.require_mostly_good()
    counts = ", ".join(f"{split} {count}" for split, count in sorted(pairs.counts.items()))
    logger.info("%s: %d captioned pictures (%s); training uses split train", data, len(pairs), counts)
    if pairs.bad:
        logger.warning("%s: %d bad samples are left out; see run/bad_samples.jsonl", data, len(pairs.bad))
    learned = [pair for pair in pairs if pair.split == "train"]
    held_out = [pair for pair in pairs if pair.split == "validation"]
    held_out = held_out or [pair for pair in pairs if pair.split not in ("train", "excluded")]
    if not learned or not held_out:
        raise ValueError(
            f"{data}: training needs pictures of split train and some held out; found {counts or 'none'}"
        )
    bad = BadSampleLog(out / "run" / "bad_samples.jsonl", total=len(pairs) + len(pairs.bad))
    for sample in pairs.bad:
        bad.add(sample.key, sample.reason)
    config = {
        "recipe": recipe.model_dump(mode="json"),
        "data": pairs.fingerprint,
        "dtype": str(dtype).removeprefix("torch."),
        "init_from": _init_identity(init_from, out),
    }
    _refuse_other_settings(out / "run" / "config.json", config, out)
    return Run(out, recipe, data, pairs, learned, held_out, bad, device, dtype, init_from, quiet)


def _refuse_other_settings(path: Path, config: dict[str, Any], out: Path) -> None:
    if path.exists():
        changed = differences(weights.read_json(path), config)
        if changed:
            raise ValueError(
                f"{out} was begun with other settings or data ({'; '.join(changed)}): give the old ones to go on, or "
                f"another --out (--init-from {out} reuses its finished stages)"
            )
    elif (out / "model_index.json").exists():
        raise ValueError(
            f"{out} holds a model that was not trained there: choose another --out (--init-from {out} starts from it)"
        )
    else:
        weights.write_json(path, config)


def _init_identity(init_from: Path | None, out: Path) -> dict[str, str]:
    """The hashes of the components in `init_from`, so that a resume notices another one."""
    if init_from is None:
        return {}
    if not init_from.is_dir():
        raise ValueError(f"--init-from {init_from}: no such folder")
    if init_from.resolve() == out.resolve():
        raise ValueError(
            f"--init-from {init_from} is --out as well, and would be overwritten: choose another --out"
        )
    files = {stage: "tokenizer.json" if stage == "tokenizer" else "model.safetensors" for stage in STAGES}
    found = {
        name: weights.file_sha256(init_from / name / file)
        for name, file in files.items()
        if (init_from / name / file).is_file()
    }
    if not found:
        raise ValueError(f"--init-from {init_from}: holds no tokenizer, dvae, transformer or clip folder")
    return found


def _given(run: Run, component: str) -> Path | None:
    """The folder of `component` in --init-from, if it is there."""
    folder = run.init_from / component if run.init_from else None
    return folder if folder and folder.is_dir() else None


def _records(run: Run) -> dict[str, dict[str, Any]]:
    path = run.folder / "stages.json"
    return dict(weights.read_json(path)) if path.exists() else {}


def _exists(run: Run, stage: str) -> bool:
    return stage in _records(run) or _given(run, stage) is not None


def _finished(run: Run, stage: str, inputs: dict[str, Any], result: str | None) -> bool:
    """Whether `stage` is done, from these very inputs, and its result untouched; a stale one is an error."""
    record = _records(run).get(stage)
    if record is None:
        # The folder is no finished model from now on; its new parts would not be those of the old manifest.
        for name in (weights.MANIFEST, "model_index.json"):
            (run.out / name).unlink(missing_ok=True)
        return False
    changed = differences(record["inputs"], inputs)
    if changed or record["result"] != result:
        _refuse_stale(run, stage, changed or [f"the files in {run.out / stage} are not what the stage wrote"])
    return True


def _begin(run: Run, stage: str, inputs: dict[str, Any]) -> None:
    """Note beside its checkpoints what `stage` is made from; those that were made from other things are an error."""
    begun = run.folder / "checkpoints" / stage / "inputs.json"
    if not begun.exists():
        weights.write_json(begun, inputs)
    changed = differences(weights.read_json(begun), inputs)
    if changed:
        _refuse_stale(run, stage, changed)


def _refuse_stale(run: Run, stage: str, changed: list[str]) -> NoReturn:
    raise ValueError(
        f"stage {stage} in {run.out} is stale ({'; '.join(changed)}): delete {run.out / stage} and "
        f"{run.folder / 'checkpoints' / stage}, and its entry in {run.folder / 'stages.json'}, to run it again"
    )


def _record(run: Run, stage: str, inputs: dict[str, Any], result: str) -> None:
    records = _records(run)
    records[stage] = {"inputs": inputs, "result": result}
    weights.write_json(run.folder / "stages.json", records)


def _file_hash(path: Path) -> str | None:
    return weights.file_sha256(path) if path.is_file() else None


def _tokenizer_stage(run: Run) -> Tokenizer:
    folder = run.out / "tokenizer"
    inputs = {"settings": run.recipe.tokenizer.model_dump(mode="json"), "data": run.pairs.fingerprint}
    given = _given(run, "tokenizer")
    if given:
        inputs = {"given": weights.file_sha256(given / "tokenizer.json")}
    if not _finished(run, "tokenizer", inputs, _file_hash(folder / "tokenizer.json")):
        if given:
            Tokenizer.from_pretrained(given)  # refuses a damaged one
            _copy(given, folder, "tokenizer.json")
        else:
            captions = [caption for pair in run.train for caption in pair.captions]
            Tokenizer.train(captions, run.recipe.tokenizer).save_pretrained(folder)
        _record(run, "tokenizer", inputs, weights.file_sha256(folder / "tokenizer.json"))
    return Tokenizer.from_pretrained(folder)


def _refuse_misfit(run: Run, tokenizer: Tokenizer) -> None:
    """A given transformer must fit its tokenizer and dVAE: said before hours are spent on a dVAE."""
    given, dvae = _given(run, "transformer"), _given(run, "dvae")
    if given is None:
        return
    with torch.device("meta"):  # only its sizes count
        unborn = DiscreteVAE(run.recipe.dvae)
    check_fit(
        tokenizer, DiscreteVAE.from_pretrained(dvae) if dvae else unborn, Transformer.from_pretrained(given)
    )


def _dvae_stage(run: Run) -> DiscreteVAE:
    recipe, folder = run.recipe, run.out / "dvae"
    given = _given(run, "dvae")
    inputs: dict[str, Any] = {
        "model": recipe.dvae.model_dump(mode="json"),
        "training": recipe.dvae_training.model_dump(mode="json"),
        "data": run.pairs.fingerprint,
    }
    if given:
        inputs = {"given": weights.file_sha256(given / "model.safetensors")}
    if not _finished(run, "dvae", inputs, _file_hash(folder / "model.safetensors")):
        if given:
            DiscreteVAE.from_pretrained(given)  # refuses a damaged one
            _copy(given, folder, "model.safetensors")
            _record(run, "dvae", inputs, weights.file_sha256(folder / "model.safetensors"))
        else:
            torch.manual_seed(recipe.seed)  # the models draw their first weights from the global generator
            model = DiscreteVAE(recipe.dvae).to(run.device)
            stage = DVAEStage(
                model,
                recipe.dvae_training,
                run.train,
                run.held_out,
                run.bad,
                seed=recipe.seed,
                balance=recipe.balance,
            )
            _save(run, "dvae", model, _run_stage(run, stage, inputs), inputs)
    return DiscreteVAE.from_pretrained(folder).to(run.device).eval()


def _copy(given: Path, folder: Path, file: str) -> None:
    """Reuse a component as it is, byte for byte: writing it anew could change its dtype or its hash."""
    for name in (file, "config.json"):
        weights.write_bytes(folder / name, (given / name).read_bytes())


def _run_stage(run: Run, stage: Stage, inputs: dict[str, Any]) -> dict[str, Tensor]:
    _begin(run, stage.name, inputs)
    return train_stage(stage, run.folder, run.dtype, run.quiet)


def _save(run: Run, stage: str, model: nn.Module, state: dict[str, Tensor], inputs: dict[str, Any]) -> None:
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[run.recipe.weights]
    stored = {
        name: tensor.detach().cpu().to(dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in state.items()
    }
    folder = run.out / stage
    folder.mkdir(exist_ok=True)
    weights.save_component(folder, model.config, stored)  # type: ignore[arg-type]
    _record(run, stage, inputs, weights.file_sha256(folder / "model.safetensors"))


def _transformer_stage(run: Run, tokenizer: Tokenizer, dvae: DiscreteVAE) -> None:
    recipe, folder = run.recipe, run.out / "transformer"
    stores = _encode(run, dvae)
    given = _given(run, "transformer")
    inputs: dict[str, Any] = {
        "model": recipe.transformer.model_dump(mode="json"),
        "training": recipe.transformer_training.model_dump(mode="json"),
        "tokenizer": tokenizer.fingerprint,
        "dvae": weights.file_sha256(run.out / "dvae" / "model.safetensors"),
        "data": run.pairs.fingerprint,
    }
    if given:
        inputs |= {"model": {}, "given": weights.file_sha256(given / "model.safetensors")}
    if _finished(run, "transformer", inputs, _file_hash(folder / "model.safetensors")):
        return
    torch.manual_seed(recipe.seed)
    if given:
        model = Transformer.from_pretrained(given)
    else:
        config = transformer_config(recipe.transformer, dvae.config, tokenizer.n_vocab, tokenizer.max_tokens)
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
    )
    if stage.n_truncated:
        logger.warning(
            "%d pictures have no caption that fits %d tokens: cut", stage.n_truncated, tokenizer.max_tokens
        )
    _save(run, "transformer", model, _run_stage(run, stage, inputs), inputs)


def _clip_stage(run: Run, tokenizer: Tokenizer, dvae: DiscreteVAE | None) -> None:
    recipe, folder, given = run.recipe, run.out / "clip", _given(run, "clip")
    assert recipe.clip is not None and recipe.clip_training is not None  # the recipe's validator said so
    seen = run.out / "dvae" / "model.safetensors" if recipe.clip_training.reconstructed else None
    inputs: dict[str, Any] = {
        "model": recipe.clip.model_dump(mode="json"),
        "training": recipe.clip_training.model_dump(mode="json"),
        "seed": recipe.seed,
        "tokenizer": tokenizer.fingerprint,
        "dvae": weights.file_sha256(seen) if seen else None,
        "data": run.pairs.fingerprint,
    }
    if given:
        inputs |= {"model": {}, "given": weights.file_sha256(given / "model.safetensors")}
    if _finished(run, "clip", inputs, _file_hash(folder / "model.safetensors")):
        return
    torch.manual_seed(recipe.seed)
    model = (
        CLIP.from_pretrained(given)
        if given
        else CLIP(clip_config(recipe.clip, tokenizer.n_vocab, tokenizer.max_tokens))
    )
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
    )
    _save(run, "clip", model, _run_stage(run, stage, inputs), inputs)


def _encode(run: Run, dvae: DiscreteVAE) -> list[TokenStore]:
    """All pictures as tokens, as often as the recipe says; held-out ones are looked at in the first encoding."""
    training, seed = run.recipe.transformer_training, run.recipe.seed
    further: Crop = "near" if training.crop == "center" else training.crop
    n = training.n_encodings
    names = ["encoding"] if n == 1 else [f"encoding {i} of {n}" for i in range(1, n + 1)]
    return [
        encode_pairs(
            run.pairs,
            dvae,
            run.folder,
            crop=further if i else training.crop,
            seed=seed + i,
            progress=None if run.quiet else _encoding_lines(name),
        )
        for i, name in enumerate(names)
    ]


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
            left = int((now - began) / max(done - first, 1) * (total - done))
            logger.info("%s: %d/%d pictures  ETA %d:%02d", name, done, total, left // 60, left % 60)

    return say


def sequences(stores: list[TokenStore], pairs: list[Any]) -> Sequences:
    """The readable ones of `pairs` with their tokens in every store; ValueError when there are none."""
    index = {stores[0].keys[row]: row for row in stores[0].valid.tolist()}
    kept = [pair for pair in pairs if pair.key in index]
    if not kept:
        raise ValueError(f"no picture of split {pairs[0].split} can be read; see run/bad_samples.jsonl")
    rows = [index[pair.key] for pair in kept]
    return Sequences(kept, [store.tokens[rows] for store in stores])


def _finish(run: Run) -> None:
    """Write the card, model_index.json and, last, the manifest: the folder is a model from then on.

    Without a transformer, a CLIP and its tokenizer are a ranker.
    """
    done = _records(run)
    if "transformer" in done:
        write_card(run.out, run.recipe, run.data, run.pairs, run.init_from)
        write_index(run.out, run.recipe.sampling)
    elif "clip" in done:
        write_ranker_index(run.out)
