"""The `dalle` command: what it is called with, and how it ends; see `dalle COMMAND --help`, and `dalle.commands`."""

import io
import sys

import typer

from dalle.commands import (
    classify,
    compare,
    data,
    encode,
    evaluate,
    finetune,
    generate,
    import_,
    learn,
    plan,
    rerank,
    rerun,
    serve,
)

app = typer.Typer(
    name="dalle",
    help="Train, draw with and look into a text-to-image model of your own.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Look over and build data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")

app.command()(generate.generate)
app.command()(learn.train)
app.command()(finetune.finetune)
app.command()(encode.encode)
app.command()(evaluate.evaluate)
app.command()(compare.compare)
app.command()(rerun.rerun)
app.command()(serve.serve)
app.command()(rerank.rerank)
app.command()(classify.classify)
app.command()(plan.plan)
app.command(name="import")(import_.import_checkpoint)
data_app.command()(data.inspect)
data_app.command(name="filter")(data.filter_data)
data_app.command()(data.emoji)
data_app.command()(data.scenes)


def main() -> None:
    """Run the command line: a user's mistake is one line on stderr and exit code 2, a full disk or the like 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a caption or path may hold what the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)  # typer returns the code of an Exit in this mode
    except (typer.Exit, typer.Abort) as stop:
        sys.exit(getattr(stop, "exit_code", 130))
    except KeyboardInterrupt:
        print("dalle: interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, FloatingPointError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        # typer's own usage errors (unknown option, missing argument) know how to show themselves
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            sys.exit(error.exit_code)
        raise


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    main()
