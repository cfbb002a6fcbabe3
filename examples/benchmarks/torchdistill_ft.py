"""A step of torchdistill's factor transfer on our models, to time beside ours; torchdistill is no dependency."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel


LAST_MAP = "model.resnet.encoder.stages.2"


class Logits(nn.Module):
    """Give torchdistill the tensor that it expects of a classifier."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(pixels).logits


def factor_transfer(
    teacher: PreTrainedModel, student: PreTrainedModel, sgd: dict, device: torch.device, no_checkpoint: str
) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """
    Set up torchdistill's second stage of factor transfer between two CIFAR ResNets.

    Args:
        teacher (`PreTrainedModel`), student (`PreTrainedModel`):
            The models; the student is trained in place.
        sgd (`dict`):
            Arguments of the optimizer.
        device (`torch.device`):
            Where.
        no_checkpoint (`str`):
            Path of a file that does not exist: the paraphraser stays as it starts.

    Returns:
        `Callable`: does one step on pixel values and labels.
    """
    from torchdistill.core.distillation import get_distillation_box

    width = teacher.config.hidden_sizes[-1]
    paraphraser = {"k": 0.5, "num_input_channels": width}
    translator = {"num_input_channels": student.config.hidden_sizes[-1], "num_output_channels": width // 2}
    output = {"is_from_teacher": False, "module_path": ".", "io": "output"}
    classify = {
        "criterion": {"key": "CrossEntropyLoss", "kwargs": {"reduction": "mean"}},
        "criterion_wrapper": {"key": "SimpleLossWrapper", "kwargs": {"input": output, "target": {"uses_label": True}}},
        "weight": 1.0,
    }
    transfer = {"criterion": {"key": "FTLoss", "kwargs": {"p": 1, "reduction": "mean"}}, "weight": 1000.0}

    def part(role: str, wrapper: str, head: str, kwargs: dict) -> dict:
        path = f"{role}_model.{LAST_MAP}"
        kwargs = {"input_module_path": path, **kwargs}
        return {
            "auxiliary_model_wrapper": {"key": wrapper, "kwargs": kwargs},
            "forward_hook": {"input": [], "output": [path, head]},
        }

    of_teacher = {"minimal": None, "paraphraser_kwargs": paraphraser, "paraphraser_ckpt": no_checkpoint}
    of_teacher["uses_decoder"] = False
    config = {
        "num_epochs": 1,
        "teacher": {
            **part("teacher", "Teacher4FactorTransfer", "paraphraser", of_teacher),
            "requires_grad": False,
            "forward_proc": "forward_batch_only",
        },
        "student": {
            **part("student", "Student4FactorTransfer", "translator", {"translator_kwargs": translator}),
            "forward_proc": "forward_batch_only",
        },
        "optimizer": {"key": "SGD", "kwargs": dict(sgd)},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"ce": classify, "ft": transfer}}},
    }
    box = get_distillation_box(
        Logits(teacher).to(device), Logits(student).to(device), {}, config, device, None, False, 1
    )
    box.teacher_model.eval()
    box.student_model.train()

    def step(pixels: torch.Tensor, labels: torch.Tensor) -> None:
        box.post_forward_process(box.forward_process(pixels, labels))

    return step
