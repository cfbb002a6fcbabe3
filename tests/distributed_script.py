"""Run by torchrun in test_distributed.py: train on every rank, and write down what each rank holds."""

import sys
from pathlib import Path

import torch
from conftest import make_images, make_resnet, make_vit

from iekd_hf import IEKDTrainer, IEKDTrainingArguments


def main(output_dir: str, student: str) -> None:
    args = IEKDTrainingArguments(
        output_dir=f"{output_dir}/out",
        max_steps=4,
        per_device_train_batch_size=4,
        paraphraser_epochs=1,
        learning_rate=0.01,
        logging_steps=2,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = IEKDTrainer(
        model=make_vit(seed=torch.initial_seed() % 7) if student == "vit" else make_resnet(8),
        teacher_model=make_resnet(16, seed=2),
        args=args,
        train_dataset=make_images(32),
        eval_dataset=make_images(16, seed=1),
    )
    output = trainer.train()
    metrics = trainer.evaluate()
    state = {
        "world_size": trainer.accelerator.num_processes,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "student_side": trainer.student_side.state_dict(),
        "paraphrasers": trainer.teacher.paraphrasers.state_dict(),
        "eval_loss": metrics["eval_loss"],
        "reconstruction_loss": output.metrics["paraphraser_reconstruction_loss"],
        "logs": [logs for logs in trainer.state.log_history if "inheritance_loss" in logs],
    }
    trainer.save_model(f"{output_dir}/saved")
    torch.save(state, Path(output_dir) / f"rank_{trainer.accelerator.process_index}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
