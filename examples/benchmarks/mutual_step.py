"""
Time a step of MutualTrainer against the forward and backward passes that it cannot do without.

    MALLOC_TRIM_THRESHOLD_=2000000000 MALLOC_MMAP_THRESHOLD_=1000000000 OMP_NUM_THREADS=1 \
        python examples/benchmarks/mutual_step.py

Step and passes alternate in one run, each on its own copy of the networks; medians of the rounds, in milliseconds of
the process's time, or of wall time on a GPU. The last line is the median of each round's ratio; the control, the same
passes once more, says how far to trust it.
"""

import argparse
import copy
import statistics
import tempfile

import torch
from lockstep import now
from transformers import TrainerCallback, default_data_collator

from iekd_hf import CifarResNetConfig, CifarResNetForImageClassification, MutualTrainer, MutualTrainingArguments
from iekd_hf.method.losses import reconstruction_loss
from iekd_hf.method.objective import Objective, factor_losses
from iekd_hf.method.trainable import PeerGroup


class Passes:
    """Run the passes of one step in the order of the paper, without an optimizer, and time each."""

    def __init__(self, group: PeerGroup, args: MutualTrainingArguments):
        self.group, self.args = copy.deepcopy(group).train(), args
        self.objective = Objective(args, ("lambda_inh", "lambda_exp"))
        for peer in self.group.peers:
            peer.tap.attach()

    def run(self, batch: dict) -> dict[str, float]:
        """Return milliseconds by pass."""
        (first, second), (code_1, code_2) = self.group.peers, self.group.paraphrasers
        times, start = {}, now()

        def lap(name):
            nonlocal start
            times[name] = now() - start
            start = now()

        def objective(outputs, F_inh, F_exp, F_T):
            components = {"task_loss": outputs["loss"], **factor_losses(F_inh, F_exp, [F_T], self.args)}
            return self.objective(components, progress=0.0)

        def factor(paraphraser, f):
            reconstruction_loss(paraphraser(f), f).backward()
            with torch.no_grad():
                return paraphraser.encode(f)

        outputs_1, *factors_1, f_1 = first(**batch)
        lap("peer 1 forward")
        F_1 = factor(code_1, f_1)
        lap("paraphraser 1 forward, backward, encode")
        outputs_2, *factors_2, _ = second(**batch)
        objective(outputs_2, *factors_2, F_1).backward()
        lap("peer 2 forward, backward")
        with torch.no_grad():
            _, (f_2,) = second.tap.run({"pixel_values": batch["pixel_values"]}, stop_after_last=True)
        lap("peer 2 forward, without graph, to its map")
        F_2 = factor(code_2, f_2)
        lap("paraphraser 2 forward, backward, encode")
        objective(outputs_1, *factors_1, F_2).backward()
        lap("peer 1 backward")
        self.group.zero_grad()
        return times


class Watch(TrainerCallback):
    """Time Trainer's steps, and run the passes between them."""

    def __init__(self, passes: Passes, batch: dict):
        self.bare, self.batch = passes, batch
        self.steps, self.passes, self.control = [], [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = now()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(now() - self.start)
        self.passes.append(self.bare.run(self.batch))
        self.control.append(self.bare.run(self.batch))


class Data(torch.utils.data.Dataset):
    """One batch of noise, again and again."""

    def __init__(self, length: int, size: int):
        self.length = length
        self.image = torch.randn(3, size, size)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return {"pixel_values": self.image + index % 7, "labels": index % 10}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=int, nargs=2, default=[20, 20], help="Depths of two CIFAR ResNets.")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    models = [
        CifarResNetForImageClassification(CifarResNetConfig.from_depth(depth, num_labels=10))
        for depth in options.depths
    ]
    warm_up = 3
    with tempfile.TemporaryDirectory() as folder:
        args = MutualTrainingArguments(
            folder,
            max_steps=options.rounds + warm_up,
            per_device_train_batch_size=options.batch_size,
            optim="sgd",
            max_grad_norm=0.0,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        data = Data(options.batch_size * args.max_steps, options.image_size)
        trainer = MutualTrainer(models, args=args, train_dataset=data)
        examples = [data[i] for i in range(options.batch_size)]
        batch = {name: value.to(args.device) for name, value in default_data_collator(examples).items()}
        watch = Watch(Passes(trainer.group, args), batch)
        trainer.add_callback(watch)
        trainer.train()
    steps, passes, control = watch.steps[warm_up:], watch.passes[warm_up:], watch.control[warm_up:]
    for name in passes[0]:
        print(f"{statistics.median(times[name] for times in passes):9.1f}  {name}")
    sums, again = [sum(times.values()) for times in passes], [sum(times.values()) for times in control]
    print(f"{statistics.median(sums):9.1f}  sum of the passes")
    print(f"{statistics.median(steps):9.1f}  step of the trainer, its four optimizer steps included")
    for name, values in (("step / passes", steps), ("control / passes", again)):
        ratios = sorted(value / total for value, total in zip(values, sums, strict=True))
        print(f"{statistics.median(ratios):9.3f}  {name} ({ratios[0]:.3f} to {ratios[-1]:.3f})")


if __name__ == "__main__":
    main()
