"""The recipe of a whole training run: what a preset sets, stage by stage (Ramesh et al. 2021, App. A.2 and B.2)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from dalle.attention import LayerKind
from dalle.clip import CLIPConfig
from dalle.config import Config, differences, load_preset, override, validate
from dalle.dvae import DVAEConfig
from dalle.files import read_json
from dalle.generation.request import ModelDefaults
from dalle.image_tokenizer import ImageTokenizer
from dalle.model_folder import OURS, component_kind
from dalle.published.dalle_pytorch_vae import DallePytorchVAEConfig
from dalle.published.vqgan import VQGANConfig
from dalle.tokenizer import TokenizerConfig
from dalle.transformer import TransformerConfig


class Compression(Config):
    """PowerSGD between replicas (§2.5, App. E): `dalle.training.compression` says how, and when it pays."""

    rank: int = Field(ge=1)  # of what one process holds of a matrix; paper 112, which is 896 over 8 shards
    error_feedback: bool = True
    errors: Literal["fp32", "1-6-9"] = "fp32"  # how the error buffers are stored; paper 1-6-9
    always: bool = False  # even where the factors are no smaller than the matrix


class DistributedConfig(Config):
    """How a model is laid out over processes and within one; it decides speed and memory, not what is learned."""

    # each process holds all (DDP); a part (FSDP2); or a part, with a replica in every group of processes
    mode: Literal["ddp", "shard", "hybrid"] = "ddp"
    # hybrid: processes that share one copy of the weights; None: those of one machine, as the launcher counts them
    shard_size: int | None = Field(None, ge=1)
    checkpoint_blocks: bool = False  # recompute each block's activations in the backward pass (§2.4)
    compile_blocks: bool = False  # torch.compile, block by block
    async_checkpoints: bool = False  # written while training goes on; costs their size in main memory

    @model_validator(mode="after")
    def _shard_size_is_of_hybrid(self) -> Self:
        if self.shard_size is not None and self.mode != "hybrid":
            raise ValueError(f"shard_size belongs to mode hybrid, and mode is {self.mode}")
        return self


IN_ONE_PIECE = DistributedConfig(shard_size=None)
STAGE_SETTINGS = ("dvae_training", "transformer_training", "clip_training")
RELAXATION = ("kl_weight", "kl_steps", "final_temperature", "temperature_steps")  # of the quantizer gumbel


class Optimization(Config):
    """Settings that every stage shares: length, batches, AdamW, averaging, and how often to look."""

    steps: int = Field(ge=1)  # updates
    batch_size: int = Field(ge=1)  # pictures a micro-batch, of all processes together
    accumulation: int = Field(1, ge=1)  # micro-batches an update
    learning_rate: float = Field(gt=0)  # peak
    final_learning_rate: float = Field(ge=0)
    warmup_steps: int = Field(0, ge=0)  # linear, 0 -> peak
    decay: Literal["cosine", "plateau"] = "cosine"  # plateau: halved when the training loss stalls (App. B.2)
    decay_steps: int | None = Field(None, ge=1)  # None: until the last step
    # adamw16: the paper's, its variance clipped and its moments in 16 bits; muon: for the matrices of the layers.
    optimizer: Literal["adamw", "adamw16", "muon"] = "adamw"
    # auto: --dtype's; fp16_resblock: the paper's, a gradient scale for each resblock (`dalle.training.precision`)
    precision: Literal["auto", "fp32", "bf16", "fp16_resblock"] = "auto"
    compression: Compression | None = None  # of gradients between replicas, where there are any
    beta2: float = Field(0.999, gt=0, lt=1)
    weight_decay: float = Field(ge=0)  # matrices only: gains, biases and embeddings are not decayed
    clip_norm: float | None = Field(None, gt=0)
    average_decay: float = Field(
        ge=0, lt=1
    )  # exponential moving average of the weights: what the model ships
    average_every: int = Field(1, ge=1)  # updates
    average_on_cpu: bool = False  # kept in main memory and moved while the device goes on (App. B.2)
    validate_every: int = Field(ge=1)  # updates
    checkpoint_every: int = Field(ge=1)  # updates
    sheet_every: int = Field(ge=1)  # updates between sample sheets
    n_validation: int = Field(512, ge=1)  # held-out pictures a validation looks at
    # Validations in a row without a better one that end the stage, which then ships the weights of its best one, the
    # start included; None: all steps are taken, and the last weights shipped.
    patience: int | None = Field(None, ge=1)


class DVAETraining(Optimization):
    """Stage 1 (App. A.2): the schedules of the relaxation belong to the quantizer gumbel; FSQ has none."""

    crop: Literal[
        "paper", "center", "near"
    ]  # Listing 1; the whole picture; nearly all of it, drawn anew each epoch
    kl_weight: float = Field(0.0, ge=0)  # beta, paper 6.6
    kl_steps: int = Field(1, ge=1)  # 0 -> beta, paper 5,000
    final_temperature: float = Field(0.0625, gt=0)  # tau, from 1; paper 1/16
    temperature_steps: int = Field(1, ge=1)  # paper 150,000
    # Weight of the distance in `dalle.training.perceptual`: so that tokens carry meaning; paper: none
    feature_weight: float = Field(0.0, ge=0)
    # What a pixel counts in a token's patch with ink, beside 1 in a blank one: most of an emoji is white; paper: 1
    ink_weight: float = Field(1.0, gt=0)


class DecoderTraining(Optimization):
    """Stage "decoder": the dVAE's encoder and codes stay, a decoder of the sizes in [dvae] is trained for them."""

    crop: Literal["shift", "center"]  # the whole picture, moved by up to 1/16 of its side; or always as it is
    feature_weight: float = Field(
        0.0, ge=0
    )  # of the distance in `dalle.training.perceptual`, beside L1 + MSE
    # Share of tokens that are wrong, and whose they are: another picture's at the same place, or what the transformer of
    # --init-from draws there
    token_noise: float = Field(0.0, ge=0, lt=1)
    replaced_by: Literal["picture", "transformer"] = "picture"
    # The critic's share of the gradient (`dalle.training.critic`), and the update from which the decoder listens to it
    adversarial_share: float = Field(0.0, ge=0)
    adversarial_start: int = Field(0, ge=0)


class TransformerTraining(Optimization):
    """Stage 2 (App. B.2): captions are encoded anew each epoch, picture tokens once."""

    crop: Literal["paper", "center"]  # Listing 2, or the whole picture
    # Times that each picture is cropped and encoded, of which every epoch takes one; beyond the first a whole picture
    # becomes nearly the whole. differs: the paper, which sees its data once, draws a new crop each time.
    n_encodings: int = Field(1, ge=1)
    bpe_dropout: float = Field(ge=0, lt=1)  # paper 0.1
    caption_dropout: float = Field(ge=0, lt=1)  # share of empty captions, for guidance; paper: none
    # For data that are seen many times; paper: neither. Of each resblock's output channels (`StreamDropout`), and
    # of the image tokens read, which become any others (1 - pkeep of Esser et al. 2021, "Taming Transformers").
    dropout: float = Field(0.0, ge=0, lt=1)
    token_noise: float = Field(0.0, ge=0, lt=1)


class CLIPTraining(Optimization):
    """Stage 3 (Radford et al. 2021, §2.5): a batch's pictures are all different, one caption each."""

    crop: Literal["near", "center"]  # nearly the whole picture, drawn anew each epoch; or always all of it
    bpe_dropout: float = Field(0.0, ge=0, lt=1)
    reconstructed: float = Field(
        0.0, ge=0, le=1
    )  # share of pictures seen through the dVAE, as candidates will be
    frozen: Literal["nothing", "image"] = "nothing"  # image: only the text tower learns (Zhai et al. 2022)
    image_size: int | None = Field(
        None, ge=1
    )  # train a given CLIP on at another size (§3.2: 336 px for the last epoch)
    half_of: str | None = None  # a field: train on those of its values whose hash is even; for a judge


class CLIPShape(Config):
    """CLIP's own sizes; the text tower's vocabulary and length follow from the tokenizer. See `CLIPConfig`."""

    d_embed: int = Field(ge=1)
    image_size: int = Field(ge=1)
    image_tower: Literal["vit", "resnet"]
    image_layers: int | tuple[int, int, int, int]
    image_width: int = Field(ge=1)
    patch_size: int | None = None
    text_layers: int = Field(ge=1)
    text_width: int = Field(ge=1)
    activation: Literal["quick_gelu", "gelu"] = "gelu"
    loss: Literal["infonce", "siglip"] = "infonce"


class TransformerShape(Config):
    """The transformer's own sizes; vocabularies and grid follow from tokenizer and dVAE."""

    n_layers: int = Field(ge=1)
    n_heads: int = Field(ge=1)
    d_head: int = Field(ge=1)
    conv_kernel: int = Field(11, ge=1)
    layers: Literal["paper", "dense"] | tuple[LayerKind, ...] = "paper"


class Balance(Config):
    """At most `cap` pictures an epoch that agree in all `fields`, drawn anew each epoch; all that have none of them."""

    fields: tuple[str, ...]
    cap: int = Field(ge=1)


class Recipe(Config):
    """Everything that decides the weights of a run, but for the data, and how it is laid out over processes."""

    seed: int = Field(0, ge=0)
    tokenizer: TokenizerConfig
    dvae: DVAEConfig
    transformer: TransformerShape
    dvae_training: DVAETraining
    transformer_training: TransformerTraining
    clip: CLIPShape | None = None  # with clip_training: a third stage, which ranks what is drawn
    clip_training: CLIPTraining | None = None
    # After the dVAE, which is then trained with a decoder that mirrors its encoder: another one, of the sizes in `dvae`
    decoder_training: DecoderTraining | None = None
    balance: Balance | None = None
    distributed: DistributedConfig = IN_ONE_PIECE  # a resume may have another
    sampling: ModelDefaults = ModelDefaults()  # how the finished model draws when nothing else is asked
    weights: Literal["float32", "bfloat16"] = "float32"  # how the finished model is stored

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        return self.model_dump(mode="json", exclude={"distributed"})

    @property
    def trainings(self) -> dict[str, Optimization]:
        """How each stage with an optimizer is trained, in their order."""
        found = {
            "dvae": self.dvae_training,
            "decoder": self.decoder_training,
            "transformer": self.transformer_training,
            "clip": self.clip_training,
        }
        return {name: training for name, training in found.items() if training is not None}

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        if (self.clip is None) != (self.clip_training is None):
            raise ValueError("clip and clip_training belong together: give both or neither")
        for training in self.trainings.values():
            if training.warmup_steps >= training.steps:
                raise ValueError(f"warmup_steps {training.warmup_steps} must be below steps {training.steps}")
        return self

    @model_validator(mode="after")
    def _large_decoder_is_trained(self) -> Self:
        if self.decoder_training is None and self.dvae.output_size != self.dvae.image_size:
            raise ValueError(
                f"dvae.output_size {self.dvae.output_size} is not image_size {self.dvae.image_size}: a decoder that draws "
                "more than the encoder reads needs the settings decoder_training"
            )
        if self.decoder_training is not None and self.dvae.trunk == "paper":
            raise ValueError(
                "decoder_training belongs to trunk light; the paper's dVAE is trained in one phase"
            )
        return self

    @model_validator(mode="after")
    def _relaxation_is_of_gumbel(self) -> Self:
        if self.dvae.quantizer == "fsq":
            for name in RELAXATION:
                value = getattr(self.dvae_training, name)
                if value != DVAETraining.model_fields[name].default:
                    raise ValueError(
                        f"dvae_training.{name} is {value}, but quantizer fsq has neither temperature nor KL: leave it out"
                    )
        return self


def load_recipe(preset: str, settings: Sequence[str]) -> Recipe:
    """The recipe of a preset (a name or the path of a .toml file) with `a.b=c` settings; ValueError, one line, if bad.

    A stage whose `steps` are set keeps its share of warm-up, at least one update, unless `warmup_steps` is set too.
    """
    plain = load_preset(preset)
    tree = override(plain, settings)
    given = {setting.partition("=")[0].strip() for setting in settings}
    for stage in STAGE_SETTINGS:
        before, training = plain.get(stage), tree.get(stage)
        if f"{stage}.warmup_steps" in given or not isinstance(before, dict) or not isinstance(training, dict):
            continue
        steps, planned, warmup = training.get("steps"), before.get("steps"), before.get("warmup_steps")
        if isinstance(steps, int) and steps > 0 and planned and warmup and steps != planned:
            training["warmup_steps"] = min(max(1, round(warmup * steps / planned)), steps - 1)
    return validate(Recipe, tree, preset)


PUBLISHED_TOKENIZERS: dict[str, type[VQGANConfig] | type[DallePytorchVAEConfig]] = {
    "VQGAN": VQGANConfig,
    "DallePytorchVAE": DallePytorchVAEConfig,
}


def with_given(recipe: Recipe, folder: Path) -> tuple[Recipe, list[str]]:
    """The recipe with the sizes of the components in `folder`, and what that changes: "transformer.n_layers: 2 -> 6".

    A run records what it uses, not what its settings asked for. The sizes of the dVAE's own decoder are the recipe's:
    stage decoder may train another one.
    """
    tree, said = recipe.model_dump(), list[str]()
    for name in ("tokenizer", "transformer"):
        kind = component_kind(folder, name)
        if kind != OURS[name]:
            raise ValueError(
                f"{folder}: its {name} is a {kind}, which train does not go on from: use dalle finetune"
            )
    for name in ("tokenizer", "dvae", "transformer", "clip"):
        path = folder / name / "config.json"
        config = read_json(path) if path.is_file() else None
        if tree[name] is None or not isinstance(config, dict):
            continue
        if name == "dvae" and (kind := component_kind(folder, "dvae")) != OURS["dvae"]:
            tree["decoder_training"] = None  # theirs is no part of ours
            said.append(_of_published(kind, config, str(path), recipe.dvae))
            continue
        if name == "dvae":
            given = validate(DVAEConfig, config, str(path))
            if given.trunk != "light":
                tree["decoder_training"] = None  # its decoder is its encoder's mirror
            if tree["decoder_training"] is not None:
                given = given.drawing_as(recipe.dvae)
            tree["dvae"] = given.model_dump()
            continue
        tree[name] |= {key: value for key, value in config.items() if key in tree[name]}
    if tree["dvae"]["quantizer"] == "fsq":
        tree["dvae_training"] |= {key: DVAETraining.model_fields[key].default for key in RELAXATION}
    found = validate(Recipe, tree, str(folder))
    return found, [*said, *differences(recipe.model_dump(mode="json"), found.model_dump(mode="json"))]


def _of_published(kind: str, config: dict[str, Any], source: str, preset: DVAEConfig) -> str:
    """Say what a given image tokenizer of other people decides; ValueError for one that cannot read pictures."""
    sizes = validate(PUBLISHED_TOKENIZERS[kind], config, source)
    if not getattr(sizes, "has_encoder", True):
        raise ValueError(
            f"{source}: this {kind} was published without its encoder: it cannot be a first stage"
        )
    numbers = {"image_size": preset.image_size, "grid_size": preset.grid_size, "n_codes": preset.n_codes}
    given = {name: getattr(sizes, name) for name in numbers}
    return f"dvae: the given {kind} has " + ", ".join(
        f"{name} {given[name]}" + (f" (preset: {number})" if given[name] != number else "")
        for name, number in numbers.items()
    )


def transformer_config(
    shape: TransformerShape, dvae: DVAEConfig | ImageTokenizer, n_text_vocab: int, n_text_tokens: int
) -> TransformerConfig:
    """The transformer that reads `n_text_tokens` tokens of a tokenizer and writes the grid of a dVAE."""
    return TransformerConfig(
        n_layers=shape.n_layers,
        n_heads=shape.n_heads,
        d_head=shape.d_head,
        conv_kernel=shape.conv_kernel,
        layers=shape.layers,
        n_text_tokens=n_text_tokens,
        n_text_vocab=n_text_vocab,
        grid_size=dvae.grid_size,
        n_image_vocab=dvae.n_codes,
    )


def clip_config(shape: CLIPShape, n_text_vocab: int, n_text_tokens: int) -> CLIPConfig:
    """The CLIP that reads `n_text_tokens` tokens of one of our tokenizers."""
    sizes = shape.model_dump() | {"n_text_vocab": n_text_vocab, "n_text_tokens": n_text_tokens}
    return CLIPConfig(**sizes, text_tokens="dalle")
