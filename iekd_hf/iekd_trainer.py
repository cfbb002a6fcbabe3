"""IE-KD: a student that inherits from a frozen teacher with one half and explores with the other (CVPR 2021)."""

import torch
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel, set_seed
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from .arguments import IEKDTrainingArguments
from .features.tap import FeatureTap, pair_layers
from .hub.card_facts import Network
from .method.factors import Paraphraser
from .method.losses import kd_loss
from .method.objective import factor_losses, weighted_sum
from .models.loading import find_processor, load_if_named
from .student_trainer import StudentTrainer
from .teacher.cache import TeacherCache, check_cacheable
from .teacher.frozen import FrozenTeacher, fingerprint
from .teacher.pixels import TeacherPixels
from .training.checks import check_logits, check_student
from .training.gradient_shares import measure_gradient_shares
from .training.paraphraser_stage import ParaphraserStage


logger = logging.get_logger(__name__)


class IEKDTrainer(StudentTrainer):
    r"""
    Distil a vision model by inheritance and exploration (Huang et al., CVPR 2021, arXiv 2107.00181).

    `train()` runs the whole method. Stage 1 trains the paraphraser on the frozen teacher's feature maps, unless one is
    given. Stage 2 trains the student and its factor encoders with

    \(L = L_{goal} + \lambda_{inh} L_{inh} + \lambda_{exp} L_{exp} + \lambda_{kd} L_{kd}\)

    where \(L_{goal}\) is the student's own loss. Evaluation, prediction and what is saved are the plain student's.

    Args:
        model (`PreTrainedModel` or `str`, *optional*):
            The student: a model that returns a loss, or a Hub id or folder. Omit it for `model_init`.
        teacher_model (`nn.Module` or `str`):
            The teacher, which is never changed: a model, or a Hub id or folder. One that is not of Transformers takes
            the pixels first, needs `teacher_layers`, and, for `lambda_kd`, returns its logits. It need not do the
            student's task: a classifier may teach a detector's backbone.
        args (`IEKDTrainingArguments`):
            The arguments.
        train_dataset, eval_dataset, processing_class, data_collator, compute_metrics, callbacks, ...:
            As in [`~transformers.Trainer`]; `compute_metrics` sees the student's logits.
        paraphraser (`Paraphraser`, `list[Paraphraser]` or `str`, *optional*):
            A trained paraphraser (one for each pair of layers), or a Hub id or folder: stage 1 is left out.
        augmentation (`BatchAugmentation`, *optional*):
            Makes the student's input of the raw pixels of [`DecodedImages`], on the device.
        teacher_processor (`BaseImageProcessor`, *optional*):
            The teacher's image processor, where it differs from `processing_class`: the batch is renormalised and
            resized for the teacher on the device, a `pixel_mask` along with it. Read from the Hub id or folder if the
            teacher is given as one.
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
        teacher_processor: BaseImageProcessor | None = None,
        model_init_kwargs: dict | None = None,
        teacher_model_init_kwargs: dict | None = None,
        **kwargs,
    ):
        if not isinstance(args, IEKDTrainingArguments):
            raise ValueError(f"Expected args to be IEKDTrainingArguments, got {type(args).__name__}: pass args=...")
        if teacher_model is None:
            raise ValueError("Expected a teacher_model, got None: pass a model, a Hub id or a folder.")
        name = teacher_model
        teacher_model = load_if_named(teacher_model, "teacher_model", teacher_model_init_kwargs, dtype="auto")
        if isinstance(name, str):
            teacher_processor = teacher_processor or find_processor(name, **(teacher_model_init_kwargs or {}))
        model = load_if_named(model, "model", model_init_kwargs, dtype="float32")
        FeatureTap(teacher_model, args.teacher_layers)  # a layer that does not exist is told of first
        if model is not None:
            check_student(model, teacher_model, args, kwargs)
        super().__init__(model=model, args=args, **kwargs)
        if model is None:
            check_student(self.model, teacher_model, args, kwargs)

        self.student_layers, teacher_layers = pair_layers(
            self.model, teacher_model, args.student_layers, args.teacher_layers
        )
        teacher_tap = FeatureTap(teacher_model, teacher_layers, args.knowledge == "preactivation")
        teacher_pixels = TeacherPixels.between(self.processing_class, teacher_processor)
        self.teacher = FrozenTeacher(teacher_model, teacher_tap, teacher_pixels).to(args.device)
        self.teacher_row = Network.of("teacher", teacher_model)  # as given, before it is made faster
        self.cache: TeacherCache | None = None
        if self.train_dataset is not None:
            if args.cache_teacher:
                check_cacheable(self.train_dataset, self.augmentation)
            self._sample = self.sample_batch()
            logits, teacher_channels = self.teacher.probe(self._sample, with_logits=args.lambda_kd > 0)
            if args.lambda_kd > 0:
                check_logits(self.model, teacher_model, logits)
            if args.fast_teacher:
                dtype = args.teacher_dtype and getattr(torch, args.teacher_dtype)
                self.teacher.speed_up(self._sample, dtype, args.compile_teacher, with_logits=args.lambda_kd > 0)
            self.stage_1 = ParaphraserStage(self, teacher_channels, paraphraser)
            self._build_student_side()

    _weight_names = ("lambda_inh", "lambda_exp", "lambda_kd")

    @property
    def student(self) -> PreTrainedModel:
        """Return the bare student."""
        return self.model

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
        F_T, teacher_logits = inputs.pop("teacher_targets", None) or self._run_teacher(inputs)
        labels = self.take_labels(inputs)
        outputs, F_inh, F_exp = model(**inputs)

        components = self._losses(outputs, F_inh, F_exp, labels, F_T, teacher_logits, inputs.get("pixel_mask"))
        self.components.record(components, self.state.global_step + 1)
        loss = weighted_sum(components, self.loss_weights())
        return (loss, outputs) if return_outputs else loss

    def _losses(self, outputs, F_inh, F_exp, labels, F_T, teacher_logits, pixel_mask) -> dict[str, torch.Tensor]:
        losses = {"task_loss": self.task_loss(self.model, outputs, labels)}
        by_direction = self.args.knowledge != "preactivation"
        losses |= factor_losses(F_inh, F_exp, F_T, self.args, by_direction, pixel_mask)
        if self.args.lambda_kd > 0:
            losses["kd_loss"] = kd_loss(outputs["logits"], teacher_logits, self.args.temperature)
        return losses

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
        self._hp_search_setup(trial)  # a search's values must be in the arguments before stage 1 reads them
        self.teacher.tap.attach()
        try:
            resume_from_checkpoint, metrics = self.stage_1.run(resume_from_checkpoint)
            # Once: they are frozen from here on.
            self._fingerprint = fingerprint(self.teacher.paraphrasers)
            if self.args.cache_teacher and self.weights_in_use():
                self.cache = TeacherCache(
                    self.teacher, self.train_dataset, self.augmentation, self.args, self.accelerator
                )
            shares = {} if resume_from_checkpoint or self.model_init else measure_gradient_shares(self)
            # Stage 2 draws the same numbers whether stage 1 has run, was resumed, or was left out.
            set_seed(self.args.seed)
            self.components.reset()
            output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
            self.check_finite()
            self.sync_buffers(self.student_side)
        finally:
            self.cache = None
            self.teacher.tap.detach()
            self.student_side.tap.detach()
            # Give the student's side its own forward back, without accelerate's autocast around it.
            self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)
            self.model_wrapped = self.model
        output.metrics.update({f"paraphraser_{name}": value for name, value in metrics.items()})
        output.metrics.update(shares)
        return output

    def maps_and_losses(self, inputs: dict) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """Return the student's maps of a batch and the losses on them, by one pass of the bare student's side."""
        F_T, teacher_logits = inputs.pop("teacher_targets", None) or self._run_teacher(inputs)
        labels = self.take_labels(inputs)
        with self.accelerator.autocast():
            outputs, feature_maps = self.student_side.tap.run(inputs)
            F_inh, F_exp = self.student_side.factors(feature_maps)
        return feature_maps, self._losses(outputs, F_inh, F_exp, labels, F_T, teacher_logits, inputs.get("pixel_mask"))

    # ---- The teacher's side ----

    def _run_teacher(self, inputs: dict) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        with self.accelerator.autocast():
            return self.teacher(inputs, with_logits=self.args.lambda_kd > 0)

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
