"""One sampler, ours or another's, drawing whole pictures of random weights: one line of JSON. See race.py.

    python benchmarks/peers.py NAME [--rows 1] [--grid 32] [--steps N]

All have about 25 million weights outside of embeddings and heads, read 256 caption tokens (min-dalle 64, through an
encoder), draw grid * grid image tokens of 8192 or more at top-k 256, and stop before their dVAE. Random weights: the
time of these models does not depend on values. `--steps` draws the first tokens only, where a whole picture would take
too long; the line says so.
"""

import argparse
import inspect
import json
import os
import sys
import textwrap
import time
import types
import warnings
from collections.abc import Callable

import torch

WIDTH, HEADS, LAYERS = 512, 8, 8
N_TEXT, N_VOCAB, N_CODES, TOP_K = 256, 16384, 8192, 256
N_ALL = N_VOCAB + N_TEXT + N_CODES  # ids of models that have one table for text and image

Sampler = tuple[torch.nn.Module, Callable[[], object]]  # what holds the weights, and the call that is timed


def ours(rows: int, grid: int, steps: int, dtype: torch.dtype, *, is_native: bool = False) -> Sampler:
    """This package: `Engine.generate`, as it is or with compiled C."""
    from dalle.generation.engine import Engine
    from dalle.generation.precision import decode_threads
    from dalle.generation.request import GenerationOptions
    from dalle.transformer import Transformer, TransformerConfig

    config = TransformerConfig(
        n_layers=LAYERS,
        n_heads=HEADS,
        d_head=WIDTH // HEADS,
        n_text_tokens=N_TEXT,
        n_text_vocab=N_VOCAB,
        grid_size=grid,
        n_image_vocab=N_CODES,
    )
    transformer = Transformer(config).eval().to(dtype)
    torch.set_num_threads(decode_threads(config.d_model, rows))
    engine, text = Engine(transformer, is_native=is_native), torch.randint(N_VOCAB, (1, N_TEXT))
    return transformer.layers, lambda: engine.generate(text, range(rows), GenerationOptions(top_k=TOP_K))


def dalle_pytorch(
    rows: int, grid: int, steps: int, dtype: torch.dtype, *, is_repaired: bool = True
) -> Sampler:
    """lucidrains' DALLE: six layers, whose GEGLU has 16 d^2 weights. Repaired, it no longer ignores its cache."""
    for name in ("taming", "taming.models", "taming.models.vqgan"):  # imported at the top, and not used here
        sys.modules[name] = types.ModuleType(name)
    sys.modules["taming.models.vqgan"].VQModel = sys.modules["taming.models.vqgan"].GumbelVQ = object
    from dalle_pytorch import DALLE, DiscreteVAE

    vae = DiscreteVAE(image_size=grid * 8, num_layers=3, num_tokens=N_CODES, codebook_dim=64, hidden_dim=16)
    model = DALLE(
        dim=WIDTH,
        vae=vae,
        num_text_tokens=N_VOCAB,
        text_seq_len=N_TEXT,
        depth=6,
        heads=HEADS,
        dim_head=WIDTH // HEADS,
        attn_types=("full",),
        shift_tokens=False,
        rotary_emb=True,
        optimize_for_inference=True,
    )
    model = model.eval().to(dtype)
    model.vae.decode = lambda tokens: tokens
    if is_repaired:
        guided = model.forward_with_cond_scale

        def forward(
            *arguments: object, cond_scale: float = 1, cache: object = None, **more: object
        ) -> object:
            if cond_scale == 1:  # the release drops `cache` here
                return model(*arguments, cache=cache, **more)
            return guided(*arguments, cond_scale=cond_scale, cache=cache, **more)

        model.forward_with_cond_scale = forward
    if steps < grid * grid:
        model.image_seq_len = steps  # how many tokens `generate_images` draws
    text = torch.randint(1, N_VOCAB, (rows, N_TEXT))
    threshold = 1 - TOP_K / model.total_tokens  # it keeps int((1 - threshold) * total_tokens)
    return model.transformer, lambda: model.generate_images(text, filter_thres=threshold, use_cache=True)


def min_dalle(rows: int, grid: int, steps: int, dtype: torch.dtype) -> Sampler:
    """min-dalle's decoder, six layers with cross-attention; it always guides, with two rows a picture."""
    from min_dalle import min_dalle as sampling
    from min_dalle.models import dalle_bart_decoder as decoder

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # importing it set all
    torch.set_grad_enabled(False)
    n_tokens, side = grid * grid, int(rows**0.5)
    assert side * side == rows, "min-dalle draws square batches"
    decoder.IMAGE_TOKEN_COUNT = n_tokens
    model = object.__new__(sampling.MinDalle)
    model.device, model.dtype, model.is_reusable = "cpu", dtype, True
    model.layer_count, model.embed_count, model.text_token_count = 6, WIDTH, 64
    inner = WIDTH * 8 // 3
    model.encoder = sampling.DalleBartEncoder(6, WIDTH, HEADS, 50264, 64, inner, "cpu").to(dtype).eval()
    model.decoder = sampling.DalleBartDecoder(16384, WIDTH, HEADS, inner, 6, "cpu").to(dtype).eval()
    model.tokenizer = types.SimpleNamespace(tokenize=lambda text, is_verbose=False: [0, *range(5, 65), 2])
    model.image_grid_from_tokens = lambda image_tokens, **more: image_tokens
    source = textwrap.dedent(inspect.getsource(sampling.MinDalle.generate_raw_image_stream))
    source = source.replace("i + 1 == 256", f"i + 1 == {n_tokens}")  # its grid is fixed at 16
    names = {"IMAGE_TOKEN_COUNT": n_tokens, "torch": torch, "FloatTensor": torch.FloatTensor}
    exec("from typing import Iterator\nimport numpy\n" + source, names)
    stream = names["generate_raw_image_stream"]
    return model.decoder.layers, lambda: list(stream(model, "x", seed=1, grid_size=side, top_k=TOP_K))


def gpt2(rows: int, grid: int, steps: int, dtype: torch.dtype, *, cache: str | None = None) -> Sampler:
    """transformers' GPT-2 and `generate`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=N_ALL,
        n_positions=N_TEXT + grid * grid,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    model, text = GPT2LMHeadModel(config).eval().to(dtype), torch.randint(1, N_VOCAB, (rows, N_TEXT))
    more = {} if cache is None else {"cache_implementation": cache}
    return model.transformer.h, lambda: model.generate(
        text,
        attention_mask=torch.ones_like(text),
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=True,
        top_k=TOP_K,
        pad_token_id=0,
        use_cache=True,
        **more,
    )


def x_transformers(rows: int, grid: int, steps: int, dtype: torch.dtype) -> Sampler:
    """x-transformers' decoder with its cache."""
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
    from x_transformers.autoregressive_wrapper import top_k

    layers = Decoder(dim=WIDTH, depth=LAYERS, heads=HEADS, attn_dim_head=WIDTH // HEADS, attn_flash=True)
    wrapper = TransformerWrapper(num_tokens=N_ALL, max_seq_len=N_TEXT + grid * grid, attn_layers=layers)
    model = AutoregressiveWrapper(wrapper).eval().to(dtype)
    text = torch.randint(1, N_VOCAB, (rows, N_TEXT))
    return model.net.attn_layers, lambda: model.generate(
        text, steps, temperature=1.0, filter_logits_fn=top_k, filter_kwargs={"k": TOP_K}, cache_kv=True
    )


PEERS: dict[str, Callable[..., Sampler]] = {
    "ours": ours,
    "ours native": lambda *sizes: ours(*sizes, is_native=True),
    "dalle-pytorch": dalle_pytorch,
    "dalle-pytorch stock": lambda *sizes: dalle_pytorch(*sizes, is_repaired=False),
    "min-dalle": min_dalle,
    "transformers": gpt2,
    "transformers static": lambda *sizes: gpt2(*sizes, cache="static"),
    "x-transformers": x_transformers,
}


def main() -> None:
    """Draw once to warm up, once on the clock."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--grid", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, help="image tokens drawn; a whole picture when left out")
    parser.add_argument("--warm-up", action="store_true", help="draw once before the clock starts")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    n_tokens = arguments.grid**2
    steps = arguments.steps or n_tokens
    dtype = getattr(torch, arguments.dtype)
    core, draw = PEERS[arguments.name](arguments.rows, arguments.grid, steps, dtype)
    with torch.inference_mode(not arguments.name.startswith("ours")):
        for _ in range(2 if arguments.warm_up else 1):
            began, used = time.perf_counter(), time.process_time()
            draw()
            seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - used
    print(
        json.dumps(
            {
                "name": arguments.name,
                "rows": arguments.rows,
                "dtype": arguments.dtype,
                "threads": torch.get_num_threads(),
                "core_parameters": sum(weight.numel() for weight in core.parameters()),
                "steps": steps,
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "ms_per_step": 1e3 * seconds / steps,
            }
        )
    )


if __name__ == "__main__":
    main()
