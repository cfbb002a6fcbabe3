"""Facts for the model card: networks and their metrics, the training curve, the recipe."""

import html
import math
import os
import re
from dataclasses import dataclass, fields
from typing import NamedTuple

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.modelcard import make_markdown_table

from ..method.objective import AUTO
from ..models.adapters import without_adapters
from ..models.signature import takes_labels


# Trainer's own measurements among the metrics.
_SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time")
_MOST_ROWS = 20
# Arguments that change no result.
_ONLY_SPEED = {"channels_last", "fast_teacher", "compile_teacher", "teacher_cache_dir"}
# Marks in what is logged that an average was measured, which the student held for a while.
AVERAGED = "averaged"


def hub_id(name: str | None) -> str | None:
    """Return a name if it is one on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if name and not os.path.exists(name) else None


def link(name: str, kind: str = "") -> str:
    """Return a link to a repository on the Hub; `kind` is `datasets/` for a data set."""
    return f"[{name}](https://huggingface.co/{kind}{name})"


def plain(text: str) -> str:
    """Write text that comes from outside on one line, so that Markdown shows it as it is."""
    text = html.escape(" ".join(str(text).split()), quote=False)
    # An underscore within a word means nothing.
    return re.sub(r"[\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\\\g<0>", text)


@dataclass
class Network:
    """Hold a row of the card's table."""

    role: str
    architecture: str
    source: str | None
    parameters: int
    mebibytes: float
    metrics: dict[str, float]
    labels: list[str]
    latency: float | None = None

    @classmethod
    def of(cls, role: str, model: nn.Module, metrics: dict | None = None) -> "Network":
        """Describe a model; of the metrics, numbers are kept."""
        tensors, bare = [*model.parameters(), *model.buffers()], without_adapters(model)
        config = getattr(bare, "config", None)
        has_classes = takes_labels(bare) and not type(bare).__name__.endswith("ForDepthEstimation")
        return cls(
            role,
            type(bare).__name__,
            hub_id(getattr(config, "_name_or_path", None)),
            sum(parameter.numel() for parameter in model.parameters()),
            sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20,
            numbers(metrics or {}),
            list((getattr(config, "id2label", None) or {}).values()) if has_classes else [],
        )

    @property
    def in_repository(self) -> bool:
        """Return whether the model is in the repository."""
        return self.role != "teacher"

    @property
    def name(self) -> str:
        """Return what to call it: a teacher of the Hub by a link, others by their class."""
        return f"`{self.architecture}`" if self.in_repository or not self.source else link(self.source)

    @property
    def shown_latency(self) -> str:
        """Return the latency as the table has it."""
        return "-" if self.latency is None else f"{self.latency:.2f} ms"

    def shown(self, metric: str) -> str:
        """Return a metric as the table has it."""
        return f"{self.metrics[metric]:.4f}" if metric in self.metrics else "-"


class CardFacts(NamedTuple):
    """Hold what a trainer knows for the card: networks, how they were trained, papers, and unused arguments."""

    networks: list[Network]
    how_trained: str = ""
    papers: tuple[str, ...] = ()
    unused: frozenset[str] = frozenset()


def numbers(metrics: dict) -> dict[str, float]:
    """Return what a table of metrics holds: finite numbers, without the loss and what measures speed."""
    metrics = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    return {
        name: float(value)
        for name, value in metrics.items()
        if not name.endswith((*_SPEED, "loss")) and name not in ("epoch", "step") and _is_number(value)
    }


def _is_number(value) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:
        return False


def last_metrics(trainer: Trainer) -> dict[str, float]:
    """Return the metrics of the weights that are saved, as the trainer has logged them."""
    state = trainer.state
    averaged = any(getattr(callback, "is_in_use", False) for callback in trainer.callback_handler.callbacks)
    # An average is that of the last step, whichever step was the student's best.
    best = trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None and not averaged
    step, metrics, ended = state.best_global_step if best else state.global_step, {}, False
    for logs in state.log_history:
        ended = ended or "train_runtime" in logs
        if logs.get(AVERAGED, False) != averaged:
            continue
        # After training, the best weights are evaluated under the last step.
        if any(name.startswith("eval_") for name in logs) and (logs["step"] == step or ended):
            metrics |= numbers({name: value for name, value in logs.items() if name.startswith("eval_")})
    return metrics


def curve(log_history: list[dict]) -> str:
    """Lay the losses and metrics of a run out as a table, of at most 20 rows."""
    rows, losses = [], {}
    for logs in log_history:
        if "train_runtime" in logs:
            break
        if AVERAGED in logs:
            continue
        if "loss" in logs:
            losses = {name: value for name, value in logs.items() if name.endswith("loss") and _is_number(value)}
        evaluated = {name: value for name, value in logs.items() if name.startswith("eval_") and _is_number(value)}
        evaluated = {name: value for name, value in evaluated.items() if not name.endswith(_SPEED)}
        if ("loss" in logs or evaluated) and rows and rows[-1]["step"] == logs["step"]:
            rows[-1] |= {**losses, **evaluated}
        elif "loss" in logs or evaluated:
            rows.append({"epoch": f"{logs['epoch']:.2f}", "step": logs["step"], **losses, **evaluated})
    if any(name.startswith("eval_") for row in rows for name in row):
        rows = [row for row in rows if any(name.startswith("eval_") for name in row)]
    count = min(len(rows), _MOST_ROWS)
    rows = [rows[round(i * (len(rows) - 1) / max(count - 1, 1))] for i in range(count)]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return make_markdown_table([{plain(name): row.get(name, "") for name in columns} for row in rows])


def recipe(args: TrainingArguments, unused: frozenset[str] = frozenset()) -> list[tuple[str, str, str]]:
    """Return name, value and meaning of each argument that is set and used, and that this library has added."""
    known = {f.name for f in fields(TrainingArguments)} | unused
    ours = {name for cls in type(args).__mro__ if cls.__module__.startswith("iekd_hf.") for name in vars(cls)}
    values = args.to_dict()
    if not any(values.get(name) == AUTO for name in ours):
        ours -= {"inheritance_share", "exploration_share", "kd_share"}  # which are those of automatic weights
    return [
        (f.name, plain(values[f.name]), f.metadata.get("help", "").partition(" Default: ")[0].rstrip("."))
        for f in fields(args)
        if f.name in ours - known - _ONLY_SPEED and values[f.name] is not None
    ] + [("seed", str(args.seed), "Seed of the encoders, the data's order and augmentation")]
