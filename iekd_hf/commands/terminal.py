"""What a command does to the terminal: which warnings it shows, and how it ends when something is wrong."""

import contextlib
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence

import datasets
import transformers.trainer
from transformers.utils import logging as of_transformers


logger = logging.getLogger(__name__)


def command(main: Callable[[list[str]], None]) -> Callable[[Sequence[str] | None], None]:
    """Make the `main` of a subcommand: it takes the command line by default, is quiet, and says errors in one line."""

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> None:
        given = sys.argv[1:] if argv is None else list(argv)
        debug = "--debug" in given
        with _settings_of_the_process():
            _show_messages(debug)
            try:
                main(given)
            except (ValueError, OSError, FloatingPointError, KeyboardInterrupt) as error:
                if not debug:
                    sys.excepthook = functools.partial(_say_in_one_line, error, sys.excepthook)
                raise

    return run


def is_main_process() -> bool:
    """Return whether this process is the one that speaks, by what launchers tell their processes."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Write a line to the terminal, beside the results, which go to stdout."""
    if is_main_process():
        print(text, file=sys.stderr, flush=True)


def _say_in_one_line(
    expected: BaseException, otherwise: Callable, kind: type, error: BaseException, traceback
) -> None:
    """End the process with a line in place of the traceback, if this is the error that it ends with."""
    if error is not expected:
        otherwise(kind, error, traceback)
        return
    if isinstance(error, KeyboardInterrupt):
        say("interrupted: add --resume_from_checkpoint true to continue a training")
        return
    message = " ".join(str(error).split()) or kind.__name__
    if not message.startswith("Expected"):  # not one of ours, which say what to do
        message += " (--debug shows where)"
    # What is wrong with the arguments is so in all processes.
    if is_main_process() or not isinstance(error, ValueError):
        print(f"error: {message}", file=sys.stderr)


@contextlib.contextmanager
def _settings_of_the_process() -> Iterator[None]:
    """Give the process its own settings back, for whoever calls a command from Python."""
    verbosity, progress = of_transformers.get_verbosity(), transformers.trainer.DEFAULT_PROGRESS_CALLBACK
    bars = {module: module.is_progress_bar_enabled() for module in (of_transformers, datasets)}
    with warnings.catch_warnings():
        try:
            yield
        finally:
            if hasattr(transformers.trainer.DEFAULT_PROGRESS_CALLBACK, "close"):
                transformers.trainer.DEFAULT_PROGRESS_CALLBACK.close()  # the bar of a training that was interrupted
            of_transformers.set_verbosity(verbosity)
            transformers.trainer.DEFAULT_PROGRESS_CALLBACK = progress
            for module, enabled in bars.items():
                (module.enable_progress_bar if enabled else module.disable_progress_bar)()


def _show_messages(debug: bool) -> None:
    """Show the warnings of this library, a line each; those of others with `--debug`."""
    level = logging.WARNING if is_main_process() else logging.ERROR
    if debug:
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=level)
        return
    logging.basicConfig(format="%(levelname)s: %(message)s", level=level)
    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()  # those of loading and saving
    if not sys.stderr.isatty():
        datasets.disable_progress_bar()
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", module=r"iekd_hf\.|__main__$")
    warnings.showwarning = lambda message, *_, **__: logger.warning(message)
