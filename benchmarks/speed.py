"""Time training at one preset's sizes, with fresh weights: one line of JSON a measurement.

    python benchmarks/speed.py --preset laptop --seconds 5

No model or data is needed: speed depends on sizes alone. Each figure is of the fastest of the passes that fit
into `--seconds`, so that other work on the machine disturbs it least. `dvae` and `transformer` count pictures that a
training update has seen (forward, backward, optimizer).
"""

import argparse
import json
import math
import time
from collections.abc import Callable

import torch

from dalle.config import load_preset, validate
from dalle.dvae import DiscreteVAE
from dalle.generation.precision import as_dtype, default_dtype
from dalle.training.optim import OPTIMIZERS
from dalle.training.recipe import Optimization, Recipe, transformer_config
from dalle.transformer import Transformer


def fastest(work: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Seconds of the fastest pass of `work`; one pass before the clock starts, at least one on it."""
    best, deadline = math.inf, math.inf
    while time.perf_counter() < deadline:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ended = time.perf_counter()
        if deadline == math.inf:
            deadline = ended + seconds
            continue
        best = min(best, ended - started)
    return best if best < math.inf else ended - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="laptop", help="a preset's name or a .toml file")
    parser.add_argument("--seconds", type=float, default=5.0, help="spent on each measurement")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", help="auto, float32 or bfloat16")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = default_dtype(device) if arguments.dtype == "auto" else as_dtype(arguments.dtype)
    recipe = validate(Recipe, load_preset(arguments.preset), arguments.preset)
    n_text = recipe.tokenizer.max_tokens
    shape = transformer_config(recipe.transformer, recipe.dvae, recipe.tokenizer.vocab_size, n_text)
    dvae, transformer = DiscreteVAE(recipe.dvae).to(device), Transformer(shape).to(device)
    size, n_codes = recipe.dvae.image_size, recipe.dvae.n_codes
    where = {
        "preset": arguments.preset,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }

    def say(what: str, rows: int, work: Callable[[], object]) -> None:
        rate = rows / fastest(work, arguments.seconds, device)
        print(
            json.dumps(
                {
                    "what": what,
                    "rows": rows,
                    "pictures_per_second": round(rate, 2),
                    **where,
                    "threads": torch.get_num_threads(),
                }
            ),
            flush=True,
        )

    def update(
        model: torch.nn.Module, settings: Optimization, loss: Callable[[], torch.Tensor]
    ) -> Callable[[], None]:
        optimizer = OPTIMIZERS[settings.optimizer](model, settings)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                value = loss()
            value.backward()
            optimizer.step()

        return step

    rows = recipe.dvae_training.batch_size
    pictures = torch.rand(rows, 3, size, size, device=device)
    noise = torch.Generator(device).manual_seed(0)
    step = update(
        dvae,
        recipe.dvae_training,
        lambda: dvae.loss(pictures, temperature=1.0, kl_weight=1.0, generator=noise)[0],
    )
    say("dvae", rows, step)

    rows = recipe.transformer_training.batch_size
    text = torch.randint(shape.n_text_vocab, (rows, n_text), device=device)
    tokens = torch.randint(n_codes, (rows, shape.n_image_tokens), device=device)
    say(
        "transformer",
        rows,
        update(transformer, recipe.transformer_training, lambda: transformer.loss(text, tokens).total),
    )


if __name__ == "__main__":
    main()
