"""Drawing at DALL·E mini's shape against min-dalle 0.4.11, in turns in one process: seconds a token, and their ratio.

    DALLE_PEERS=.venv-published python benchmarks/min_dalle_race.py [--pictures 1 9] [--steps 16] [--rounds 5] [--threads 2]

Both have random weights in float32 and super-conditioning of 16. `.ci/run` has the line that installs min-dalle.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch

sys.path.append(os.environ.get("DALLE_PEERS", ""))
from min_dalle.models import DalleBartDecoder

from dalle.published.min_dalle import MinDalle, MinDalleConfig

N_LAYERS, N_HEADS, WIDTH, GATED, N_TEXT, N_CODES = 12, 16, 1024, 2730, 64, 16384


def ours(text: torch.Tensor, n: int, steps: int) -> Callable[[], float]:
    """Seconds a token of this package, for n pictures of one caption and their unconditional rows."""
    config = {"n_layers": N_LAYERS, "n_heads": N_HEADS, "d_model": WIDTH, "d_gated": GATED}
    config |= {"n_text_vocab": 50264, "n_image_ids": N_CODES + 1}
    model = MinDalle(MinDalleConfig.model_validate(config)).eval()

    def run() -> float:
        state, stream = model.start(text, [n, n])
        start = time.perf_counter()
        for _ in range(steps):
            conditional, unconditional = model.norm(state).chunk(2)
            tokens = model.head(unconditional + 16 * (conditional - unconditional)).argmax(dim=-1)
            state = model.step(tokens.repeat(2), stream)
        return (time.perf_counter() - start) / steps

    return run


def theirs(text: torch.Tensor, n: int, steps: int) -> Callable[[], float]:
    """Seconds a token of min-dalle, for as many."""
    decoder = DalleBartDecoder(N_CODES, WIDTH, N_HEADS, GATED, N_LAYERS, "cpu").eval()
    mask = (text != 1)[[0] * n + [1] * n][:, None, None, :]
    encoded, settings = torch.randn(2 * n, N_TEXT, WIDTH), torch.tensor([1.0, 256.0, 16.0])
    places = torch.arange(256)

    def run() -> float:
        attention, tokens = torch.zeros(N_LAYERS, 4 * n, 256, WIDTH), torch.zeros(n, 257, dtype=torch.int64)
        start = time.perf_counter()
        for i in range(steps):
            tokens[:, i + 1], attention = decoder.sample_tokens(
                settings=settings,
                attention_mask=mask,
                encoder_state=encoded,
                attention_state=attention,
                prev_tokens=tokens[:, [i]],
                token_index=places[[i]],
            )
        return (time.perf_counter() - start) / steps

    return run


@torch.no_grad()
def main() -> None:
    """Time both in turns; one line of JSON for each number of pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, nargs="+", default=[1, 9])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    text = torch.ones(2, N_TEXT, dtype=torch.int64)
    text[:, :10] = torch.randint(4, 1000, (2, 10))
    for n in options.pictures:
        both = {"ours": ours(text, n, options.steps), "min-dalle": theirs(text, n, options.steps)}
        times: dict[str, list[float]] = {name: [] for name in both}
        for _ in range(options.rounds):
            for name, run in both.items():
                times[name].append(run())
        found = {name: statistics.median(seconds) for name, seconds in times.items()}
        ratio = statistics.median(b / a for a, b in zip(times["ours"], times["min-dalle"], strict=True))
        print(
            json.dumps({"pictures": n, "threads": options.threads, **found, "times_as_fast": round(ratio, 2)})
        )


if __name__ == "__main__":
    main()
