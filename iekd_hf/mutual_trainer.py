"""IE-DML: networks that teach each other by inheritance and exploration (CVPR 2021)."""

import warnings

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput

from .arguments import PARAPHRASER_SGD, MutualTrainingArguments
from .features.layers import default_layers
from .features.tap import FeatureTap
from .hub.card_facts import CardFacts
from .hub.model_card import taught_each_other
from .method.losses import reconstruction_loss
from .method.objective import Objective, factor_losses
from .method.padding import mask_at
from .method.trainable import PeerGroup, drawn_from, frozen_statistics
from .models.loading import load_if_named
from .teacher.frozen import TeacherTargets
from .training.checkpoints import check_made_by, load_encoders, read_encoders, save_encoders
from .training.checks import check_own_loss, check_precision, check_trainable
from .training.data_checks import check_batches_of_one
from .training.dense import probe_with_labels
from .training.partwise_optimizer import PartwiseOptimizer
from .training.peer_checks import check_models, check_no_average
from .training.peers_trainer import PeersTrainer
from .training.resume import ResumePoint


# What acts in training by each term of `mutual_loss` alone.
_ARGUMENTS_OF = {
    "ie": {
        *("lambda_inh", "lambda_exp", "inheritance_distance", "exploration_distance", "loss_reduction", "peer_layers"),
        *("inheritance_ratio", "split_mode", "split_seed", "factor_channels", "encoder_kernel_size"),
        *("paraphraser_learning_rate", "paraphraser_decoder", "reconstruction_distance"),
    },
    "kl": {"lambda_kl", "temperature"},
}


class MutualTrainer(PeersTrainer):
    r"""
    Train two or more networks that teach each other: IE-DML (Huang et al., CVPR 2021, arXiv 2107.00181), or DML (Zhang
    et al., CVPR 2018, arXiv 1706.00384).

    IE-DML is two processes of inheritance and exploration in opposite directions. Each peer has a paraphraser, which
    trains along, a channel split, and two factor encoders. One step makes four updates, each by the gradients of its
    own loss alone:

    1. the paraphraser of peer 1, by its reconstruction of peer 1's feature map;
    2. peer 2 and its encoders, by \(L_{goal} + \lambda_{inh} L_{inh} + \lambda_{exp} L_{exp}\) towards the factor of
       peer 1;
    3. the paraphraser of peer 2, on the feature map of the updated peer 2;
    4. peer 1 and its encoders, towards the factor of the updated peer 2.

    That takes three forward and two backward passes of the networks, the fewest that this order allows. Peer 1 does
    not change before update 4, so it runs once, and that pass serves updates 1, 2 and 4 (its graph is kept meanwhile).
    Peer 2 runs twice, because update 2 changes it and update 3 needs it as it is then; the second pass keeps no graph,
    ends after the feature map unless logits are needed, and normalises by its batch without moving BatchNorm's
    running statistics: these move once for each update of their network.

    DML (`mutual_loss="kl"`) makes updates 2 and 4 only, towards the other peer's logits.

    More than two peers learn from the mean of the losses towards all others, each pair with its own encoders. Peers
    are updated in the order 2, 3, ..., 1, from the others as they are by then; a paraphraser is updated once a step,
    just before its peer first teaches. N peers take 2N - 1 forward and N backward passes.

    `loss` in the logs is the mean of the peers' objectives, `grad_norm` is peer 1's.

    Args:
        models (`list[PreTrainedModel | str]`):
            The peers, from scratch or from anything, or Hub ids or folders; of any families. All see the same pixels.
        args (`MutualTrainingArguments`):
            The arguments.
        train_dataset, eval_dataset, processing_class, data_collator, compute_metrics, callbacks, ...:
            As in [`~transformers.Trainer`]. `compute_metrics` is called for each peer; `eval_peer_1_<metric>`,
            `eval_peer_2_<metric>`, ... and their mean `eval_<metric>` can each be `metric_for_best_model`.
            `predict` returns a tuple of predictions, one of each peer.

    Raises:
        `ValueError`: arguments that do not fit each other, said before any training starts.

    Example:

    ```python
    >>> import torch
    >>> from transformers import ResNetConfig, ResNetForImageClassification
    >>> from iekd_hf import MutualTrainer, MutualTrainingArguments
    >>> def resnet(width):
    ...     config = ResNetConfig(embedding_size=8, hidden_sizes=[8, width], depths=[1, 1], layer_type="basic")
    ...     return ResNetForImageClassification(config)
    >>> images = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 2} for i in range(8)]
    >>> trainer = MutualTrainer(
    ...     models=[resnet(width=16), resnet(width=32)],
    ...     args=MutualTrainingArguments("out", max_steps=2, report_to="none", disable_tqdm=True),
    ...     train_dataset=images,
    ...     eval_dataset=images,
    ... )
    >>> result = trainer.train()  # doctest: +ELLIPSIS
    {...}
    >>> sorted(name for name in trainer.evaluate() if name.endswith("loss"))  # doctest: +ELLIPSIS
    {...}
    ['eval_loss', 'eval_peer_1_loss', 'eval_peer_2_loss']

    ```
    """

    _tag_names = ("iekd", "knowledge-distillation", "deep-mutual-learning")

    def __init__(self, models: list[PreTrainedModel | str], args: MutualTrainingArguments | None = None, **kwargs):
        if not isinstance(args, MutualTrainingArguments):
            raise ValueError(f"Expected args to be MutualTrainingArguments, got {type(args).__name__}: pass args=...")
        self.with_logits = "kl" in args.mutual_loss
        names = {"ie": ("lambda_inh", "lambda_exp"), "kl": ("lambda_kl",)}
        lambdas = tuple(name for term in args.mutual_loss.split("+") for name in names[term])
        if not isinstance(models, (list, tuple)):
            raise ValueError(f"Expected models as a list, got {type(models).__name__}: pass models=[first, second].")
        models = [load_if_named(m, f"models[{i}]", None, dtype="float32") for i, m in enumerate(models)]
        check_own_loss(type(self), MutualTrainer, is_called=False)
        check_models(models, args, kwargs)
        self.taps = _tap(models, args)
        super().__init__(models, args=args, **kwargs)
        self.distillation_objective = Objective(args, lambdas)
        self.group: PeerGroup | None = None
        self._wrapped_peers: list[nn.Module] = []
        self._wrapped_paraphrasers: list[nn.Module] = []
        if self.train_dataset is not None:
            self._build_group()

    # ---- The method ----

    def training_step(self, model, inputs, num_items_in_batch=None):
        """
        Make one step's updates; the gradients of the last one are left to Trainer, which clips and steps as always.

        Args:
            model (`PeerGroup`):
                All that trains.
            inputs (`dict`):
                The batch.
            num_items_in_batch (*optional*):
                Not used: every loss is a mean over the batch.

        Returns:
            `torch.Tensor`: the mean of the peers' objectives.
        """
        model.train()
        self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        labels, pixel_mask = self.task_loss.take_labels(inputs), inputs.get("pixel_mask")
        order = [*range(1, len(self.models)), 0]
        losses, objectives, runs, targets = {}, [], {}, {}

        # Peers that teach before they learn run once, as they are; their graphs wait for their own updates.
        for i in order[1:]:
            runs[i] = self._wrapped_peers[i](**self.inputs_of(i, inputs))
            outputs, _, _, f = runs[i]
            # Update 1: the paraphraser, on the map that the others are about to learn from.
            self._update_paraphraser(i, f, losses, pixel_mask)
            targets[i] = self._as_target(i, f, outputs["logits"].detach() if self.with_logits else None)
        for i in order:
            # Updates 2 and 4: the peer and its encoders, towards the others as they are by now.
            outputs, F_inh, F_exp, _ = runs.pop(i, None) or self._wrapped_peers[i](**self.inputs_of(i, inputs))
            others = [targets[j] for j in range(len(self.models)) if j != i]
            own = self._losses(i, outputs, F_inh, F_exp, labels, others, inputs)
            losses |= {f"peer_{i + 1}/{name}": loss for name, loss in own.items()}
            objectives.append(self.distillation_objective(own, self.progress))
            self.accelerator.backward(objectives[-1])
            if i == order[-1]:
                break  # Trainer clips and steps
            self._step(model.peers[i])
            unlabelled = {name: x for name, x in self.inputs_of(i, inputs).items() if name not in self.label_names}
            with self.accelerator.autocast():
                f, logits = model.peers[i].teach(unlabelled, self.with_logits)
            if i == order[0]:
                # Update 3: the paraphraser, on the map of the updated peer. Others have had theirs in this step.
                self._update_paraphraser(i, f, losses, pixel_mask)
            targets[i] = self._as_target(i, f, logits)
        self.components.record(dict(sorted(losses.items())), self.state.global_step + 1)
        return torch.stack([objective.detach() for objective in objectives]).mean()

    def _losses(
        self, i: int, outputs, F_inh, F_exp, labels, others: list[TeacherTargets], inputs: dict
    ) -> dict[str, torch.Tensor]:
        """Return the losses of peer `i`, each the mean over the others."""
        losses = {"task_loss": self.task_loss(self.models[i], outputs, labels)}
        F_T = [factor for targets in others for factor in targets.factors]
        losses |= factor_losses(F_inh, F_exp, F_T, self.args, pixel_mask=inputs.get("pixel_mask"))
        if self.with_logits and self.args.lambda_kl > 0:
            logits = outputs["logits"]
            divergences = [
                self.task_loss.logit_loss(self.models[i], logits, targets.logits, labels) for targets in others
            ]
            losses["kl_loss"] = torch.stack(divergences).mean()
        return losses

    def _update_paraphraser(self, i: int, f: torch.Tensor | None, losses: dict, pixel_mask) -> None:
        """Update the paraphraser of peer `i` by its reconstruction of the map; without maps there is none."""
        if f is None:
            return
        reconstruction, mask = self._wrapped_paraphrasers[i](f), mask_at(pixel_mask, f.shape[2:])
        loss = reconstruction_loss(reconstruction, f, self.args.reconstruction_distance, mask)
        losses[f"peer_{i + 1}/reconstruction_loss"] = loss
        self.accelerator.backward(loss)
        self._step(self.group.paraphrasers[i])

    def _as_target(self, i: int, f: torch.Tensor | None, logits: torch.Tensor | None) -> TeacherTargets:
        """Return what the others learn from peer `i`: its factor and its logits."""
        if f is None:
            return TeacherTargets([], logits)
        with torch.no_grad(), self.accelerator.autocast(), frozen_statistics(self.group.paraphrasers[i]):
            return TeacherTargets([self.group.paraphrasers[i].encode(f)], logits)

    def _step(self, part: nn.Module) -> None:
        if self.args.max_grad_norm > 0:
            self.accelerator.clip_grad_norm_(part.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        part.zero_grad()

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial=None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        Train all peers.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                `True` continues from the last checkpoint in `output_dir`; or a checkpoint's folder.
            trial, ignore_keys_for_eval (*optional*):
                As in Trainer.

        Returns:
            [`~transformers.trainer_utils.TrainOutput`]
        """
        if self.group is None:
            raise ValueError("Expected a train_dataset, got None: pass one to train.")
        self.components.reset()
        try:
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            self.check_finite()
            self.sync_buffers(self.group)
        finally:
            for peer in self.group.peers:
                peer.tap.detach()
            for part in (*self._wrapped_peers, *self._wrapped_paraphrasers):
                self.give_forward_back(part)
            self._wrapped_peers, self._wrapped_paraphrasers = [], []
            self.model_wrapped = self.model
        return output

    def before_training(self, point: ResumePoint | None, trial) -> None:
        """Refuse a callback that was added since and knows one model alone."""
        check_no_average(self.callback_handler.callbacks)

    def hyperparameter_search(self, *args, **kwargs):
        """Refuse a search, which would train the same peers on and on."""
        raise ValueError(
            "Expected IEKDTrainer for a hyperparameter search, got MutualTrainer: a search makes a new model for each "
            "trial by model_init, and peers are given. Train a MutualTrainer for each setting."
        )

    # ---- What trains, and where it is in Trainer ----

    def _build_group(self) -> None:
        """Find the peers' channels, split them, and make encoders and paraphrasers."""
        args, self._sample = self.args, self.sample_batch()
        widths = []
        if self.task_loss.num_labelled and not self.task_loss.are_all_labelled:
            warnings.warn(
                f"{self.task_loss.num_labelled:,} of {len(self.train_dataset):,} images have a label. With few "
                "labels, peers that have learnt little can agree on anything, and may collapse: if you have a "
                "teacher, use IEKDTrainer.",
                UserWarning,
                stacklevel=3,
            )
        for i, tap in enumerate(self.taps):
            self.place(tap.model)
            check_precision(tap.model, self._sample)
            outputs, shapes = probe_with_labels(tap, self.inputs_of(i, self._sample))
            if not self.task_loss.has_goal(tap.model, outputs, self._sample):
                raise ValueError(
                    f"Expected labels to train models[{i}] with, got none for {type(tap.model).__name__} in a batch "
                    f"of {', '.join(self._sample)}: peers need labels. Give images their classes (not -100), use "
                    "IEKDTrainer with a teacher, or pass compute_loss_func."
                )
            check_trainable(tap, self.inputs_of(i, self._sample))
            check_batches_of_one(self.train_dataset, args, shapes)
            widths.append(shapes[0][0] if shapes else 0)
        with drawn_from(args.seed):
            self.group = PeerGroup(self.taps, widths, args).to(args.device, memory_format=args.memory_format)

    def _wrap_model(self, model, training=True, dataloader=None):
        # Trainer.model is the first peer, or the one that is being evaluated or saved; Trainer.model_wrapped, which
        # is what trains, is all of them. Each part is prepared by itself, because each is updated by itself.
        if not training:
            return super()._wrap_model(model, training, dataloader)
        for peer in self.group.peers:
            peer.tap.attach()
        self._wrapped_peers = [
            self.prepare_to_train(peer, self.inputs_of(i, self._sample)) for i, peer in enumerate(self.group.peers)
        ]
        self._wrapped_paraphrasers = [self.accelerator.prepare_model(p) for p in self.group.paraphrasers]
        return self.group

    def create_optimizer(self, model=None):
        """Make an optimizer for each peer with its encoders, and one for each paraphraser, under one roof."""
        if self.optimizer is None:
            optimizers = []
            for peer in self.group.peers:
                self.optimizer = None
                optimizers.append(super().create_optimizer(peer))
            for paraphraser in self.group.paraphrasers:
                rate = self.args.paraphraser_learning_rate
                optimizers.append(torch.optim.SGD(paraphraser.parameters(), lr=rate, **PARAPHRASER_SGD))
            self.optimizer = PartwiseOptimizer(optimizers)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Make the schedule, of an optimizer that holds one for each part."""
        made = getattr(self.optimizer, "optimizer", self.optimizer)  # of an earlier training it is in accelerate's
        if not isinstance(made, PartwiseOptimizer):
            raise ValueError(
                f"Expected an optimizer for each peer and paraphraser, got one {type(made).__name__} from "
                f"{type(self).__name__}.create_optimizer: call super().create_optimizer(), or pass "
                "optimizer_cls_and_kwargs."
            )
        return super().create_scheduler(num_training_steps, optimizer)

    # ---- Checkpoints and the model card ----

    def card_facts(self, metrics: dict, teacher_metrics: dict | None) -> CardFacts:
        """Return a row for each peer, and how they were taught."""
        rows = super().card_facts(metrics, teacher_metrics).networks
        terms = self.args.mutual_loss.split("+")
        unused = frozenset().union(*(names for term, names in _ARGUMENTS_OF.items() if term not in terms))
        return CardFacts(rows, taught_each_other(self.args, len(rows)), tuple({"ie", *terms}), unused)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save each peer in its own folder; checkpoints also get encoders, splits and paraphrasers."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None and self.args.should_save:
            save_encoders(self.group, output_dir, type(self).__name__, **self._encoders_made_for())

    def check_checkpoint(self, folder: str) -> None:
        """Refuse a checkpoint of another trainer or of other peers."""
        check_made_by(folder, type(self).__name__, **self._encoders_made_for())
        super().check_checkpoint(folder)
        read_encoders(self.group, folder)

    def load_peers(self, folder: str) -> None:
        """Restore the peers, encoders, splits and paraphrasers."""
        super().load_peers(folder)
        load_encoders(self.group, folder)

    def _encoders_made_for(self) -> dict[str, str]:
        layers = ", ".join(tap.layers[0] if tap.layers else "none" for tap in self.taps)
        peers = ", ".join(type(model).__name__ for model in self.models)
        return {"peers": peers, "mutual_loss": self.args.mutual_loss, "peer_layers": layers}


def _tap(models: list[PreTrainedModel], args: MutualTrainingArguments) -> list[FeatureTap]:
    """Say where the peers' maps are taken: each other peer makes a pair with the last one, logits make none."""
    layers = args.peer_layers or [None] * len(models)
    if "ie" not in args.mutual_loss:
        return [FeatureTap(model, []) for model in models]
    own = [layer or default_layers(model)[-1] for model, layer in zip(models, layers, strict=True)]
    return [FeatureTap(model, [layer] * (len(models) - 1)) for model, layer in zip(models, own, strict=True)]
