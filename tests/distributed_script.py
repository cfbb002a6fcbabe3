"""Run by torchrun in test_distributed.py: train on every rank, and write down what each rank holds, job by job."""

import itertools
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from conftest import make_dinov2, make_images, make_resnet, make_vit
from test_segmenters import build, make_masked
from test_streams import StopAt, make_tars, note_pixels, read_tars
from test_whole_batches import make_augmentation, make_decoded

from iekd_hf import (
    IEKDTrainer,
    IEKDTrainingArguments,
    MutualTrainer,
    MutualTrainingArguments,
    Paraphraser,
)
from iekd_hf.teacher import cache
from iekd_hf.teacher.frozen import FrozenTeacher
from iekd_hf.training import weights


def common(output_dir: str) -> dict:
    return {
        "output_dir": f"{output_dir}/out",
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }


DATA = {"train_dataset": make_images(32), "eval_dataset": make_images(16, seed=1)}


def distil_cached(output_dir: str) -> tuple[IEKDTrainer, dict]:
    courses, seen, run, block = [], [], FrozenTeacher.forward, cache._BLOCK

    def counted(self, inputs, with_logits=False):
        seen.append(len(inputs["pixel_values"]))
        return run(self, inputs, with_logits)

    FrozenTeacher.forward = counted
    cache._BLOCK = 5
    torch.manual_seed(0)
    paraphraser = Paraphraser(16, 8)
    for cached in (False, True):
        seen.clear()
        trainer = IEKDTrainer(
            model=make_resnet(seed=1),
            teacher_model=make_resnet(16, seed=2),
            paraphraser=paraphraser,
            augmentation=make_augmentation(),
            args=IEKDTrainingArguments(
                **{**common(output_dir), "eval_strategy": "no"}, optim="sgd", cache_teacher=cached, cache_views=2
            ),
            train_dataset=make_decoded(16),
        )
        trainer.train()
        courses.append([logs["inheritance_loss"] for logs in trainer.state.log_history if "inheritance_loss" in logs])
    FrozenTeacher.forward, cache._BLOCK = run, block
    return trainer, {"courses": courses, "seen": sum(seen), "student_side": trainer.student_side.state_dict()}


def distil(output_dir: str, student: str) -> tuple[IEKDTrainer, dict]:
    model = {"resnet": make_resnet, "vit": make_vit, "dinov2": make_dinov2}[student](seed=torch.initial_seed() % 7)
    trainer = IEKDTrainer(
        model=model,
        teacher_model=make_resnet(16, seed=2),
        args=IEKDTrainingArguments(paraphraser_epochs=1, **common(output_dir)),
        **DATA,
    )
    output = trainer.train()
    return trainer, {
        "find_unused_parameters": trainer.accelerator.ddp_handler.find_unused_parameters,
        "student_side": trainer.student_side.state_dict(),
        "paraphrasers": trainer.teacher.paraphrasers.state_dict(),
        "eval_loss": trainer.evaluate()["eval_loss"],
        "reconstruction_loss": output.metrics["paraphraser_reconstruction_loss"],
        "logs": [logs for logs in trainer.state.log_history if "inheritance_loss" in logs],
    }


def distil_auto(output_dir: str) -> tuple[IEKDTrainer, dict]:
    """Distil with weights that are measured at each second step, unbroken and broken off before the second one."""
    weights._LEAST, weights._MOST, held = 2, 2, {}
    for name, stop in (("unbroken", None), ("broken", 3), ("resumed", None)):
        out = f"{output_dir}/{'unbroken' if name == 'unbroken' else 'broken'}"
        settings = {**common(out), "logging_steps": 1, "eval_strategy": "no", "save_steps": 1000}
        trainer = IEKDTrainer(
            model=make_resnet(seed=1),
            teacher_model=make_resnet(16, seed=2),
            args=IEKDTrainingArguments(
                paraphraser_epochs=1, method="ie-ft+kd", **dict.fromkeys(weights.SHARE_OF, "auto"), **settings
            ),
            train_dataset=DATA["train_dataset"],
            callbacks=[StopAt(stop)],
        )
        trainer.train(resume_from_checkpoint=name == "resumed")
        held[name] = {
            "weights": [
                [logs[weight] for weight in weights.SHARE_OF]
                for logs in trainer.state.log_history
                if "lambda_kd" in logs
            ],
            "student_side": trainer.student_side.state_dict(),
        }
    return trainer, held


def distil_unlabelled(output_dir: str, **changes) -> tuple[IEKDTrainer, dict]:
    """Distil where the second half of each eight images, those of rank 1, have no label."""
    images = make_images(32)
    for i, image in enumerate(images):
        image["labels"] = image["labels"] if i % 8 < 3 else -100
    settings = {**common(output_dir), "eval_strategy": "no", "logging_steps": 1, "optim": "sgd", **changes}
    settings |= {"per_device_eval_batch_size": 4}
    trainer = IEKDTrainer(
        model=make_vit(seed=1),
        teacher_model=make_resnet(16, seed=2),
        args=IEKDTrainingArguments(method="kd", train_sampling_strategy="sequential", **settings),
        train_dataset=images,
    )
    trainer.train()
    logs = [logs["task_loss"] for logs in trainer.state.log_history if "task_loss" in logs]
    for image in images:  # in lists it is known beforehand whether any has a label
        image["labels"] = None if image["labels"] == -100 else image["labels"]
    first_half = [image for i, image in enumerate(images) if i % 8 < 4]
    without = [{"pixel_values": image["pixel_values"]} for image in images]
    losses = [trainer.evaluate(data)["eval_loss"] for data in (images, WithoutAList(images), first_half, without)]
    return trainer, {"student_side": trainer.student_side.state_dict(), "task_losses": logs, "eval_losses": losses}


def own_loss(outputs, labels, num_items_in_batch=None) -> torch.Tensor:
    """Return the cross entropy of the images that have a label, 0 without any."""
    logits = outputs["logits"]
    if labels is None:
        return logits.sum() * 0
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


def distil_missing(output_dir: str, **changes) -> tuple[IEKDTrainer, dict]:
    """Distil where one rank's rows have no label at all: read by rank 0 for both, and with a loss of one's own."""
    held = {"task_losses": {}}
    for kind, loss in (("dispatched", None), ("own-loss", own_loss)):
        images = make_images(32)
        for i, image in enumerate(images):
            image["labels"] = None if i % 8 < 4 else image["labels"]
        settings = {
            **common(f"{output_dir}/{kind}"),
            "eval_strategy": "no",
            "logging_steps": 1,
            "optim": "sgd",
            **changes,
        }
        if loss is None:
            settings["accelerator_config"] = {"dispatch_batches": True}
        trainer = IEKDTrainer(
            model=make_vit(seed=1),
            teacher_model=make_resnet(16, seed=2),
            args=IEKDTrainingArguments(method="kd", train_sampling_strategy="sequential", **settings),
            train_dataset=images,
            compute_loss_func=loss,
        )
        trainer.train()
        held["task_losses"][kind] = [logs["task_loss"] for logs in trainer.state.log_history if "task_loss" in logs]
    return trainer, {**held, "student_side": trainer.student_side.state_dict()}


class Gaps(torch.utils.data.IterableDataset):
    """Give images of which the first half of each eight, those of rank 0, have no label."""

    def __iter__(self):
        return iter({**im, "labels": None if i % 8 < 4 else im["labels"]} for i, im in enumerate(make_images(32)))


def distil_gaps(output_dir: str, **changes) -> tuple[IEKDTrainer, dict]:
    """Train and evaluate on a stream with gaps; and on masks of which those of rank 1's first batch are void."""
    settings = {**common(output_dir), "eval_strategy": "no", "save_strategy": "no", "logging_steps": 1, "optim": "sgd"}
    settings |= {"method": "kd", "per_device_eval_batch_size": 4, **changes}
    trainer = IEKDTrainer(
        model=make_vit(seed=1),
        teacher_model=make_resnet(16, seed=2),
        args=IEKDTrainingArguments(**settings),
        train_dataset=Gaps(),
    )
    trainer.train()
    logs = [logs["task_loss"] for logs in trainer.state.log_history if "task_loss" in logs]
    masks = make_masked(16)
    for image in masks[4:8]:
        image["labels"] = torch.full_like(image["labels"], 255)
    dense = IEKDTrainer(
        model=build("SegFormer")[0],
        teacher_model=build("SegFormer", seed=1)[0],
        args=IEKDTrainingArguments(**settings),
        train_dataset=masks,
    )
    losses = [trainer.evaluate(Gaps())["eval_loss"], dense.evaluate(masks)["eval_loss"]]
    return trainer, {"student_side": trainer.student_side.state_dict(), "task_losses": logs, "eval_losses": losses}


class WithoutAList(torch.utils.data.Dataset):
    """Give rows one by one."""

    def __init__(self, rows: list[dict]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


def with_a_number(model: torch.nn.Module) -> torch.nn.Module:
    model.logit_scale = torch.nn.Parameter(torch.tensor(2.0))
    return model


SHARDED = {
    "resnet": {"teacher_model": make_resnet(16, seed=2)},
    "vit": {"teacher_model": make_vit(24, seed=2), "method": "ie-ft+kd"},  # the whole of it runs
    # The pass is left inside of a block; a number is on every rank, as in CLIP.
    "inside": {
        "teacher_model": with_a_number(make_resnet(16, seed=2)),
        "teacher_layers": ["resnet.encoder.stages.0.layers.0.layer"],
        "student_layers": ["resnet.encoder.stages.0"],
    },
    "bfloat16": {"teacher_model": make_vit(24, seed=2), "teacher_dtype": "bfloat16"},
    "cached": {
        "teacher_model": make_resnet(16, seed=2),
        "cache_teacher": True,
        "cache_views": 1,
        "train_dataset": make_decoded(16),
        "augmentation": make_augmentation(),
    },
}


def distil_sharded(output_dir: str) -> tuple[IEKDTrainer, dict]:
    """Distil each case by a teacher that every rank has, and by one that is shared out."""
    held, block = {}, cache._BLOCK
    cache._BLOCK = 6  # three blocks: one rank has two, the other one
    for case, changes in SHARDED.items():
        held[case] = {}
        for name in ("whole", "sharded"):
            settings = {**common(output_dir), "save_strategy": "no", "eval_strategy": "no", "paraphraser_epochs": 1}
            given = {"train_dataset": make_images(16), **changes}
            of_args = {n: given.pop(n) for n in [*given] if hasattr(IEKDTrainingArguments, n)}
            # Nothing is folded in what is shared out; a ViT has nothing to fold.
            whole = {"fast_teacher": "teacher_dtype" in of_args}
            sharding = {"teacher_sharding": "fsdp"} if name == "sharded" else whole
            weights = given["teacher_model"].state_dict()
            before = {key: value.clone() for key, value in weights.items()}
            args = IEKDTrainingArguments(**settings, **of_args, **sharding)
            trainer = IEKDTrainer(model=make_resnet(seed=1), args=args, **given)
            output = trainer.train()
            assert all(torch.equal(before[key], value) for key, value in given["teacher_model"].state_dict().items())
            metrics = {k: v for k, v in output.metrics.items() if k.endswith(("loss", "share"))}
            parameters = [*trainer.teacher.teacher.parameters()]
            here = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
            held[case][name] = {
                "student_side": trainer.student_side.state_dict(),
                "metrics": metrics,
                "share": sum(p.numel() for p in here) / sum(p.numel() for p in parameters),
                "kept": sum(not hasattr(p, "to_local") for p in parameters if p.ndim),
            }
    cache._BLOCK = block
    return trainer, held


def distil_streams(output_dir: str) -> tuple[IEKDTrainer, dict]:
    """Distil almost two passes over a stream, unbroken and broken off, by each way to split it by rank."""
    accelerator, held = PartialState(cpu=True), {}
    with accelerator.main_process_first():
        files = f"{output_dir}/tars/*.tar" if not accelerator.is_main_process else make_tars(Path(output_dir, "tars"))
    for split, config in (("dispatched", {}), ("by file", {"dispatch_batches": False})):
        held[split] = {}
        for name, stop in (("unbroken", None), ("broken", 4), ("resumed", None)):
            out = f"{output_dir}/{split}/{'unbroken' if name == 'unbroken' else 'broken'}"
            settings = {**common(out), "max_steps": 5, "eval_strategy": "no", "save_steps": 1000}
            trainer = IEKDTrainer(
                model=make_resnet(seed=1),
                teacher_model=make_resnet(16, seed=2),
                args=IEKDTrainingArguments(paraphraser_max_steps=2, accelerator_config=config, **settings),
                train_dataset=read_tars(files, Path(output_dir, "cache")),
                callbacks=[StopAt(stop)],
            )
            seen = note_pixels(trainer)
            trainer.train(resume_from_checkpoint=name == "resumed")
            held[split][name] = {"seen": torch.cat(seen), "student_side": trainer.student_side.state_dict()}
    return trainer, held


def teach_each_other(output_dir: str, mutual_loss: str) -> tuple[MutualTrainer, dict]:
    models = [make_resnet(8), make_vit(seed=2)]
    if os.environ["RANK"] == "0":
        models[0].save_pretrained(f"{output_dir}/before")
    args = MutualTrainingArguments(mutual_loss=mutual_loss, **common(output_dir))
    trainer = MutualTrainer(models, args=args, **DATA)
    trainer.train()
    metrics = {name: value for name, value in trainer.evaluate().items() if name.endswith("loss")}
    logs = [logs for logs in trainer.state.log_history if "peer_1/task_loss" in logs]
    unused = trainer.accelerator.ddp_handler.find_unused_parameters
    return trainer, {
        "find_unused_parameters": unused,
        "group": trainer.group.state_dict(),
        "metrics": metrics,
        "logs": logs,
    }


def end_with_the_best(output_dir: str) -> tuple[MutualTrainer, dict]:
    """Train by each trainer to be best at the second of four steps, and load that."""
    held, falling = {}, itertools.count(0, -1)
    for kind in ("distil", "teach each other"):
        settings = {
            **common(f"{output_dir}/{kind}"),
            "load_best_model_at_end": True,
            "metric_for_best_model": "accuracy",
            "greater_is_better": True,
        }
        data = {**DATA, "compute_metrics": lambda _: {"accuracy": next(falling)}}
        if kind == "distil":
            args = IEKDTrainingArguments(method="kd", **settings)
            trainer = IEKDTrainer(model=make_resnet(seed=1), teacher_model=make_resnet(16, seed=2), args=args, **data)
        else:
            args = MutualTrainingArguments(mutual_loss="kl", **settings)
            trainer = MutualTrainer([make_resnet(8), make_vit(seed=2)], args=args, **data)
        trainer.train()
        held[kind] = {"best": trainer.state.best_model_checkpoint, "model": trainer.model.state_dict()}
    return trainer, held


def main(output_dir: str, job: str) -> None:
    # Other weights on each rank to begin with; what trains must begin with those of rank 0.
    torch.manual_seed(int(os.environ["RANK"]))
    mutual_loss = job.partition("mutual-")[2]
    if mutual_loss:
        trainer, state = teach_each_other(output_dir, mutual_loss)
    else:
        special = {"cached": distil_cached, "unlabelled": distil_unlabelled, "sharded": distil_sharded}
        special |= {"streams": distil_streams, "auto": distil_auto, "best": end_with_the_best, "gaps": distil_gaps}
        special["missing"] = distil_missing
        trainer, state = special[job](output_dir) if job in special else distil(output_dir, job)
    trainer.save_model(f"{output_dir}/saved")
    state["world_size"] = trainer.accelerator.num_processes
    state["distributed_type"] = trainer.accelerator.distributed_type.value
    torch.save(state, Path(output_dir) / f"rank_{trainer.accelerator.process_index}.pt")


if __name__ == "__main__":
    for job in sys.argv[2:]:
        os.makedirs(f"{sys.argv[1]}/{job}", exist_ok=True)
        main(f"{sys.argv[1]}/{job}", job)
