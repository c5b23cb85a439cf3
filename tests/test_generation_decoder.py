"""The decoder against its slow twin, the whole stream in one forward pass: every mask, ragged captions, its memory."""

import gc
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dalle.attention import LAYER_KINDS
from dalle.generation import decoder as decoder_file
from dalle.generation import native
from dalle.generation.decoder import Decoder, Group, Stream, group
from dalle.generation.engine import Engine
from dalle.generation.request import GenerationOptions
from dalle.transformer import Transformer
from tests.test_generation_engine import GRID, KINDS, N_CODES, N_TOKENS, build, captions
from tests.tiny import needs_compiler


def stepped(transformer: Transformer, text: Tensor, image: Tensor, n_pictures: list[int]) -> Tensor:
    """Logits (R, N, K) by the decoder; captions (P, T), of as many pictures as `n_pictures` says."""
    decoder = Decoder(transformer)
    state, stream = decoder.start(text, n_pictures)
    logits = [decoder.head(decoder.norm(state))]
    for position in range(N_TOKENS - 1):
        logits.append(decoder.head(decoder.norm(decoder.step(image[:, position], stream))))
    assert stream.n_read == N_TOKENS - 1
    return torch.stack(logits, 1)


def pictures(n: int) -> Tensor:
    return torch.randint(N_CODES, (n, N_TOKENS), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "layers", [*((kind, kind) for kind in LAYER_KINDS), ("row", "column", "row", "conv", "dense")]
)
def test_decoding_equals_a_full_forward(layers: tuple[str, ...]) -> None:
    transformer, text, image = build(layers).eval(), captions(3), pictures(3)
    with torch.no_grad():
        expected = transformer(text, image)[1]
    torch.testing.assert_close(stepped(transformer, text, image, [1, 1, 1]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_pictures", [[2, 2, 2], [1, 3, 3], [4, 1, 1], [5], [1, 2, 3, 1]])
def test_pictures_of_several_captions_each_see_their_own(n_pictures: list[int]) -> None:
    transformer, text, image = build().eval(), captions(len(n_pictures)), pictures(sum(n_pictures))
    with torch.no_grad():
        expected = transformer(text.repeat_interleave(torch.tensor(n_pictures), 0), image)[1]
    torch.testing.assert_close(stepped(transformer, text, image, n_pictures), expected, rtol=1e-4, atol=1e-4)


def test_neighbours_with_equally_many_pictures_share_a_matrix_product() -> None:
    assert group([2, 2, 6]) == [Group(slice(0, 2), slice(0, 4)), Group(slice(2, 3), slice(4, 10))]
    assert group([3, 3]) == [Group(slice(0, 2), slice(0, 6))]


@pytest.mark.parametrize("kind", KINDS)
def test_what_no_mask_allows_is_never_read(kind: str) -> None:
    transformer, text, image = build((kind, kind)).eval(), captions(1), pictures(2)
    decoder = Decoder(transformer)
    state, stream = decoder.start(text, [2])
    for cache in stream.images:
        cache.memory.fill_(torch.nan)
    for position in range(N_TOKENS - 1):
        state = decoder.step(image[:, position], stream)
        assert bool(state.isfinite().all())


def live_bytes() -> int:
    """Memory of all tensors alive, each storage once."""
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
        for x in gc.get_objects()
        if issubclass(type(x), Tensor)  # isinstance would ask proxies that warn
    }
    return sum(storages.values())


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_the_same_after_the_first_row_and_at_the_end(kind: str) -> None:
    engine, found = Engine(build((kind, kind))), list[int]()

    def measure(row: int, tokens: Tensor) -> bool:
        gc.collect()
        found.append(live_bytes())
        return False

    engine.generate(captions(2), list(range(8)), GenerationOptions(guidance=2), on_row_end=measure)
    assert len(found) == GRID
    assert len(set(found)) == 1


def test_a_captions_keys_are_kept_once_for_all_of_its_pictures() -> None:
    transformer = build()
    _, one = Decoder(transformer).start(captions(1), [1])
    _, many = Decoder(transformer).start(captions(1), [50])

    def caption_bytes(stream: Stream) -> int:
        return sum(x.nbytes for pair in stream.captions for x in pair)

    assert caption_bytes(one) == caption_bytes(many)
    assert [50 * cache.memory.nbytes for cache in one.images] == [
        cache.memory.nbytes for cache in many.images
    ]


@pytest.mark.skipif(
    not decoder_file.can_pack(torch.zeros(1, dtype=torch.bfloat16)), reason="no bfloat16 in oneDNN here"
)
def test_weights_laid_out_in_advance_change_no_logit(monkeypatch: pytest.MonkeyPatch) -> None:
    transformer, text, image = build().eval().to(torch.bfloat16), captions(2), pictures(4)
    packed = stepped(transformer, text, image, [2, 2])
    monkeypatch.setattr(decoder_file, "can_pack", lambda weight: False)
    assert torch.equal(packed, stepped(transformer, text, image, [2, 2]))
    with torch.no_grad():
        expected = transformer(text.repeat_interleave(2, 0), image)[1].float().log_softmax(-1)
    assert packed.dtype == torch.bfloat16
    assert float((packed.float().log_softmax(-1) - expected).abs().mean()) < 0.1


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_steps_draw_the_same_tokens(kind: str) -> None:
    transformer, text = build((kind, "row", kind)).eval(), captions(3)
    plain, compiled = Engine(transformer), Engine(transformer, is_native=True)
    for seeds, options in (
        (range(3), GenerationOptions()),
        (range(6), GenerationOptions()),
        (range(6), GenerationOptions(guidance=2, top_k=5)),  # twelve rows: attention alone is compiled
    ):
        assert torch.equal(compiled.generate(text, seeds, options), plain.generate(text, seeds, options))
    many = range(12)
    assert torch.equal(compiled.generate(text[:1], many), plain.generate(text[:1], many))
    state, stream = compiled.decoder().start(text, [1, 1, 1])
    assert stream.caption_of is not None  # and not the plain way behind its back
    assert compiled.decoder().head(compiled.decoder().norm(state)).dtype == torch.float32


@pytest.fixture(params=["this processor", "without AVX512-BF16"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiles for the processor at hand, or as for one that multiplies in float32 alone."""
    if request.param != "this processor" and platform.machine() == "x86_64":
        monkeypatch.setattr(native, "COMPILE", (*native.COMPILE, "-mno-avx512bf16"))
    native.load.cache_clear()
    yield
    native.load.cache_clear()


@needs_compiler
@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize(
    "n_pictures", [1, 2, 3, 4, 6]
)  # of two captions; from 5 on attention alone is compiled
def test_compiled_steps_in_bfloat16_are_as_near_to_float32_as_plain_ones(n_pictures: int) -> None:
    transformer, text, image = build().eval(), captions(2), pictures(2)
    with torch.no_grad():
        expected = transformer(text, image)[1].log_softmax(-1)
    error = []
    for is_native in (False, True):
        decoder = Decoder(transformer.to(torch.bfloat16), is_native=is_native)
        state, stream = decoder.start(text, [n_pictures] * 2)
        assert (stream.caption_of is not None) == (is_native and n_pictures <= 4)
        for position in range(9):
            state = decoder.step(image[:, position].repeat_interleave(n_pictures), stream)
        found = decoder.head(decoder.norm(state)).float().log_softmax(-1)[::n_pictures]
        error.append(float((found - expected[:, 9]).abs().mean()))
    assert error[1] < 1.5 * error[0] + 0.01


def test_without_a_compiler_native_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ValueError, match="--native needs a C compiler: install gcc or clang"):
        native.load.__wrapped__()
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(ValueError, match=r"failed \(no such flag\)"):
        native.load.__wrapped__()
    assert not list((tmp_path / "dalle").iterdir())


@pytest.mark.parametrize("has_operator", [True, False])
def test_8_bit_weights_are_each_within_half_a_step_of_their_rows_scale(
    monkeypatch: pytest.MonkeyPatch, has_operator: bool
) -> None:
    if not has_operator:
        monkeypatch.delattr(torch, "_weight_int8pack_mm")
    linear = torch.nn.Linear(64, 40).to(torch.bfloat16)
    x = torch.eye(64, dtype=torch.bfloat16)  # each answer is one weight and the bias
    with torch.no_grad():
        error = (decoder_file._int8_linear(linear)(x) - linear(x)).float().abs()  # (64, 40)
        scale = linear.weight.float().abs().amax(dim=1) / 127
        ulp = 2**-8 * (linear.weight.abs().amax(1) + linear.bias.abs()).float()
    assert bool((error <= scale / 2 + 3 * ulp).all())
    assert float(error.max()) > 0


def test_8_bits_predict_nearly_the_same_tokens() -> None:
    transformer, text, image = build().eval(), captions(2), pictures(2)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.mul_(0.4)  # not so wide that one weight decides
        expected = transformer(text, image)[1].log_softmax(-1)
    decoder = Decoder(transformer.to(torch.bfloat16), is_int8=True)
    state, _ = decoder.start(text, [1, 1])
    found = decoder.head(decoder.norm(state)).float().log_softmax(-1)
    divergence = (expected[:, 0].exp() * (expected[:, 0] - found)).sum(-1)
    assert float(divergence.max()) < 0.01


def test_changed_weights_are_drawn_with_at_once() -> None:
    engine, text = Engine(build()), captions(1)
    before = engine.generate(text, [0, 1])
    assert engine.decoder() is engine.decoder()
    with torch.no_grad():
        engine.model.image_head.weight.neg_()
    after = engine.generate(text, [0, 1])
    assert not torch.equal(before, after)
    assert torch.equal(after, Engine(engine.model).generate(text, [0, 1]))
