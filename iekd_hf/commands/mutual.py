"""
Let image classifiers teach each other while they learn: IE-DML, beside DML and beside each of them alone.

Three arguments matter:
  --peers         two or more networks, on the Hub, in folders, or cifar-resnet-<depth>
  --mutual_loss   what they learn from each other: ie (features), kl (logits), ie+kl (both)
  --dataset_name  images on the Hub; or --train_dir, a folder with one folder of images for each class

Examples:
  iekd-hf mutual         (handwritten digits that come with scikit-learn, in a minute)
  iekd-hf mutual --peers cifar-resnet-32 cifar-resnet-20 --dataset_name uoft-cs/cifar10

A recipe, a JSON or YAML file, holds arguments; those after it take precedence: iekd-hf mutual recipe.yaml
On several GPUs: accelerate launch -m iekd_hf.commands.mutual, with the same arguments
"""

import copy
import os
import re
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from iekd_hf import MutualTrainer, MutualTrainingArguments

from .arguments import ScriptArguments
from .images.few_labels import StudentDataArguments
from .images.run import LOSSES, PICTURE, ImageRun, build_model, is_shorthand
from .packages import require
from .parser import parse_arguments
from .report.results import write_results
from .report.table import Result, table
from .terminal import command


NAMES = {"ie": "IE-DML", "kl": "DML", "ie+kl": "IE-DML with KL"}


# Of 100 digits.
PEERS_EPOCHS = {"num_train_epochs": 60.0}


@dataclass
class PeerArguments:
    """Say which peers, and what to compare them with."""

    _argument_group_name = "Peers"

    peers: list[str] = field(
        default_factory=lambda: ["cifar-resnet-20", "cifar-resnet-8"],
        metadata={
            "help": "Two or more networks: Hub ids, folders or `cifar-resnet-<depth>`, which start from scratch. The "
            "first one's image processor is used."
        },
    )
    peers_from_scratch: bool = field(
        default=True,
        metadata={"help": "Take only the configurations from --peers, not their weights, where they are trained."},
    )
    alone: bool = field(default=True, metadata={"help": "Also train each peer alone, to compare with."})
    dml: bool = field(default=True, metadata={"help": "Also train the peers by DML (logits only), to compare with."})
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run the code that comes with a model on the Hub. Only for repositories you trust."},
    )


@dataclass
class ImageArguments(StudentDataArguments):
    """Choose how many of the digits the peers know."""

    labelled_samples: int | None = field(
        default=None,
        metadata={
            "help": "Train on this many images, balanced over the classes, drawn by seed. Default: 100 of the digits, "
            "otherwise all."
        },
    )

    digits_labelled = 100


@dataclass
class RunArguments(ScriptArguments, MutualTrainingArguments):
    """Add the arguments of mutual learning to those that the commands share."""

    num_train_epochs: float | None = field(
        default=None, metadata={"help": "Epochs. Default: 60 for the digits, otherwise 30."}
    )

    own_epochs = PEERS_EPOCHS


def of_peer(i: int, logs: dict) -> dict:
    """Return logs or metrics as those of a model alone: a peer's own take the names of the means."""
    means = {name: value for name, value in logs.items() if not re.search(r"peer_\d+[/_]", name)}
    own = re.compile(rf"peer_{i}[/_]")
    return means | {own.sub("", name): value for name, value in logs.items() if own.search(name)}


def results_of(
    models: list[PreTrainedModel], metrics: list[dict], how: str, seconds: float | None, log_history: list[dict]
) -> list[Result]:
    """Make the rows of peers that were trained together."""
    results = []
    for i, model in enumerate(models, start=1):
        history = [of_peer(i, logs) for logs in log_history]
        stages = {} if seconds is None else {"together": seconds}
        results.append(Result(f"peer {i}, {how}", model.num_parameters(), metrics[i - 1], stages, history))
    return results


KINDS = (PeerArguments, ImageArguments, RunArguments)


@command
def main(given: list[str]) -> None:
    """Run `iekd-hf mutual`, with the arguments of the command line by default."""
    model_args, data_args, args = parse_arguments(KINDS, __doc__, "iekd-hf mutual", given)
    require("cli", "kornia", "matplotlib", "sklearn")
    run = ImageRun(data_args, args)
    from_scratch = args.do_train and model_args.peers_from_scratch
    from_scratch = from_scratch or all(is_shorthand(name) for name in model_args.peers)
    peers = [
        build_model(
            name,
            "--peers",
            run.names,
            from_scratch or is_shorthand(name),
            model_args.trust_remote_code,
            new_head=args.do_train,
        )
        for name in model_args.peers
    ]
    run.prepare_images(model_args.peers[0], from_scratch)
    run.check(lambda args: MutualTrainer(peers, args=args, **run.common("peers")))
    results, epochs = [], args.num_train_epochs
    how = NAMES[args.mutual_loss] if args.do_train else "as given"

    with_dml = model_args.dml and args.mutual_loss != "kl"
    run.stages = len(peers) * model_args.alone + with_dml + 1
    if args.do_train and model_args.alone:
        for i, model in enumerate(copy.deepcopy(peers), start=1):
            run.announce(f"Peer {i} alone: {model_args.peers[i - 1]}", epochs, "peers")
            seconds, history = run.train_alone(model, f"peer {i} alone", epochs)
            measured = run.evaluate(model) if args.do_eval else {}
            results.append(Result(f"peer {i} alone", model.num_parameters(), measured, {"training": seconds}, history))
    if args.do_train and with_dml:

        def make_trainer(baseline_args):
            baseline_args.mutual_loss = "kl"
            return MutualTrainer(baseline, args=baseline_args, **run.common("peers"))

        baseline = copy.deepcopy(peers)  # the same start
        folders = {f"peer_{i}": model for i, model in enumerate(baseline, start=1)}
        run.announce("Peers together, DML", epochs, "peers")
        seconds, history = run.train_beside("DML", epochs, folders, make_trainer)
        measured = [run.evaluate(model) if args.do_eval else {} for model in baseline]
        results += results_of(baseline, measured, "DML", seconds, history)
    trainer = MutualTrainer(peers, args=args, **run.common("peers"))
    seconds = None
    if args.do_train:
        run.announce(f"Peers together, {how}", epochs, "peers")
        run.progress.name = how
        run.keep_settings()
        output = trainer.train(run.start)
        seconds = output.metrics["train_runtime"]
        trainer.save_model()
        trainer.save_state()
        trainer.save_metrics("train", output.metrics)
    history = list(trainer.state.log_history)
    evaluated = trainer.evaluate() if args.do_eval else {}
    if args.do_eval:
        trainer.save_metrics("eval", evaluated)
    evaluated = {name.removeprefix("eval_"): value for name, value in evaluated.items()}
    metrics = [of_peer(i, evaluated) for i in range(1, len(peers) + 1)]
    results += results_of(peers, metrics, how, seconds, history)

    if trainer.is_world_process_zero():
        settings = {"seed": args.seed, "method": args.mutual_loss, "num_train_epochs": args.num_train_epochs}
        settings |= {"labelled_samples": data_args.labelled_samples, "learning_rate": args.learning_rate}
        write_results(results, settings if args.do_train else {}, args.output_dir)
        print("\n" + table(results) + "\n")
        if args.do_train:
            from .report.curves import draw_losses, draw_peers

            picture = os.path.join(args.output_dir, PICTURE)
            draw_peers(results, picture)
            draw_losses(results[-1], os.path.join(args.output_dir, LOSSES))
            folders = " ".join(os.path.join(args.output_dir, name) for name in trainer.named_peers())
            print(f"Peers: {folders}   Picture: {picture}")
    if args.push_to_hub:
        trainer.push_to_hub(**run.for_the_card())


if __name__ == "__main__":
    main()
