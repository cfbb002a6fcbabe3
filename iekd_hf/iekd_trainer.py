"""IE-KD: a student that inherits from a frozen teacher with one half and explores with the other (CVPR 2021)."""

from pathlib import Path

import torch
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel, ProcessorMixin, set_seed
from transformers.trainer_utils import TrainOutput

from .arguments import SHARE_OF, STAGE_1_ARGUMENTS, IEKDTrainingArguments
from .features.tap import FeatureTap, image_size_in
from .hub.card_facts import CardFacts, Network, numbers
from .hub.model_card import distilled
from .method.factors import Paraphraser
from .method.knowledge import KNOWLEDGE, Knowledge
from .method.objective import Objective, factor_losses, is_on
from .method.presets import METHODS
from .method.trainable import StudentWithEncoders, drawn_from
from .models.loading import load_if_named
from .teacher.cache import TeacherCache, check_cache_folder, check_cacheable
from .teacher.frozen import FrozenTeacher, TeacherTargets, fingerprint
from .teacher.pixels import TeacherPixels, check_teacher_processor, find_teacher_processor
from .training.base_trainer import DistillationTrainer
from .training.checkpoints import (
    ENCODERS_FOLDER,
    check_made_by,
    load_encoders,
    read_encoders,
    save_encoders,
)
from .training.checks import (
    check_factor_channels,
    check_logits,
    check_own_loss,
    check_precision,
    check_student,
    check_trainable,
)
from .training.data_checks import check_batches_of_one
from .training.dense import probe_with_labels
from .training.given_optimizer import add_what_is_missing
from .training.held_out import HeldOutLosses
from .training.manifest import written_whole
from .training.resume import PARAPHRASER_FOLDER, ResumePoint
from .training.stage_1 import get_paraphrasers, run_stage_1, save_whole
from .training.task_loss import TaskLabels
from .training.terms import check_terms
from .training.weights import begin_weights, measure_gradient_shares, set_up_search, update_weights


class IEKDTrainer(DistillationTrainer):
    r"""
    Distil a vision model by inheritance and exploration (Huang et al., CVPR 2021, arXiv 2107.00181).

    `train()` runs the whole method. Stage 1 trains the paraphraser on the frozen teacher's feature maps, unless one is
    given. Stage 2 trains the student and its factor encoders with

    \(L = L_{goal} + \lambda_{inh} L_{inh} + \lambda_{exp} L_{exp} + \lambda_{kd} L_{kd}\)

    where \(L_{goal}\) is the student's own loss. Evaluation, prediction and what is saved are the plain student's.

    Trainer's `model` is the bare student, which is evaluated, saved, pushed and shown to callbacks. Its
    `model_wrapped`, which trains, is the student with its encoders; a checkpoint holds both.

    Args:
        model (`PreTrainedModel` or `str`, *optional*):
            The student: a model that returns a loss, or a Hub id or folder. Omit it for `model_init`.
        teacher_model (`nn.Module` or `str`):
            The teacher, which is never changed: a model, or a Hub id or folder. One that is not of Transformers takes
            the pixels first and, for `lambda_kd`, returns its logits; if it is no classifier, name `teacher_layers`.
            It need not do the student's task: a classifier may teach a detector's or a segmenter's backbone.
        args (`IEKDTrainingArguments`):
            The arguments.
        train_dataset, eval_dataset, processing_class, data_collator, compute_metrics, callbacks, ...:
            As in [`~transformers.Trainer`]; `compute_metrics` sees the student's logits.
        paraphraser (`Paraphraser`, `list[Paraphraser]` or `str`, *optional*):
            A trained paraphraser (one for each pair of layers), or a Hub id or folder: stage 1 is left out.
        augmentation (`BatchAugmentation`, *optional*):
            Makes the student's input of the raw pixels of [`DecodedImages`], on the device.
        mixing (`nn.Module`, *optional*):
            Mixes the images and labels of a training batch, as in [`DistillationTrainer`].
        teacher_processor (`BaseImageProcessor` or `ProcessorMixin`, *optional*):
            The teacher's image processor, where it differs from `processing_class`, which it needs: the batch is
            renormalised and resized for the teacher on the device, a `pixel_mask` along with it. Read from the Hub id
            or folder if the teacher is given as one.
        model_init_kwargs (`dict`, *optional*), teacher_model_init_kwargs (`dict`, *optional*):
            Keyword arguments of `from_pretrained` for a model given by name: `revision`, `token`, `dtype`,
            `trust_remote_code`, ... A student is loaded in float32 unless they say otherwise. They are no part of
            `args`, which are saved and pushed.

    Raises:
        `ValueError`: arguments that do not fit each other, said before any training starts.

    Example:

    ```python
    >>> import torch
    >>> from transformers import ResNetConfig, ResNetForImageClassification
    >>> from iekd_hf import IEKDTrainer, IEKDTrainingArguments
    >>> def resnet(width):
    ...     config = ResNetConfig(embedding_size=8, hidden_sizes=[8, width], depths=[1, 1], layer_type="basic")
    ...     return ResNetForImageClassification(config)
    >>> images = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 2} for i in range(8)]
    >>> trainer = IEKDTrainer(
    ...     model=resnet(width=16),
    ...     teacher_model=resnet(width=32),
    ...     args=IEKDTrainingArguments("out", max_steps=2, paraphraser_epochs=1, report_to="none", disable_tqdm=True),
    ...     train_dataset=images,
    ...     eval_dataset=images,
    ... )
    >>> result = trainer.train()  # doctest: +ELLIPSIS
    {...}
    >>> result.global_step, type(trainer.student).__name__
    (2, 'ResNetForImageClassification')

    ```
    """

    def __init__(
        self,
        model: PreTrainedModel | str | None = None,
        teacher_model: nn.Module | str | None = None,
        args: IEKDTrainingArguments | None = None,
        paraphraser: Paraphraser | list[Paraphraser] | str | None = None,
        teacher_processor: BaseImageProcessor | ProcessorMixin | None = None,
        model_init_kwargs: dict | None = None,
        teacher_model_init_kwargs: dict | None = None,
        **kwargs,
    ):
        if not isinstance(args, IEKDTrainingArguments):
            raise ValueError(
                f"Expected args to be IEKDTrainingArguments, got {type(args).__name__}: pass args=... by name, as "
                "teacher_model comes before them."
            )
        check_own_loss(type(self), IEKDTrainer)
        if teacher_model is None:
            raise ValueError("Expected a teacher_model, got None: pass a model, a Hub id or a folder.")
        if teacher_processor is not None:
            check_teacher_processor(teacher_processor, kwargs.get("processing_class"))
        name = teacher_model
        teacher_model = load_if_named(teacher_model, "teacher_model", teacher_model_init_kwargs, dtype="auto")
        if isinstance(name, str) and teacher_processor is None:
            where = teacher_model_init_kwargs or {}
            teacher_processor = find_teacher_processor(name, kwargs.get("processing_class"), **where)
        model = load_if_named(model, "model", model_init_kwargs, dtype="float32")
        layers = None if model is None else check_student(model, teacher_model, args, kwargs)
        super().__init__(model=model, args=args, **kwargs)
        self.distillation_objective = Objective(args, tuple(SHARE_OF), METHODS[args.method])
        # `model_init` has made the student just now.
        self.student_layers, teacher_layers = layers or check_student(self.model, teacher_model, args, kwargs)

        teacher_tap = FeatureTap(teacher_model, teacher_layers, self.knowledge.before_activation)
        teacher_pixels = TeacherPixels.between(self.processing_class, teacher_processor)
        self.teacher = FrozenTeacher(teacher_model, teacher_tap, teacher_pixels).placed(args)
        self.teacher_summary = Network.of("teacher", teacher_model)  # of the given one, not of its fast copy
        self.student_side: StudentWithEncoders | None = None
        self.cache: TeacherCache | None = None
        self._held_out: HeldOutLosses | None = None  # while images are evaluated
        self.given_paraphrasers = paraphraser
        self._fingerprint: str | None = None  # of the paraphrasers, once stage 1 is over
        self._metrics_before: dict[str, float] = {}  # of stage 1, and the gradient shares
        self.stage_1_settings: tuple | None = None  # of one that has run here
        self._teacher_logits: torch.Tensor | None = None  # of the sample
        if self.train_dataset is not None:
            if args.cache_teacher:
                check_cacheable(self.train_dataset, self.augmentation)
            self._sample = self.sample_batch()
            with_logits = is_on(args.lambda_kd)
            logits, shapes = self.teacher.probe(self._sample, with_logits)
            self.teacher_channels = [shape[0] for shape in shapes]
            if with_logits:
                check_logits(self.model, teacher_model, logits)
                self._teacher_logits = logits
            if args.fast_teacher and not self.teacher.sharded:
                dtype = args.teacher_dtype and getattr(torch, args.teacher_dtype)
                self.teacher.use_fast_copy(
                    self._sample, dtype, args.compile_teacher, with_logits=is_on(args.lambda_kd)
                )
            if paraphraser is not None:
                self.teacher.set_paraphrasers(get_paraphrasers(paraphraser, self.teacher_channels, args))
            if args.cache_teacher:
                cells = sum(k * shape[1:].numel() for k, shape in zip(self.factor_channels(), shapes, strict=True))
                image_bytes = 2 * (cells + (logits.shape[1:].numel() if logits is not None else 0))
                check_cache_folder(args, len(self.train_dataset), image_bytes)
            self._build_student_side()
            if self.student_side.inheritance_encoders or self.student_side.exploration_encoders:
                check_batches_of_one(self.train_dataset, args, [*shapes, *self.student_shapes])
            if self.optimizer is not None:  # one that was given, which knows the student alone
                add_what_is_missing(self.optimizer, self.lr_scheduler, self.student_side)

    @property
    def student(self) -> PreTrainedModel:
        """Return the bare student."""
        return self.model

    @property
    def knowledge(self) -> Knowledge:
        """Return what is compared between the maps of a pair of layers."""
        return KNOWLEDGE[self.args.knowledge]

    # ---- The method ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        r"""
        Return \(L_{goal} + \lambda_{inh} L_{inh} + \lambda_{exp} L_{exp} + \lambda_{kd} L_{kd}\); in evaluation
        \(L_{goal}\).

        Args:
            model (`nn.Module`):
                The student's side as it is wrapped for training, or the bare student in evaluation.
            inputs (`dict`):
                The batch.
            return_outputs (`bool`, *optional*, defaults to `False`):
                Whether to return the student's output with the loss.
            num_items_in_batch (*optional*):
                Not used: every loss is a mean over the micro-batch.

        Returns:
            `torch.Tensor`, or a tuple of it and the student's output.
        """
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs=return_outputs)
        targets = inputs.pop("teacher_targets", None) or self._teach(inputs)
        labels = self.task_loss.take_labels(inputs)
        outputs, F_inh, F_exp = model(**inputs)

        losses = self.task_loss.weigh(self._losses(outputs, F_inh, F_exp, labels, targets, inputs), inputs)
        self.components.record(losses, self.state.global_step + 1)
        loss = self.distillation_objective(losses, self.progress)
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, *args, **kwargs):
        """Collect the micro-batches of a step; measure now and then what weights that are "auto" must be."""
        self._metrics_before |= update_weights(self)
        return super().get_batch_samples(*args, **kwargs)

    def _losses(
        self, outputs, F_inh, F_exp, labels: TaskLabels, targets: TeacherTargets, inputs
    ) -> dict[str, torch.Tensor]:
        losses, mask = {"task_loss": self.task_loss(self.model, outputs, labels)}, inputs.get("pixel_mask")
        losses |= factor_losses(F_inh, F_exp, targets.factors, self.args, self.knowledge.normalize, mask)
        if is_on(self.args.lambda_kd):
            losses["kd_loss"] = self.task_loss.logit_loss(self.model, outputs["logits"], targets.logits, labels)
        return losses

    def _teach(self, inputs: dict) -> TeacherTargets:
        with self.accelerator.autocast():
            return self.teacher(inputs, with_logits=is_on(self.args.lambda_kd))

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial=None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        Run the method: stage 1 unless a paraphraser was given, then stage 2.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                `True` continues the run in `output_dir` in the stage it was in; or a checkpoint's folder, of either
                stage.
            trial, ignore_keys_for_eval (*optional*):
                As in Trainer.

        Returns:
            [`~transformers.trainer_utils.TrainOutput`]: of stage 2, with the metrics of stage 1 as `paraphraser_*`.
        """
        if self.train_dataset is None:
            raise ValueError("Expected a train_dataset, got None: pass one to train.")
        try:
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            self.check_finite()
            self.sync_buffers(self.student_side)
        finally:
            self.cache = None
            self.teacher.detach()
            self.student_side.tap.detach()
            self.give_forward_back(self.model_wrapped)
            self.model_wrapped = self.model
        output.metrics.update(self._metrics_before)
        return output

    def before_training(self, point: ResumePoint | None, trial) -> None:
        """Run stage 1 where it is not over, fill the teacher's cache, and measure what the weights amount to."""
        set_up_search(self, trial)  # a search's values must be in the arguments before stage 1 reads them
        begin_weights(self)
        checkpoint = point.checkpoint if point else None
        self.teacher.tap.attach()
        metrics = {f"paraphraser_{name}": value for name, value in self.run_stage_1(point).items()}
        # Once: they are frozen from here on.
        self._fingerprint = fingerprint(self.teacher.paraphrasers)
        if self.args.cache_teacher and self.distillation_objective.weights():
            self.cache = TeacherCache(self.teacher, self.train_dataset, self.augmentation, self.args, self.accelerator)
        if not checkpoint and not self.model_init and not self.args.auto_find_batch_size:
            metrics |= measure_gradient_shares(self)
        self._metrics_before = metrics
        # Stage 2 draws the same numbers whether stage 1 has run, was resumed, or was left out.
        set_seed(self.args.seed)
        self.components.reset()

    # ---- Stage 1 ----

    def run_stage_1(self, point: ResumePoint | None = None) -> dict[str, float]:
        """
        Get the paraphrasers: keep given ones, reload finished ones, resume, or train them.

        Args:
            point (`ResumePoint`, *optional*):
                Where the run goes on; by default it begins.

        Returns:
            `dict[str, float]`: the metrics of this stage, if it has run.
        """
        return run_stage_1(self, point)

    def factor_channels(self) -> list[int]:
        """Return the channels of what is compared in each pair; a given paraphraser decides its own."""
        if self.given_paraphrasers is not None:
            return [paraphraser.factor_channels for paraphraser in self.teacher.paraphrasers]
        widths = [self.knowledge.width(channels, self.args.factor_channels) for channels in self.teacher_channels]
        check_factor_channels(widths, self.teacher_channels)
        return widths

    # ---- What trains, and where it is in Trainer ----

    def _build_student_side(self) -> None:
        """Find the student's channels, split them, and make the encoders; refuse a student without a loss."""
        tap = FeatureTap(self.model, self.student_layers, self.knowledge.before_activation)
        sample = {name: value for name, value in self._sample.items() if name not in self.label_names}
        self.place(self.model)
        check_precision(self.model, sample)
        outputs, self.student_shapes = probe_with_labels(tap, sample if self.task_loss.is_custom else self._sample)
        check_terms(self, outputs, self._sample, self._teacher_logits)
        if is_on(self.args.lambda_inh) or is_on(self.args.lambda_exp):
            check_trainable(tap, sample)
        with drawn_from(self.args.seed):
            widths = [shape[0] for shape in self.student_shapes]
            side = StudentWithEncoders.of(tap, widths, self.factor_channels(), self.args, self.knowledge)
        self.student_side = side.to(self.args.device, self.model.dtype, memory_format=self.args.memory_format)

    def _wrap_model(self, model, training=True, dataloader=None):
        if training:
            self.student_side.tap.attach()
            return self.prepare_to_train(self.student_side, self._sample)
        return super()._wrap_model(model, training, dataloader)

    def create_optimizer(self, model=None):
        """Make the optimizer over the student and its encoders."""
        if self.student_side.student is not self.model:  # `model_init` has made a new student
            self._build_student_side()
        return super().create_optimizer(self.student_side)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Make the schedule; an optimizer that a subclass has made gets the encoders first."""
        if type(self).create_optimizer is not IEKDTrainer.create_optimizer:
            add_what_is_missing(self.optimizer, self.lr_scheduler, self.student_side)
        return super().create_scheduler(num_training_steps, optimizer)

    def maps_and_losses(self, inputs: dict) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Return what the student's layers give for a batch, and the losses, by one pass of the bare side."""
        targets = inputs.pop("teacher_targets", None) or self._teach(inputs)
        labels = self.task_loss.take_labels(inputs)
        with self.accelerator.autocast():
            outputs, captured = self.student_side.tap.capture(inputs)
            image_size = image_size_in(inputs, self.student_side.student)
            F_inh, F_exp = self.student_side.factors(self.student_side.tap.lay_out(captured, image_size))
        return captured, self._losses(outputs, F_inh, F_exp, labels, targets, inputs)

    # ---- Evaluation ----

    def evaluation_loop(self, dataloader, description, *args, **kwargs):
        """Evaluate as Trainer does; images without labels by the losses of distillation."""
        if description != "Evaluation" or not HeldOutLosses.can_be_measured(self):
            return super().evaluation_loop(dataloader, description, *args, **kwargs)
        self._held_out = HeldOutLosses(self, dataloader.dataset)
        try:
            with self._held_out.both_sides_ready():
                output = super().evaluation_loop(dataloader, description, *args, **kwargs)
                output.metrics.update(self._held_out.metrics(kwargs["metric_key_prefix"]))
        finally:
            self._held_out = None
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Predict with the bare student; measure the losses of distillation where no image has had a label."""
        if self._held_out is not None and self._held_out.measure(inputs):
            return None, None, None
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    # ---- The teacher's cache ----

    @property
    def view(self) -> int:
        """Return which view of the images this epoch sees; of cached ones they take turns."""
        return super().view % self.args.cache_views if self.args.cache_teacher else super().view

    def _prepare_inputs(self, inputs: dict) -> dict:
        image_ids = inputs.get("image_ids")
        inputs = super()._prepare_inputs(inputs)
        if self.cache is not None and self.model.training:
            inputs["teacher_targets"] = self.cache.read(self.view, torch.as_tensor(image_ids))
        return inputs

    # ---- Checkpoints and the model card ----

    def card_facts(self, metrics: dict, teacher_metrics: dict | None) -> CardFacts:
        """Return the rows of teacher and student, and how the student was taught."""
        self.teacher_summary.metrics = numbers(teacher_metrics or {})
        student = Network.of("student", self.model, metrics)
        how_trained = distilled(self.args, self.teacher_summary, self.task_loss.in_words())
        unused = STAGE_1_ARGUMENTS if self.given_paraphrasers or not self.knowledge.is_trained else frozenset()
        return CardFacts([self.teacher_summary, student], how_trained, ("ie",), unused)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the plain student; checkpoints and `output_dir` also get encoders and splits."""
        super().save_model(output_dir, _internal_call)
        if not self.args.should_save:
            return
        made_for = {"trainer": type(self).__name__, **self._encoders_made_for()}
        if _internal_call and output_dir is not None:  # a checkpoint's; a push has none
            save_encoders(self.student_side, output_dir, **made_for)
        elif not _internal_call and self._fingerprint and output_dir in (None, self.args.output_dir):
            with written_whole(Path(self.args.output_dir) / ENCODERS_FOLDER) as folder:
                save_encoders(self.student_side, folder, **made_for)

    def complete_checkpoint(self, folder: str) -> None:
        """Add the paraphrasers, which are kept in `output_dir`, to a checkpoint that is pushed."""
        if self.knowledge.is_kept and self.teacher.paraphrasers:
            save_whole(self, Path(folder) / PARAPHRASER_FOLDER)
        super().complete_checkpoint(folder)

    def check_checkpoint(self, folder: str) -> None:
        """Refuse a checkpoint of another trainer or student."""
        check_made_by(folder, type(self).__name__)
        super().check_checkpoint(folder)
        read_encoders(self.student_side, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.student_side.student is not self.model:
            self._build_student_side()
        self._load_encoders(resume_from_checkpoint)

    def _load_best_model(self):
        super()._load_best_model()
        self._load_encoders(self.state.best_model_checkpoint)

    def _load_encoders(self, folder: str) -> None:
        check_made_by(folder, type(self).__name__, **self._encoders_made_for())
        load_encoders(self.student_side, folder)

    def _encoders_made_for(self) -> dict[str, str]:
        layers = {"student_layers": self.student_side.tap.layers, "teacher_layers": self.teacher.tap.layers}
        made_for = {name: ", ".join(of_side) for name, of_side in layers.items()}
        return {"paraphrasers": self._fingerprint, "knowledge": self.args.knowledge, **made_for}
