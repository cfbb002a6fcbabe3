"""
Export a saved classifier to ONNX, and compare both runtimes on the CPU.

Example:
  iekd-hf export --model out --output student.onnx

The file takes `pixel_values` of any batch size, as the model's image processor makes them, and gives `logits`. It is
written only if its logits are the model's own.
"""

import json
import os
import tempfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import torch
from torch import nn
from transformers import AutoImageProcessor, PreTrainedModel

from ..models.loading import explain_unreachable, load_model
from .packages import require
from .parser import parse_arguments
from .report.latency import median_milliseconds
from .terminal import command


if TYPE_CHECKING:
    import onnxruntime


# Relative to the largest logit; float32 arithmetic in another order differs by about 1e-6.
TOLERANCE = 1e-4


@dataclass
class ExportArguments:
    """Say what to export, and where to."""

    _argument_group_name = "Export"

    model: str = field(metadata={"help": "The student: a folder that save_model() has written, or a Hub id."})
    output: str = field(default="student.onnx", metadata={"help": "The file to write."})
    threads: int = field(default=1, metadata={"help": "Threads of both runtimes while they are timed."})
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run the code that comes with a model on the Hub. Only for repositories you trust."},
    )


class Logits(nn.Module):
    """Give a classifier's logits as the one output of a graph."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return logits of shape `(batch_size, num_labels)`."""
        return self.model(pixel_values=pixel_values).logits


def load(args: ExportArguments) -> tuple[PreTrainedModel, torch.Tensor]:
    """Return the model in float32 and eval mode, and the processed pixels of one picture."""
    trust = {"trust_remote_code": args.trust_remote_code}
    model = load_model(args.model, "--model", dtype="float32", **trust).eval()
    try:
        processor = AutoImageProcessor.from_pretrained(args.model, **trust)
    except OSError as error:
        raise ValueError(explain_unreachable(args.model, "--model", error)) from error
    shape = (224, 224) if getattr(model.config, "num_channels", 3) == 1 else (224, 224, 3)
    picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    pixels = processor(PIL.Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    check_classifies(model, pixels, args.model)
    return model, pixels


def check_classifies(model: PreTrainedModel, pixels: torch.Tensor, name: str) -> None:
    """Refuse a model that gives no logits of classes: a backbone, or a network for boxes or masks."""
    with torch.inference_mode():
        logits = getattr(model(pixel_values=pixels), "logits", None)
    if logits is None or logits.ndim != 2:
        gives = "no logits" if logits is None else f"logits of shape {tuple(logits.shape)}"
        raise ValueError(
            f"Expected a classifier in --model={name!r}, with logits (batch_size, num_labels), got "
            f"{type(model).__name__}, which gives {gives}: name a classifier whose head has been trained, such as the "
            "output_dir of iekd-hf distill."
        )


def export(model: PreTrainedModel, pixels: torch.Tensor, path: str) -> None:
    """Write a model as ONNX for any batch size, with its labels in the file's metadata."""
    try:
        program = torch.onnx.export(
            Logits(model).eval(),
            (pixels.repeat(2, 1, 1, 1),),  # a size of 1 would be taken as fixed
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch_size")}},
            dynamo=True,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(
            f"Expected an architecture that torch {torch.__version__} exports to ONNX, got {type(model).__name__}, "
            f"which it does not ({type(error.__cause__ or error).__name__}): take another student, or another torch."
        ) from error
    program.model.metadata_props["id2label"] = json.dumps(model.config.id2label)
    program.save(path)


def compare(model: PreTrainedModel, pixels: torch.Tensor, session: "onnxruntime.InferenceSession") -> float:
    """Return the largest difference of two logits in batches of several sizes; refuse more than rounding explains."""
    generator, differences, largest = torch.Generator().manual_seed(0), [], 0.0
    for batch_size in (1, 3, 8):
        noise = torch.randn(batch_size, *pixels.shape[1:], generator=generator)
        with torch.inference_mode():
            expected = model(pixel_values=pixels + noise).logits.numpy()
        (got,) = session.run(["logits"], {"pixel_values": (pixels + noise).numpy()})
        differences.append(float(np.abs(got - expected).max()))
        largest = max(largest, float(np.abs(expected).max()))
    if not max(differences) <= TOLERANCE * largest:
        raise ValueError(
            f"Expected onnxruntime to give the model's logits, up to {largest:.3g} in size, got a difference of "
            f"{max(differences):.3g}: the export of this architecture is wrong, do not use it."
        )
    return max(differences)


KINDS = (ExportArguments,)


@command
def main(given: list[str]) -> None:
    """Run `iekd-hf export`, with the arguments of the command line by default."""
    (args,) = parse_arguments(KINDS, __doc__, "iekd-hf export", given)
    require("onnx", "onnx", "onnxruntime", "onnxscript")
    import onnxruntime

    folder = os.path.dirname(os.path.abspath(args.output))
    if not os.path.isdir(folder):
        raise ValueError(f"Expected --output in a folder that is there, got {args.output!r}: make {folder} first.")
    model, pixels = load(args)
    with tempfile.TemporaryDirectory(dir=folder) as part:
        unchecked = os.path.join(part, os.path.basename(args.output))
        export(model, pixels, unchecked)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = args.threads
        session = onnxruntime.InferenceSession(unchecked, options, providers=["CPUExecutionProvider"])
        difference = compare(model, pixels, session)
        files = os.listdir(part)  # large weights have a file of their own
        for name in files:
            os.replace(os.path.join(part, name), os.path.join(folder, name))

    with torch.inference_mode():
        in_torch = median_milliseconds(lambda x: model(pixel_values=x), pixels, threads=args.threads)
    in_onnxruntime = median_milliseconds(lambda x: session.run(None, {"pixel_values": x}), pixels.numpy())
    size = sum(os.path.getsize(os.path.join(folder, name)) for name in files) / 2**20
    _, channels, height, width = pixels.shape
    print(f"{args.output}: {size:.1f} MiB, pixel_values (batch_size, {channels}, {height}, {width}) -> logits")
    print(f"largest difference of two logits: {difference:.1e}")
    threads = "1 thread" if args.threads == 1 else f"{args.threads} threads"
    print(f"one image on the CPU, {threads}, median: torch {in_torch:.2f} ms, onnxruntime {in_onnxruntime:.2f} ms")


if __name__ == "__main__":
    main()
