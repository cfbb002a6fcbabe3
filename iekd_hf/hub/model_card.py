"""Write the model card: metadata that the Hub indexes, and how the model was trained."""

import contextlib
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import transformers.modelcard
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import Trainer, TrainingArguments
from transformers.modelcard import TrainingSummary

from ..method.objective import is_on
from ..models.adapters import is_adapted, without_adapters
from .card_facts import CardFacts, Network, curve, hub_id, link, plain, recipe


_TASKS = {  # those that TrainingSummary does not know
    "ForImageClassification": "image-classification",
    "ForObjectDetection": "object-detection",
    "ForSemanticSegmentation": "image-segmentation",
    "ForUniversalSegmentation": "image-segmentation",
    "ForInstanceSegmentation": "image-segmentation",
    "ForDepthEstimation": "depth-estimation",
    "Model": "image-feature-extraction",
}
_KNOWLEDGE = {
    "factors": ("factors", "[Kim et al., 2018](https://arxiv.org/abs/1802.04977)"),
    "attention": ("attention", "[Zagoruyko and Komodakis, 2017](https://arxiv.org/abs/1612.03928)"),
    "preactivation": ("responses", "[Heo et al., 2019](https://arxiv.org/abs/1904.01866)"),
}
_NOUNS = {
    "image-classification": "an image classifier",
    "object-detection": "an object detector",
    "image-segmentation": "an image segmentation model",
    "depth-estimation": "a depth estimator",
    "image-feature-extraction": "a backbone, which gives features of images,",
}
# Where the logit term of each `kd_distance` is from.
_LOGIT_SOURCES = {
    "kl": "[Hinton et al., 2015](https://arxiv.org/abs/1503.02531)",
    "dkd": "[DKD, Zhao et al., 2022](https://arxiv.org/abs/2203.08679)",
    "dist": "[DIST, Huang et al., 2022](https://arxiv.org/abs/2205.10536)",
    "standardized": "[standardized logits, Sun et al., 2024](https://arxiv.org/abs/2403.01643)",
}


def distilled(args: TrainingArguments, teacher: Network, labels: str) -> str:
    """Describe for the card how the student was trained, with which labels."""
    inherits, explores = is_on(args.lambda_inh) and args.inheritance_ratio > 0, is_on(args.lambda_exp)
    if not (inherits or explores or is_on(args.lambda_kd)):
        return f"It was trained on {labels} alone, to compare others with."
    what, source = _KNOWLEDGE[args.knowledge]
    ways = []
    if inherits and explores and args.inheritance_ratio < 1:
        ways.append(
            f"One part of its features imitates the teacher's {what} ({source}), the other is pushed to find what "
            "the teacher does not look at (inheritance and exploration, [Huang et al., CVPR 2021]"
            "(https://arxiv.org/abs/2107.00181))."
        )
    elif inherits:
        ways.append(f"Its features imitate the teacher's {what} ({source}).")
    elif explores:
        ways.append("Its features are pushed to find what the teacher does not look at.")
    if is_on(args.lambda_kd):
        ways.append(f"Its answers imitate the teacher's ({_LOGIT_SOURCES[args.kd_distance]}).")
    return " ".join(
        [
            "It was trained by *knowledge distillation*: "
            + ("without any label" if labels == "no labels" else f"besides {labels}")
            + ", it learnt from a network that had been trained before, its *teacher* "
            f"({teacher.name}, {teacher.parameters:,} parameters).",
            *ways,
            "The teacher served in training only and is not in this repository.",
        ]
    )


def taught_each_other(args: TrainingArguments, count: int) -> str:
    """Describe for the card how the peers were trained."""
    ways = {
        "ie": "part of the features of each imitates the others', the rest is pushed to find what they do not look at "
        "(IE-DML, [Huang et al., CVPR 2021](https://arxiv.org/abs/2107.00181))",
        "kl": "the answers of each imitate the others' (DML, [Zhang et al., CVPR 2018]"
        "(https://arxiv.org/abs/1706.00384))",
    }
    return (
        f"The {count} networks of this repository were trained together and taught each other (*mutual learning*): "
        f"besides the labels of their images, {', and '.join(ways[name] for name in args.mutual_loss.split('+'))}. "
        "Each works without the others."
    )


def write_card(
    trainer: Trainer,
    summary: TrainingSummary,
    facts: CardFacts,
    how_to_load: str | None = None,
    picture: str | None = None,
) -> None:
    """Write a trainer's model card into its `output_dir`."""
    model, networks = without_adapters(trainer.model), facts.networks
    own = [network for network in networks if network.in_repository]
    adapted = is_adapted(trainer.model)
    task = next(iter(_listed(summary.tasks)), None)
    task = task or next((tag for end, tag in _TASKS.items() if type(model).__name__.endswith(end)), None)
    ids = [tag for tag in _listed(summary.dataset_tags) if hub_id(tag)]
    named = [name for name in _listed(summary.dataset) if not os.path.exists(name) and not os.path.isabs(name)] or ids
    images = " and ".join(link(name, "datasets/") if name in ids else plain(name) for name in named)
    metric_names = list(dict.fromkeys(name for network in networks for name in network.metrics))
    bases = list(dict.fromkeys(network.source for network in own if network.source))
    results = [
        EvalResult(
            task_type=task,
            dataset_type=ids[0] if ids else "custom",
            dataset_name=" ".join(named[0].split()) if named else "not on the Hub",
            dataset_config=next((" ".join(name.split()) for name in _listed(summary.dataset_args)), None),
            metric_type=" ".join(name.split()),
            metric_name=" ".join(name.split()) if len(own) == 1 else f"{' '.join(name.split())} of {network.role}",
            metric_value=value,
        )
        for network in own
        for name, value in network.metrics.items()
        if task
    ]
    data = ModelCardData(
        library_name="peft" if adapted else "transformers",
        license=summary.license,
        pipeline_tag=task,
        base_model=bases[0] if len(bases) == 1 else bases or None,
        base_model_relation=("adapter" if adapted else "finetune") if bases else None,
        teacher=next((network.source for network in networks if not network.in_repository), None),
        language=summary.language,
        datasets=ids or None,
        metrics=sorted({result.metric_type for result in results}) or None,
        tags=summary.tags,
        model_name=summary.model_name if results else None,
        eval_results=results or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=Path(__file__).with_suffix(".md"),
        comment=transformers.modelcard.AUTOGENERATED_TRAINER_COMMENT,  # trackers add their links to it
        title=plain(summary.model_name or ""),
        plain=plain,
        introduction=" ".join([*(_describe(network, task, images) for network in own), facts.how_trained]).strip(),
        networks=networks,
        metric_names=metric_names,
        images=images,
        timed=any(network.latency is not None for network in networks),
        unmeasured=any(name not in network.metrics for network in networks for name in metric_names),
        how_to_load=how_to_load or _how_to_load(trainer, task),
        brings_code=getattr(model, "_auto_class", None) is not None,
        recipe=recipe(trainer.args, facts.unused) if facts.how_trained else [],
        hyperparameters={
            name: plain(value) for name, value in (summary.hyperparameters or {}).items() if trainer.state.log_history
        },
        curve=curve(trainer.state.log_history),
        picture=picture,
        versions=_versions("iekd_hf", "transformers", "torch", "datasets"),
        cites=facts.papers,
    )
    card.save(os.path.join(trainer.args.output_dir, "README.md"))


def _listed(value) -> list[str]:
    return [value] if isinstance(value, str) else [each for each in value or [] if each]


def _describe(network: Network, task: str | None, images: str) -> str:
    """Describe a network in one sentence."""
    labels = [plain(label) for label in map(str, network.labels) if not label.startswith("LABEL_")]
    told = f" ({', '.join(labels[:10])}{', ...' if len(labels) > 10 else ''})" if labels else ""
    classes = f" for {len(network.labels)} classes{told}" if network.labels else ""
    return (
        f"{'This' if network.role in ('student', 'model') else f'`{network.role}`'} is {_NOUNS.get(task, 'a model')}"
        f"{classes} with {network.parameters:,} parameters (`{network.architecture}`)"
        f"{f', fine-tuned from {link(network.source)}' if network.source else ''}"
        f"{f', trained on {images}' if images else ''}."
    )


def _how_to_load(trainer: Trainer, task: str | None) -> str:
    """Return code that loads the model: with what the repository holds, as a pipeline."""
    name, model = trainer.hub_model_id or ".", without_adapters(trainer.model)
    if is_adapted(trainer.model):
        loader, base = type(model).__name__, hub_id(model.config._name_or_path) or "<the base model>"
        return (
            f"from peft import PeftModel\nfrom transformers import {loader}\n\n"
            f'base = {loader}.from_pretrained(\n    "{base}", num_labels={model.config.num_labels}, '
            f'ignore_mismatched_sizes=True\n)\nmodel = PeftModel.from_pretrained(base, "{name}")'
        )
    trust = ", trust_remote_code=True" if getattr(model, "_auto_class", None) is not None else ""
    if task and trainer.processing_class is not None:
        return (
            f'from transformers import pipeline\n\npredict = pipeline("{task}", model="{name}"{trust})\n'
            'predict("image.png")'
        )
    loader = f"AutoModelFor{type(model).__name__.partition('For')[2]}" if trust else type(model).__name__
    return f'from transformers import {loader}\n\nmodel = {loader}.from_pretrained("{name}"{trust})'


def _versions(*packages: str) -> dict[str, str]:
    versions = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
