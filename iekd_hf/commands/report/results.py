"""The file of what a run has measured."""

import json
from pathlib import Path

from transformers import TrainingArguments

from .table import Result


RESULTS = "results.json"


def write_results(results: list[Result], args: TrainingArguments) -> None:
    """Write what was measured of each model, so that runs of several seeds can be put together."""
    content = {
        result.name: {
            "parameters": result.parameters,
            "metrics": result.metrics,
            "seconds": result.seconds,
            "images_per_second": None if result.latency is None else 1000 / result.latency,
        }
        for result in results
    }
    settings = ("seed", "method", "lambda_inh", "lambda_exp", "num_train_epochs", "learning_rate")
    content = {"settings": {name: getattr(args, name) for name in settings}, "models": content}
    Path(args.output_dir, RESULTS).write_text(json.dumps(content, indent=2) + "\n")
