"""What a run has measured, as a file, so that runs of several seeds can be put together."""

import json
from pathlib import Path

from .table import Result


RESULTS = "results.json"
# The arguments that tell a run of a distilled student from others.
SETTINGS = ("seed", "method", "num_train_epochs", "learning_rate", "lambda_inh", "lambda_exp", "lambda_kd")
SETTINGS += ("inheritance_share", "exploration_share", "kd_share", "kd_distance")

# Those of peers.
OF_PEERS = ("mutual_loss", "lambda_kl")


def write_results(results: list[Result], settings: dict, folder: str) -> None:
    """
    Write `results.json`.

    Args:
        results (`list[Result]`):
            Those of the table.
        settings (`dict`):
            What tells the run from others; empty where nothing was trained.
        folder (`str`):
            Where it goes.

    Example:

    ```python
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_results([Result("teacher", 9, {"accuracy": 0.5})], {"seed": 1}, folder)
    ...     json.loads(Path(folder, RESULTS).read_text())["models"]["teacher"]["metrics"]
    {'accuracy': 0.5}

    ```
    """
    models = {
        result.name: {
            "parameters": result.parameters,
            "metrics": result.metrics,
            "seconds": result.seconds,
            "images_per_second": None if result.latency is None else 1000 / result.latency,
        }
        for result in results
    }
    Path(folder, RESULTS).write_text(json.dumps({"settings": settings, "models": models}, indent=2) + "\n")
