"""OpenAI's Images API in front of our model: generations, edits (completion), models, and the files they point at.

Source: the requests, answers and stream events of OpenAI's Python client (`openai.types.images_response`,
`openai.types.image_gen_stream_event`, ...), which the tests run.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from PIL import Image
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from dalle.generation.request import ImageRequest
from dalle.images import has_transparency, open_image, to_png
from dalle.pipeline import DallePipeline
from dalle.serving.errors import ServingError, bad_request
from dalle.serving.files import PREFIX, Format, OutputFormat, SignedFiles
from dalle.serving.intake import (
    accept,
    count_candidates,
    read_json,
    read_mask,
    read_picture,
    usual_candidates,
)
from dalle.serving.job import Drawn, Event, Failed, Job, RowDrawn, Settled
from dalle.serving.mailbox import EventStream, Mailbox, outcome
from dalle.serving.schema import (
    ANY_SEED,
    EditBody,
    GenerationBody,
    OpenAIImageBody,
    as_error,
    check,
    without_harmless,
)
from dalle.serving.state import State

# Candidates of each request; CLIP keeps the best n. More candidates is what quality means here.
CANDIDATES = {"low": 1, "medium": 8, "high": 32, "xhigh": 128, "max": 512}
# Fields of an `ImageRequest` that OpenAI's clients call otherwise.
NAMES = {"num_images_per_prompt": "n", "guidance": "guidance_scale"}
SAME_AS = {"auto": "medium", "standard": "medium", "hd": "high"}
MAX_UPSCALE = 16  # 64 px -> 1024 px
DEFAULT_COMPRESSION = 100
OWNER = "dalle"


def router(state: State, files: SignedFiles) -> APIRouter:
    """Return the routes."""
    routes, started_at = APIRouter(prefix="/v1"), int(time.time())

    @routes.post("/images/generations", openapi_extra=_body("application/json", GenerationBody))
    async def generate(http: HttpRequest) -> Response:
        tree, ignored = without_harmless(await read_json(http))
        order = OpenAIOrder.of(state, check(GenerationBody, tree), ignored=ignored)
        return await answer(http, state, files, order, lambda: read(order))

    @routes.post("/images/edits", openapi_extra=_edit_body())
    async def edit(http: HttpRequest) -> Response:
        if not http.headers.get("content-type", "").startswith("multipart/form-data"):
            raise ServingError(
                415, "an edit is multipart/form-data with image and prompt", code="unsupported_media_type"
            )
        form: FormData = await http.form(max_files=4, max_fields=64, max_part_size=256_000)
        try:
            wanted, image, mask, ignored = await read_edit(form)
        finally:
            await form.close()
        order = OpenAIOrder.of(state, wanted, "image_edit", ignored)
        return await answer(
            http, state, files, order, lambda: read_completion(state, order, wanted.keep_rows, image, mask)
        )

    @routes.get("/models")
    @routes.get("/models/", include_in_schema=False)
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(state.pipe, started_at)]}

    @routes.get("/models/{model:path}")
    def model(model: str) -> dict[str, Any]:
        check_model(state.pipe, model)
        return _model(state.pipe, started_at)

    @routes.get("/images/files/{name}")
    @routes.head("/images/files/{name}", include_in_schema=False)
    def file(name: str) -> Response:
        found = files.read(PREFIX + name)
        png = None if found is None else state.history.png(found[0])
        if found is None or png is None:
            raise ServingError(404, "there is no such picture, or its address has expired", code="not_found")
        look, age = found[1], state.settings.url_s
        # The address is the credential: whoever was given it may show the picture in a page of their own.
        headers = {"cache-control": f"private, max-age={age}", "cross-origin-resource-policy": "cross-origin"}
        picture = open_image(png)
        # A PNG at the model's own size goes out as it is, with its recipe inside.
        data = png if look.format == "png" and look.side == picture.width else encode(picture, None, look)
        return Response(data, media_type=f"image/{look.format}", headers=headers)

    return routes


@dataclass(frozen=True)
class OpenAIOrder:
    """A request of the API, checked as far as it does not concern the caption or a picture."""

    wanted: OpenAIImageBody
    event: str  # what its stream events are called
    n_images: int
    n_candidates: int
    look: OutputFormat
    quality: str
    gives_url: bool
    is_stream: bool
    n_partial: int
    ignored: tuple[str, ...] = ()  # fields that change nothing here, as they were sent

    @classmethod
    def of(
        cls,
        state: State,
        wanted: OpenAIImageBody,
        event: str = "image_generation",
        ignored: tuple[str, ...] = (),
    ) -> OpenAIOrder:
        """ServingErrors for a model that is not here, a size, a format or numbers that it does not give."""
        if wanted.model is not None:
            check_model(state.pipe, wanted.model)
        n_images = 1 if wanted.n is None else wanted.n
        quality = SAME_AS.get(wanted.quality or "auto", wanted.quality or "auto")
        n_candidates = wanted.num_candidates
        if n_candidates is None and not (wanted.quality in (None, "auto") and state.pipe.defaults.candidates):
            n_candidates = usual_candidates(n_images, CANDIDATES[quality], state)
        n = count_candidates(n_images, n_candidates, state, "n")
        if wanted.partial_images and not wanted.stream:
            raise bad_request("partial_images needs stream: true", "partial_images")
        return cls(
            wanted=wanted,
            event=event,
            n_images=n_images,
            n_candidates=n,
            look=read_look(wanted, state.pipe.dvae.output_size),
            quality=quality,
            gives_url=wanted.response_format == "url" and not wanted.stream,
            is_stream=bool(wanted.stream),
            n_partial=wanted.partial_images or 0,
            ignored=ignored,
        )

    @property
    def facts(self) -> dict[str, Any]:
        """What every answer repeats."""
        return {
            "size": f"{self.look.side}x{self.look.side}",
            "quality": self.quality,
            "background": "opaque",
            "output_format": self.look.format,
        }


def read_look(wanted: OpenAIImageBody, native: int) -> OutputFormat:
    """Size and format of what is handed out; ServingErrors for those that the model does not give."""
    side = native
    if wanted.size not in (None, "auto"):
        sizes = {f"{native * times}x{native * times}": native * times for times in range(1, MAX_UPSCALE + 1)}
        if wanted.size not in sizes:
            raise bad_request(
                f"size must be auto or a whole multiple of {native}x{native}, the model's own, up to"
                f" {native * MAX_UPSCALE}x{native * MAX_UPSCALE}",
                "size",
                "invalid_value",
            )
        side = sizes[wanted.size]
    kind: Format = wanted.output_format or "png"
    if kind == "png" and wanted.output_compression not in (None, 100):
        raise bad_request("output_compression is for jpeg and webp: PNG loses nothing", "output_compression")
    compression = DEFAULT_COMPRESSION if wanted.output_compression is None else wanted.output_compression
    return OutputFormat(side, kind, compression)


def model_id(pipe: DallePipeline) -> str:
    """Return the model's name for clients: never a path of this machine."""
    return "dalle-bundled" if pipe.name == "bundled" else pipe.name.rstrip("/").rpartition("/")[2] or "dalle"


def check_model(pipe: DallePipeline, name: str) -> None:
    """Return a 404 `model_not_found` for another model than the one served; "dalle" is whichever that is."""
    if name not in ("dalle", model_id(pipe)):
        raise ServingError(
            404,
            f"this server has no such model; it serves {model_id(pipe)}",
            code="model_not_found",
            param="model",
        )


def _model(pipe: DallePipeline, created: int) -> dict[str, Any]:
    return {"id": model_id(pipe), "object": "model", "created": created, "owned_by": OWNER}


# --- What the model is to draw ------------------------------------------------------------------------------


def read(
    order: OpenAIOrder,
    image: Image.Image | None = None,
    keep_rows: int | None = None,
    mask: Image.Image | None = None,
) -> ImageRequest:
    """Return an order's request; InvalidRequests are its client's."""
    wanted = order.wanted
    return ImageRequest(
        wanted.prompt,
        num_images_per_prompt=order.n_images,
        num_candidates=order.n_candidates,
        seed=None if wanted.seed == ANY_SEED else wanted.seed,
        temperature=wanted.temperature,
        top_k=wanted.top_k,
        top_p=wanted.top_p,
        guidance=wanted.guidance_scale,
        image=image,
        keep_rows=keep_rows,
        mask=mask,
        truncate=bool(wanted.truncate),
    )


def read_completion(
    state: State, order: OpenAIOrder, keep_rows: int | None, image: bytes, mask: bytes | None
) -> ImageRequest:
    """As `read`, of an uploaded picture: what its mask leaves clear is drawn anew, else what it leaves clear itself."""
    picture, hole = read_picture(image, "image", state), None
    if mask is not None:
        hole = read_mask(mask, "mask", state)
        if hole.size != picture.size:
            raise bad_request(
                f"mask is {hole.width}x{hole.height}, the image {picture.width}x{picture.height}: make them equal",
                "mask",
                "invalid_value",
            )
    elif keep_rows is None:
        if not has_transparency(image, state.settings.max_pixels):
            raise bad_request(
                "a mask says which part is drawn anew: send mask, or keep_rows, or an image with a clear part",
                "mask",
                "missing_required_parameter",
            )
        hole = read_mask(image, "image", state)
    return read(order, picture, keep_rows, hole)


async def read_edit(form: FormData) -> tuple[EditBody, bytes, bytes | None, tuple[str, ...]]:
    """Fields, image, mask and ignored fields of a form; text fields are read as what they mean."""
    tree, uploads = dict[str, str](), dict[str, bytes]()
    for name, value in form.multi_items():
        name = name.removesuffix("[]")
        if name in tree or name in uploads:
            shown = ascii(name)[1:-1][:64]
            raise bad_request(f"{shown} is given twice: one is taken", shown, "duplicate_parameter")
        if isinstance(value, UploadFile):
            if name not in ("image", "mask"):
                raise bad_request(
                    "only image and mask are files", ascii(name)[1:-1][:64], "unknown_parameter"
                )
            uploads[name] = await value.read()
        else:
            tree[name] = value
    for name in ("image", "mask"):
        if name in tree:
            raise bad_request(f"{name} must be a file", name, "invalid_type")
    if "image" not in uploads:
        raise bad_request("image is missing", "image", "missing_required_parameter")
    try:
        fields, ignored = without_harmless(tree)
        wanted = EditBody.model_validate(fields, strict=False)  # a form holds nothing but text
    except ValidationError as error:
        raise as_error(error) from None
    return wanted, uploads["image"], uploads.get("mask"), ignored


# --- Answers ------------------------------------------------------------------------------------------------


async def answer(
    http: HttpRequest,
    state: State,
    files: SignedFiles,
    order: OpenAIOrder,
    prepare: Callable[[], ImageRequest],
) -> Response:
    """Queues an order, and streams or waits."""
    n_rows = state.pipe.dvae.grid_size
    rows = [round(n_rows * (i + 1) / (order.n_partial + 1)) - 1 for i in range(order.n_partial)]
    mailbox = Mailbox(rows, n_shown=1)
    has_picture = isinstance(order.wanted, EditBody)
    job = await accept(state, order.n_candidates, mailbox, prepare, NAMES, False, has_picture)
    headers = {"x-dalle-job": job.id, "x-dalle-truncated": str(job.request.truncation is not None).lower()}
    if order.ignored:
        headers["x-dalle-ignored"] = ", ".join(order.ignored)
    writer = OpenAIEvents(state, files, order, job, str(http.base_url).rstrip("/"))
    if order.is_stream:
        return EventStream(state.queue, job, mailbox, writer.write, headers)
    event = await outcome(mailbox, http.receive, state.queue, job)
    if event is None:  # nobody is there to read this
        return Response(status_code=400)
    if isinstance(event, Failed):
        raise event.error
    return JSONResponse(await run_in_threadpool(writer.response, event), headers=headers)


class OpenAIEvents:
    """Turns a job's events into OpenAI's."""

    def __init__(self, state: State, files: SignedFiles, order: OpenAIOrder, job: Job, base_url: str) -> None:
        self._files, self._order, self._request, self._base_url = files, order, job.request, base_url
        config = state.pipe.transformer.config
        n_known = 0 if job.request.region is None else int((~job.request.region).sum())
        n_text = state.pipe.tokenizer.count(job.request.caption)
        if job.request.truncation is not None:
            n_text = job.request.truncation.n_kept
        n_drawn = (config.grid_size**2 - n_known) * job.n_candidates
        self._usage = {
            "input_tokens": n_text + n_known,
            "input_tokens_details": {"text_tokens": n_text, "image_tokens": n_known},
            "output_tokens": n_drawn,
            "output_tokens_details": {"text_tokens": 0, "image_tokens": n_drawn},
            "total_tokens": n_text + n_known + n_drawn,
        }
        self._n_partial = 0

    def response(self, event: Settled) -> dict[str, Any]:
        """Return the whole answer of a request without stream."""
        return {
            "created": int(time.time()),
            "data": [self._datum(one) for one in event.pictures],
            **self._order.facts,
            "usage": self._usage,
            "truncated": self._request.truncation is not None,
        }

    def write(self, event: Event) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Name and JSON of the stream events of a job's event."""
        created, facts = {"created_at": int(time.time())}, self._order.facts
        match event:
            case RowDrawn(_, 0, images) if self._n_partial < self._order.n_partial:
                name, index = f"{self._order.event}.partial_image", self._n_partial
                self._n_partial += 1
                data = base64.b64encode(encode(images[0], None, self._order.look)).decode("ascii")
                yield name, {"type": name, "b64_json": data, "partial_image_index": index} | created | facts
            case Settled(pictures):
                name = f"{self._order.event}.completed"
                for one in pictures:
                    yield name, {"type": name, **self._datum(one), **created, **facts, "usage": self._usage}
            case Failed(error):
                yield "", error.body()  # an event without a name: OpenAI's client raises its APIError

    def _datum(self, one: Drawn) -> dict[str, Any]:
        about: dict[str, Any] = {"revised_prompt": None, "seed": one.seed, "score": one.score}
        if self._order.gives_url:
            path = self._files.path(one.picture_id, self._order.look)
            return {"url": self._base_url + path, "b64_json": None, **about}
        data = encode(one.image, one.recipe, self._order.look)
        return {"b64_json": base64.b64encode(data).decode("ascii"), "url": None, **about}


def encode(image: Image.Image, recipe: Mapping[str, Any] | None, look: OutputFormat) -> bytes:
    """Return a picture as it is handed out, enlarged where that was asked for; a PNG holds its recipe."""
    if image.width != look.side:
        image = image.resize((look.side, look.side), Image.Resampling.LANCZOS)
    if look.format == "png":
        return to_png(image, recipe)
    buffer = io.BytesIO()
    image.save(buffer, format=look.format.upper(), quality=look.compression)
    return buffer.getvalue()


def _body(kind: str, schema: type[OpenAIImageBody]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema.model_json_schema()}}}}


def _edit_body() -> dict[str, Any]:
    extra = _body("multipart/form-data", EditBody)
    schema = extra["requestBody"]["content"]["multipart/form-data"]["schema"]
    for name in ("image", "mask"):
        schema["properties"][name] = {"type": "string", "format": "binary"}
    schema["required"] = ["image", "prompt"]
    return extra
