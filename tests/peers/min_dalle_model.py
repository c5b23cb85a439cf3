"""Write a small min-dalle with random weights, and what it computes. Run: python min_dalle_model.py FOLDER"""

import json
import sys
from pathlib import Path

import torch
from min_dalle.min_dalle import MinDalle
from min_dalle.models import DalleBartDecoder, DalleBartEncoder, VQGanDetokenizer
from min_dalle.text_tokenizer import TextTokenizer

CAPTIONS = ("a red apple", "Ten  cats on a MAT, é", "", "two cats", "~ a b\tc !!")
folder = Path(sys.argv[1])
torch.set_num_threads(1)
torch.manual_seed(0)

# A vocabulary in the form of BART's: specials, characters, merges.
letters = ["Ġ", *"abcdefghijklmnopqrstuvwxyz0123456789,.!?~"]
merges = [
    ("Ġ", "a"),
    ("Ġ", "r"),
    ("e", "d"),
    ("Ġr", "ed"),
    ("c", "a"),
    ("ca", "t"),
    ("cat", "s"),
    ("p", "p"),
    ("o", "n"),
]
words = ["<s>", "<pad>", "</s>", "<unk>", *letters, *("".join(pair) for pair in merges)]
vocab = {word: i for i, word in enumerate(words)}
(folder / "vocab.json").write_text(json.dumps(vocab))
(folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))

width, heads, gated, layers = 64, 2, 96, 2
sizes = {
    "embed_count": width,
    "attention_head_count": heads,
    "glu_embed_count": gated,
    "layer_count": layers,
    "device": "cpu",
}
encoder = DalleBartEncoder(text_vocab_count=len(vocab), text_token_count=64, **sizes).eval()
decoder = DalleBartDecoder(image_vocab_count=2**14, **sizes).eval()
detoker = VQGanDetokenizer().eval()
for model in (encoder, decoder):
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
decoder.lm_head.weight.normal_(std=1.0)
torch.save(encoder.state_dict(), folder / "encoder.pt")
torch.save(decoder.state_dict(), folder / "decoder.pt")
detoker = detoker.half().float()
torch.save({name: x.half() for name, x in detoker.state_dict().items()}, folder / "detoker.pt")

model = MinDalle.__new__(MinDalle)  # its constructor calls a server
model.device, model.dtype, model.is_reusable, model.text_token_count, model.layer_count = (
    "cpu",
    torch.float32,
    True,
    64,
    layers,
)
model.embed_count = width
model.tokenizer = TextTokenizer(vocab, [f"{a} {b}" for a, b in merges])
model.encoder, model.decoder, model.detokenizer = encoder, decoder, detoker

tokens = [model.tokenizer.tokenize(caption) for caption in CAPTIONS]
text = torch.ones(2, 64, dtype=torch.int64)
for row, ids in enumerate(tokens[:2]):
    text[row, : len(ids)] = torch.tensor(ids)
image = torch.randint(2**14, (1, 256), generator=torch.Generator().manual_seed(1))
encoded = encoder(text)
# All positions at once; theirs starts from code 16383.
start = torch.full((1, 1), 2**14 - 1)
logits, _ = decoder(
    attention_mask=text.not_equal(1)[:, None, None, :],
    encoder_state=encoded,
    attention_state=torch.zeros(layers, 4, 256, width),
    prev_tokens=torch.cat([start, image[:, :-1]], dim=1),
    token_index=torch.arange(256),
)
drawn: list[torch.Tensor] = []
keep = model.image_grid_from_tokens


def spy(image_tokens: torch.Tensor, **kwargs: bool) -> torch.Tensor:
    drawn.append(image_tokens.clone())
    return keep(image_tokens=image_tokens, **kwargs)


model.image_grid_from_tokens = spy
(picture,) = model.generate_raw_image_stream(
    "a red apple", seed=1, grid_size=1, top_k=1, supercondition_factor=16
)
expected = {
    "captions": list(CAPTIONS),
    "tokens": tokens,
    "text": text,
    "image": image,
    "encoded": encoded,
    "logits": logits[:, :, : 2**14].half(),
    "drawn": drawn[0],
    "picture": picture,
}
torch.save(expected, folder / "expected.pt")
