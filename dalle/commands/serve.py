"""`dalle serve`: the page and the API, until they are stopped."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from dalle.commands.console import Device, Dtype, Model, device_named, log_to_stderr


def serve(
    model: Model = None,
    host: Annotated[
        str, typer.Option(help="Address; others than this machine's need an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="DALLE_API_KEY", help="What every request must bring.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A further name that the server is reached by, such as a proxy's."),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the history; ~/.local/share/dalle if left out.")
    ] = None,
    runs: Annotated[Path | None, typer.Option(help="Folder of training runs to watch.")] = None,
    templates: Annotated[Path | None, typer.Option(help="TOML file with captions for the explorer.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="K=V", help="Override a limit, such as max_queue=8.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = None,
    native: Annotated[bool, typer.Option("--native", help="Compiled attention, see `generate`.")] = False,
) -> None:
    """Serve the page and an OpenAI-compatible images API until it is stopped."""
    log_to_stderr()
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # one line for each damaged upload
    from dalle.config import override, validate
    from dalle.pipeline import DallePipeline
    from dalle.serving.app import create_app
    from dalle.serving.server import Server, listen
    from dalle.serving.settings import Settings

    given = {"host": host, "port": port, "api_key": api_key, "data_dir": data_dir, "runs": runs}
    given |= {"templates": templates, "allowed_hosts": tuple(allow_host or ())}
    tree = override({key: value for key, value in given.items() if value is not None}, settings or [])
    chosen = validate(Settings, tree, "serve")
    place = listen(chosen)  # a wrong setting and a port in use are told before the model is loaded
    pipe = DallePipeline.from_pretrained(model, dtype=dtype, device=device_named(device), native=native)
    Server(create_app(chosen, pipe), chosen).run(sockets=[place])
