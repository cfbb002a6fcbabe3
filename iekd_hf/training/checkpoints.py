"""What a run keeps on disk: students, encoders with their splits, paraphrasers; each is loaded whole or not at all."""

import contextlib
import os
from pathlib import Path

import torch
from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import logging

from ..method.factors import Paraphraser
from ..models.adapters import different_weights, is_adapted, load_adapter
from ..models.loading import explain_unreachable
from .manifest import MANIFEST_FILE, check_undamaged, file_written_whole, written_whole


logger = logging.get_logger(__name__)

ENCODERS_FILE = "iekd_encoders.safetensors"
# Where a finished run keeps them, beside the plain student; never pushed.
ENCODERS_FOLDER = "_encoders"


def save_encoders(module: nn.Module, folder: str | Path, trainer: str, **made_for: str) -> None:
    """Save everything that trains but the students, which are saved as models."""
    os.makedirs(folder, exist_ok=True)
    tensors = {name: value.contiguous() for name, value in _beside_students(module).items()}
    with file_written_whole(Path(folder) / ENCODERS_FILE) as part:
        save_file(tensors, part, metadata={"format": "pt", "trainer": trainer, **made_for})


def check_made_by(folder: str, trainer: str, **made_for: str) -> None:
    """Refuse a checkpoint of another trainer, or one whose encoders belong to something else."""
    file = Path(folder) / ENCODERS_FILE
    if not file.is_file():
        raise ValueError(
            f"Expected a checkpoint of {trainer} in {folder}, got one without {ENCODERS_FILE}: it was written by "
            "another trainer or by save_model(). To start from its weights, load them from that folder and do not "
            "resume."
        )
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
    except SafetensorError as error:
        raise ValueError(
            f"Expected a checkpoint of {trainer} in {folder}, got one whose {ENCODERS_FILE} cannot be read ({error}): "
            "resume from another checkpoint."
        ) from error
    if metadata["trainer"] != trainer:
        raise ValueError(
            f"Expected a checkpoint of {trainer} in {folder}, got one of {metadata['trainer']}: resume with that "
            "trainer."
        )
    for name, value in made_for.items():
        if metadata[name] == value:
            continue
        if name == "paraphrasers":
            raise ValueError(
                f"Expected the paraphraser that the checkpoint in {folder} was trained against, got another one: pass "
                "the paraphraser (or the output_dir) of that run."
            )
        raise ValueError(
            f"Expected a checkpoint for {name} {value}, got one for {metadata[name]} in {folder}: set {name} as it "
            "was, or use another output_dir."
        )


def check_training_state(folder: str, args: TrainingArguments) -> None:
    """Refuse a checkpoint that has lost its optimizer; say what starts afresh where it, or other ranks, go on."""
    random_states = [*Path(folder).glob("rng_state*.pth")]  # one of each rank
    missing = [name for name in (OPTIMIZER_NAME, SCHEDULER_NAME) if not Path(folder, name).is_file()]
    missing += [] if random_states else ["rng_state.pth"]
    if missing and not args.save_only_model and not Path(folder, MANIFEST_FILE).is_file():
        raise ValueError(
            f"Expected {' and '.join(missing)} in {folder}, got a checkpoint without, and no {MANIFEST_FILE} that "
            "says it was saved so: resume from another checkpoint, or set save_only_model=True to go on with a new "
            "optimizer."
        )
    if missing:
        logger.warning(
            f"{folder} has no {' and no '.join(missing)}: what they hold (optimizer, learning rate schedule, random "
            "state) starts afresh."
        )
    elif len(random_states) != args.world_size and args.process_index == 0:
        logger.warning(
            f"{folder} was saved by {len(random_states)} processes and goes on with {args.world_size}: the order of "
            "the images and the random state of the processes are not those of the run."
        )


def load_encoders(module: nn.Module, folder: str) -> None:
    """Restore what [`save_encoders`] has saved."""
    module.load_state_dict(read_encoders(module, folder), strict=False)


def read_encoders(module: nn.Module, folder: str) -> dict[str, torch.Tensor]:
    """Read what [`save_encoders`] has saved; refuse encoders of other shapes."""
    own, tensors = _beside_students(module), load_file(Path(folder) / ENCODERS_FILE)
    different = different_weights(own, tensors)
    if different:
        raise ValueError(
            f"Expected a checkpoint of encoders as the arguments make them, got another one in {folder} "
            f"({len(different)} weights are missing, unknown or of another shape, such as "
            f"{different[0]}): set inheritance_ratio, factor_channels, encoder_kernel_size and the losses in use as "
            "they were, or use another output_dir."
        )
    return tensors


def _beside_students(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in module.state_dict().items() if ".student." not in f".{name}"}


def save_paraphrasers(paraphrasers: nn.ModuleList, folder: Path, run: str = "") -> None:
    """Save paraphrasers, whole or not at all: one in the folder itself, several in folders `0`, `1`, ... of it."""
    with written_whole(folder, run=run) as part:
        for index, paraphraser in enumerate(paraphrasers):
            paraphraser.save_pretrained(part if len(paraphrasers) == 1 else part / str(index))


def load_paraphrasers(
    source: Paraphraser | list[Paraphraser] | str, num_layers: int, kind: type[PyTorchModelHubMixin] = Paraphraser
) -> list[Paraphraser]:
    """Take paraphrasers as objects, or load them from a Hub id or a folder."""
    if isinstance(source, (str, Path)):
        name = str(source)
        if num_layers > 1 and not os.path.isdir(name):
            raise ValueError(
                f"Expected a local folder with the {num_layers} paraphrasers of {num_layers} layers, got {name!r}: "
                "download it first (huggingface_hub.snapshot_download), or pass a list of paraphrasers."
            )
        folders = [name] if num_layers == 1 else [os.path.join(name, str(index)) for index in range(num_layers)]
        if os.path.isdir(name):
            check_undamaged(Path(name))
        try:
            with contextlib.redirect_stdout(None):  # which the mixin prints "Loading weights" to
                source = [kind.from_pretrained(folder, strict=True) for folder in folders]
        except TypeError as error:  # the mixin found no configuration to call the class with
            raise ValueError(
                explain_unreachable(name, "paraphraser", ValueError("no config.json of a paraphraser was found there"))
            ) from error
        except (OSError, RuntimeError, SafetensorError, HFValidationError) as error:
            raise ValueError(explain_unreachable(name, "paraphraser", error)) from error
    paraphrasers = list(source) if isinstance(source, (list, tuple, nn.ModuleList)) else [source]
    for paraphraser in paraphrasers:
        if not isinstance(paraphraser, kind):
            raise ValueError(
                f"Expected a {kind.__name__} for this knowledge, got a {type(paraphraser).__name__}: pass one, its "
                "folder or Hub id, or None to train one."
            )
    if len(paraphrasers) != num_layers:
        raise ValueError(
            f"Expected {num_layers} paraphrasers, one for each layer of the teacher, got {len(paraphrasers)}: pass as "
            "many, or None to train them."
        )
    return paraphrasers


def load_weights(model: PreTrainedModel, folder: str) -> None:
    """Load a checkpoint's weights into a model, all of them or none; of a model with adapters, the active adapter."""
    if is_adapted(model):
        load_adapter(model, folder)
    else:
        model.load_state_dict(read_weights(model, folder))


def read_weights(model: PreTrainedModel, folder: str) -> dict[str, torch.Tensor]:
    """
    Read the weights of a checkpoint of this model; refuse one of another.

    Trainer's own way, `load_state_dict(strict=False)` on the saved names, loses the weights whose names differ on
    disk, which for ViT, Swin and DINOv2 is most of them (https://github.com/huggingface/transformers/issues/43701).
    """
    what_to_do = "give the model that was trained there, or another output_dir."
    try:
        loaded, info = type(model).from_pretrained(folder, output_loading_info=True, use_safetensors=True)
    except (RuntimeError, OSError, SafetensorError) as error:
        raise ValueError(
            f"Expected a checkpoint of this {type(model).__name__} in {folder}, got one that cannot be loaded "
            f"({str(error).strip().splitlines()[0]}): {what_to_do}"
        ) from error
    expected, got = model.state_dict(), loaded.state_dict()
    shapes = {name: (expected[name].shape, got[name].shape) for name in expected.keys() & got.keys()}
    different = sorted(name for name, (ours, theirs) in shapes.items() if ours != theirs)
    missing = sorted(set(info["missing_keys"]) | (expected.keys() - got.keys()))
    unexpected = sorted(set(info["unexpected_keys"]) | (got.keys() - expected.keys()))
    if different:
        name = different[0]
        raise ValueError(
            f"Expected a checkpoint of this {type(model).__name__} in {folder}, got one of other shapes ({name} is "
            f"{tuple(shapes[name][1])} there and {tuple(shapes[name][0])} here; {len(different)} such weights): "
            f"{what_to_do}"
        )
    if missing or unexpected:
        raise ValueError(
            f"Expected every weight of {type(model).__name__} in {folder} and no other, got {len(missing)} missing "
            f"{missing[:3]} and {len(unexpected)} unexpected {unexpected[:3]}: {what_to_do}"
        )
    return got
