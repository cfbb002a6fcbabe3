"""
A detector and images of which it finds something; run by torchrun, it is evaluated on every rank.

The truth is made of what the detector guesses, so that its metrics are not 0 without training.
"""

import json
import os
import sys
from pathlib import Path

import conftest  # noqa: F401  it puts the examples on the path
import PIL.Image
import torch
from test_detection_transforms import split_of
from transformers import TrainingArguments

from iekd_hf.commands.boxes.data import Annotated
from iekd_hf.commands.boxes.tiny_detectors import tiny_detector, tiny_processor
from iekd_hf.commands.boxes.trainers import BoxMetrics, DetectionTrainer, to_boxes
from iekd_hf.commands.boxes.transforms import DetectionImages, collate


NAMES, PROCESSOR = ["a", "b"], tiny_processor(32, 32)


def make_case(count: int) -> tuple[torch.nn.Module, Annotated, list[dict]]:
    """Return the detector, the images, and what it finds in them one by one."""
    torch.manual_seed(0)
    model = tiny_detector("tiny-rt-detr-4", id2label=dict(enumerate(NAMES))).eval()
    images = [PIL.Image.new("RGB", (32 + i % 2, 24), (5 * i, 0, 0)) for i in range(count)]
    found = []
    with torch.no_grad():
        for example in DetectionImages(split_of(images, [[]] * count), PROCESSOR):
            outputs = model(pixel_values=example["pixel_values"][None])
            found += to_boxes(outputs.logits, outputs.pred_boxes, example["labels"]["frame"][None], len(NAMES))
    # In two of three images the truth is the fourth guess, moved a little.
    boxes = [[[value + 0.1 for value in image["boxes"][3]]] if i % 3 else [] for i, image in enumerate(found)]
    labels = [image["labels"][3:4] if i % 3 else [] for i, image in enumerate(found)]
    return model, split_of(images, boxes, labels), found


def make_trainer(output_dir: str, model: torch.nn.Module, split: Annotated, **kwargs) -> DetectionTrainer:
    """Return a trainer that evaluates the detector on the images."""
    args = TrainingArguments(
        output_dir,
        per_device_eval_batch_size=6,
        batch_eval_metrics=True,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        max_steps=2,
        save_strategy="no",
    )
    return DetectionTrainer(
        model=model,
        args=args,
        eval_dataset=DetectionImages(split, PROCESSOR),
        data_collator=collate,
        compute_metrics=BoxMetrics(split, NAMES),
        **kwargs,
    )


if __name__ == "__main__":
    model, split, _ = make_case(47)
    metrics = make_trainer(sys.argv[1], model, split).evaluate()
    Path(sys.argv[1], f"rank_{os.environ['RANK']}.json").write_text(json.dumps(metrics))
