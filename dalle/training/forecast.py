"""How much work a run has left after the stage that it is in, by arithmetic: the ETA of all stages."""

from dalle.training.cost import BACKWARD, clip_flops, dvae_flops, transformer_flops
from dalle.training.recipe import Recipe, clip_config, transformer_config
from dalle.training.run import Run


def work_after(stage: str, run: Run) -> float:
    """Work of the stages after `stage`, in updates of its own: model FLOPs alone, as if all ran at the same speed."""
    trainings = run.recipe.trainings
    names = list(trainings)
    after = [name for name in names[names.index(stage) + 1 :] if name in run.stages]
    return sum(_flops(run.recipe, name) * trainings[name].steps for name in after) / _flops(run.recipe, stage)


def _flops(recipe: Recipe, stage: str) -> float:
    """FLOPs of one update of a stage."""
    training = recipe.trainings[stage]
    forward, without_backward = _picture(recipe, stage)
    n_pictures = training.batch_size * training.accumulation
    return n_pictures * ((1 + BACKWARD) * forward + without_backward)


def _picture(recipe: Recipe, stage: str) -> tuple[float, float]:
    """FLOPs of one picture forwards: through what is trained, and through what is only asked."""
    n_text, n_vocab = recipe.tokenizer.max_tokens, recipe.tokenizer.vocab_size
    if stage == "dvae":
        return sum(dvae_flops(recipe.dvae if recipe.decoder_training is None else recipe.dvae.mirrored())), 0
    if stage == "decoder":
        encoder, decoder = dvae_flops(recipe.dvae)
        return decoder, encoder
    if stage == "transformer":
        config = transformer_config(recipe.transformer, recipe.dvae, n_vocab, n_text)
        return transformer_flops(config).forward, 0
    assert recipe.clip is not None and recipe.clip_training is not None
    through_dvae = recipe.clip_training.reconstructed * sum(dvae_flops(recipe.dvae))
    return clip_flops(clip_config(recipe.clip, n_vocab, n_text)), through_dvae
