"""What choosing among more candidates is worth: the judge's score of the best of N by the ranker (DALL·E, figure 6).

    python benchmarks/rerank_curve.py [--model MODEL] --art ART --out OUT [--captions 32] [--candidates 512]

MODEL has a clip/, which chooses, and a judge/, which scores: another CLIP, trained on one half of the objects. Captions
are spread evenly over the `combo` pictures. Writes OUT/rerank_curve.json and rerank_curve.png (pip install
'dalle[bench]').
"""

import argparse
import json
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from dalle import files
from dalle.data.pairs import read_pairs
from dalle.evaluation.protocols import decode
from dalle.evaluation.ranking import best_of
from dalle.evaluation.sheets import spread
from dalle.generation.rerank import CHUNK, Ranker
from dalle.pipeline import DallePipeline

COUNTS = (1, 4, 16, 64, 256, 512)


def main() -> None:
    """Draw, score, and write the curve."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--art", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--captions", type=int, default=32)
    parser.add_argument("--candidates", type=int, default=COUNTS[-1])
    arguments = parser.parse_args()
    pipe = DallePipeline.from_pretrained(arguments.model)
    judge = pipe.load_judge()
    if pipe.ranker is None or judge is None:
        raise SystemExit("the model needs both a clip/ and a judge/")
    pairs = read_pairs(arguments.art)
    captions = spread([pair.captions[0] for pair in pairs if pair.split == "combo"], arguments.captions)
    began, by_ranker, by_judge = time.perf_counter(), list[Tensor](), list[Tensor]()
    for done, caption in enumerate(captions, start=1):
        ranked, judged = scores(pipe, judge, caption, arguments.candidates)
        by_ranker.append(ranked)
        by_judge.append(judged)
        print(f"{done}/{len(captions)}  {time.perf_counter() - began:.0f} s  {caption}", flush=True)
    counts = [n for n in COUNTS if n <= arguments.candidates]
    rows = best_of(torch.stack(by_ranker), torch.stack(by_judge), counts)
    report = {"model_sha256": pipe.model_sha256, "captions": captions, "rows": rows}
    arguments.out.mkdir(parents=True, exist_ok=True)
    files.write_json(arguments.out / "rerank_curve.json", report)
    plot(rows, arguments.out / "rerank_curve.png")
    for row in rows:
        print(json.dumps(row))


def scores(pipe: DallePipeline, judge: Ranker, caption: str, n: int) -> tuple[Tensor, Tensor]:
    """The ranker's and the judge's scores (n,) of a caption's candidates, in the order of their seeds."""
    drawn = pipe(caption, num_images_per_prompt=n, seed=0, output_type="tokens")
    assert drawn.scores is not None
    ranked, tokens = torch.empty(n), torch.empty_like(drawn.tokens)
    ranked[list(drawn.seeds)], tokens[list(drawn.seeds)] = torch.tensor(drawn.scores), drawn.tokens
    [vector] = judge.encode_captions([caption])
    pictures = (judge.clip.fit(decode(pipe.dvae, part)) for part in torch.split(tokens, CHUNK))
    return ranked, judge.score(vector, pictures)


def plot(rows: list[dict[str, float]], path: Path) -> None:
    """The curve with its standard errors over captions."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.errorbar(
        [row["n"] for row in rows],
        [row["score"] for row in rows],
        [row["standard_error"] for row in rows],
        marker="o",
        capsize=3,
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks([row["n"] for row in rows], [str(row["n"]) for row in rows])
    axes.set_xlabel("candidates of which the ranker keeps one")
    axes.set_ylabel("cosine by the judge, mean over captions")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
