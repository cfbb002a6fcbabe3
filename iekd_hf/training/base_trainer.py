"""What all trainers share, without any algorithm: component logs, the finite-loss guard, strict loading."""

import functools
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from accelerate.utils import broadcast
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput, rotate_checkpoints
from transformers.utils import logging

from ..hub.push import HubTrainer
from ..method.objective import Objective
from ..models.adapters import is_adapted, without_adapters
from ..models.kinds import main_input_of, names_of_no_predictions
from .average import averages_among
from .checkpoints import check_training_state, load_weights, read_weights
from .checks import check_callbacks, check_engine, check_recipe
from .collate import PassBatches
from .component_log import ComponentLog
from .data_checks import check_a_batch, check_dispatched, is_dispatched, is_stream
from .labelled_mean import LabelledMean
from .labels import FillLabels, measure_labelled
from .layer_rates import layer_rates, split_by_rate
from .manifest import write_manifest
from .resume import ResumePoint, begin_run, find_resume_point, go_on_in_stream
from .saving import checkpoint_written_whole, files_written_whole, find_best, tell_failed_save
from .soft_labels import are_soft, check_labels, mix
from .task_loss import TaskLoss, nothing_of


logger = logging.get_logger(__name__)


class DistillationTrainer(HubTrainer):
    """
    Extend [`~transformers.Trainer`] with what distillation trainers share.

    - `self.components.record({...}, step)` in `compute_loss` puts each component, raw, beside `loss` in the logs;
    - a component that is NaN or infinite stops training at the next log or save, before anything is overwritten;
    - a student is reloaded by `from_pretrained`, which must find every weight;
    - engines that would wrap or shard the student alone are refused;
    - batches of [`DecodedImages`] are augmented on the device;
    - images without a label (-100, or none) take no part in the task's loss.

    Args:
        augmentation (`BatchAugmentation` or another `nn.Module`, *optional*):
            Makes the model's input of raw pixels: in training of `(pixel_values, image_ids, view)`, where the view is
            the epoch, in evaluation of `pixel_values` alone. Needed for [`DecodedImages`].
        mixing (`nn.Module`, *optional*):
            Mixes the images of a training batch and their labels (MixUp, CutMix): of `(pixel_values, labels)`, classes
            of shape `(batch_size,)`, -100 for an image without a label, it makes both, the labels as shares of shape
            `(batch_size, num_labels)`. The teacher sees the mixed images.
        *args, **kwargs:
            As in [`~transformers.Trainer`].
    """

    # Put before each name in the logs, by a trainer whose logs trackers may put into one run with another's.
    log_prefix = ""
    # Set by trainers that weigh several losses.
    # Not `objective`, which is what a hyperparameter search of Trainer maximises.
    distillation_objective: Objective | None = None
    # Our losses are means over a micro-batch, whatever keyword the student's forward accepts: Trainer must divide
    # them by the accumulation steps (https://github.com/huggingface/transformers/issues/47688).
    loss_is_scaled_for_ga = False

    def __init__(self, *args, augmentation: nn.Module | None = None, mixing: nn.Module | None = None, **kwargs):
        if augmentation is not None and not isinstance(augmentation, nn.Module):
            raise ValueError(
                f"Expected augmentation as a torch.nn.Module, got {type(augmentation).__name__}: pass a "
                "BatchAugmentation, or put the function into a module's forward."
            )
        check_callbacks(kwargs.get("callbacks"))
        super().__init__(*args, **kwargs)
        self.augmentation, self.mixing = (part and part.to(self.args.device) for part in (augmentation, mixing))
        check_recipe(self, mixing)
        self.model_accepts_loss_kwargs = False
        self.data_collator = FillLabels(self.data_collator)
        self.task_loss = TaskLoss(self)
        self._fill_labels(self.train_dataset)
        self.components = ComponentLog()
        self.run = ""  # its name, in the manifests of its checkpoints
        self._saving_folder: Path | None = None  # while a checkpoint is being written
        self._counted: nn.Module | None = None
        self.labelled_mean: LabelledMean | None = None  # while images are evaluated
        check_engine(self)

    def _fill_labels(self, dataset) -> None:
        """Let all batches have labels where those of classes are dispatched to several ranks."""
        is_shared = self.args.world_size > 1 and (is_stream(dataset) or is_dispatched(self.accelerator, dataset))
        if is_shared and self.task_loss.takes_classes:
            self.data_collator.fills_all = True

    def sample_batch(self) -> dict:
        """Return the first training example as a batch on the device, to find shapes with."""
        dataset = self.columns_in_use(self.train_dataset)
        hint = "if a transform reads or makes that column, set remove_unused_columns=False in the arguments"
        try:
            example = next(iter(dataset)) if is_stream(dataset) else dataset[0]
        except KeyError as error:
            raise ValueError(f"Expected a first training example, got no column {error}: {hint}.") from error
        if self.data_collator.is_usual and not isinstance(example, Mapping):
            raise ValueError(
                f"Expected training examples as dictionaries with pixel_values and labels, got a "
                f"{type(example).__name__}: make them in the data set's transform, or in a data_collator."
            )
        batch = self._get_collator_with_removed_columns(self.data_collator)([example])
        if (name := main_input_of(self.model)) not in batch:
            raise ValueError(f"Expected {name!r} in a training batch, got {sorted(batch)}: {hint}.")
        check_a_batch(dataset, self.args)
        check_dispatched(self.accelerator, dataset, batch)
        check_labels(self, batch)
        if are_soft(self.model, batch.get("labels")):  # the model's own loss is probed, which takes classes
            batch["labels"] = batch["labels"].argmax(dim=1)
        return self._prepare_inputs(batch)

    def place(self, model: nn.Module) -> None:
        """Put a model where it trains; with `bf16_full_eval` and its like Trainer leaves that to `train()`."""
        if model.device != self.args.device:
            self._move_model_to_device(model, self.args.device)

    def batch_columns(self) -> list[str]:
        """Return the columns that make a batch: those that the model takes, and its labels."""
        self._set_signature_columns_if_needed()
        return [*self._signature_columns, *self.label_names]

    def columns_in_use(self, dataset):
        """Leave out a data set's columns that Trainer would leave out."""
        # A stream does not know what its transform makes; of its examples the collator leaves them out.
        named = getattr(dataset, "column_names", None) is not None and hasattr(dataset, "remove_columns")
        return self._remove_unused_columns(dataset) if named else dataset

    def some_batches(self, count: int) -> Iterator[dict]:
        """Yield some training batches, the same on all ranks, without a part in the order of training."""
        dataset, batch_size = self.columns_in_use(self.train_dataset), self._train_batch_size  # that fits
        if not is_stream(dataset):
            batch_size = min(batch_size, len(dataset))
            most = min(count, len(dataset) // batch_size) * batch_size
            order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(self.args.seed))
            dataset = Subset(dataset, order[:most].tolist())
        collate = self._get_collator_with_removed_columns(self.data_collator)
        for inputs in itertools.islice(DataLoader(dataset, batch_size, collate_fn=collate), count):
            yield self._prepare_inputs(inputs)

    @property
    def view(self) -> int:
        """Return which view of the images this epoch sees: each epoch another one."""
        return int(self.state.epoch or 0)

    def _prepare_inputs(self, inputs: dict) -> dict:
        inputs = self._augmented(super()._prepare_inputs(inputs))
        if not self.task_loss.takes_labels:
            inputs.pop("labels", None)  # of data that have some, for a backbone that takes none
        is_mixed = self.mixing is not None and self.is_in_train and self.model.training
        return mix(inputs, self.mixing, self.model) if is_mixed else inputs

    def _augmented(self, inputs: dict) -> dict:
        image_ids = inputs.pop("image_ids", None)
        pixels = inputs.get("pixel_values")
        if pixels is None or pixels.dtype != torch.uint8:
            return inputs
        if self.augmentation is None:
            raise ValueError(
                "Expected an augmentation to make the model's input of raw uint8 pixels, got None: pass augmentation="
                "BatchAugmentation.from_processor(image_processor)."
            )
        drawn = (torch.as_tensor(image_ids), self.view) if self.model.training and image_ids is not None else ()
        return {**inputs, "pixel_values": self.augmentation(pixels, *drawn)}

    def _get_collator_with_removed_columns(self, data_collator, description=None):
        return PassBatches(super()._get_collator_with_removed_columns(data_collator, description))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Collect the micro-batches of a step."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.task_loss.begin_step(samples, device)
        return samples, num_items

    def _get_num_items_in_batch(self, batch_samples, device):
        # No loss of ours reads Trainer's count, in whose gather a rank without a label would take no part.
        return None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the task's loss, over the images that have a label."""
        labels = self.task_loss.take_labels(inputs)
        outputs = model(**inputs)
        if self.model.training and not self.task_loss.has_goal(self.model, outputs, {"labels": labels.given}):
            self.task_loss.refuse_no_goal(self.model, outputs)
        loss = self.task_loss.weigh({"loss": self.task_loss(self.model, outputs, labels)}, inputs)["loss"]
        return (loss, outputs) if return_outputs else loss

    def prepare_to_train(self, module: nn.Module, example: dict) -> nn.Module:
        """Prepare a module whose forward returns the output, F_inh and F_exp first, through Accelerate."""
        # DDP searches each step's graph for unused parameters only if an example's backward pass has some; with a
        # `compute_loss_func`, whose graph is not known, Trainer's own choice stays.
        undecided = self.args.ddp_find_unused_parameters is None and not self.args.gradient_checkpointing
        if self.args.world_size > 1 and undecided and self.compute_loss_func is None:
            was_training = module.training
            module.eval()
            outputs, F_inh, F_exp, *_ = module(**example)
            goal = nothing_of(outputs) if outputs.get("loss") is None else outputs["loss"]
            objective = goal + sum(factor.sum() for factor in (*F_inh, *F_exp))
            trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
            gradients = torch.autograd.grad(objective, trained, allow_unused=True)
            module.train(was_training)
            self.accelerator.ddp_handler.find_unused_parameters = any(gradient is None for gradient in gradients)
        return self.accelerator.prepare_model(module)

    def give_forward_back(self, prepared: nn.Module) -> None:
        """Take accelerate's autocast from around a module's forward, so that the next training prepares it again."""
        module = self.accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        # Accelerate leaves its mark on it, and would take it for prepared.
        vars(module).pop("_is_accelerate_prepared", None)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None = None) -> tuple:
        """Choose the optimizer as Trainer does; SGD updates all parameters in one kernel."""
        optimizer_cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return optimizer_cls, {"fused": True, **kwargs} if optimizer_cls is torch.optim.SGD else kwargs

    def create_optimizer(self, model=None):
        """Make the optimizer as Trainer does, with learning rates by layer if there is a `layer_decay`."""
        decay = getattr(self.args, "layer_decay", None)
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if decay is not None and is_new:
            split_by_rate(optimizer, layer_rates(without_adapters(self.model), decay))
        return optimizer

    def floating_point_ops(self, inputs: dict) -> int:
        """Estimate a step's operations as Trainer does, but count the parameters once."""
        if self._counted is not self.model:
            count = getattr(self.model, "num_parameters", None)
            self._counted, self._num_parameters = self.model, count(exclude_embeddings=True) if count else 0
        pixels = inputs.get(main_input_of(self.model))
        return 0 if pixels is None else 6 * pixels.numel() * self._num_parameters

    def _get_grad_norm(self, model, grad_norm=None):
        # Trainer computes the norm for the logs at every step, even without clipping.
        return None if grad_norm is None else super()._get_grad_norm(model, grad_norm)

    @property
    def progress(self) -> float:
        """Return the share of the training steps that are done."""
        return self.state.global_step / self.state.max_steps if self.state.max_steps else 0.0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the training loss together with the components' means and the current weights."""
        if "loss" in logs:
            weights = self.distillation_objective.weights_at(self.progress) if self.distillation_objective else {}
            logs |= {**self.check_finite(), **weights}
            self.components.reset()
        # Trainer adds the epoch to what it is given, which are the metrics that `train` and `evaluate` return.
        super().log({self.log_prefix + n: v for n, v in logs.items()} if self.log_prefix else logs, start_time)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Predict with the bare model, of whose output only predictions are kept."""
        if ignore_keys is None:
            ignore_keys = names_of_no_predictions(self.model)
        given, inputs = inputs, inputs if self.labelled_mean is None else self.labelled_mean.fill(inputs)
        with self.accelerator.autocast():  # where the bare model was not prepared by accelerate
            loss, *predicted = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self.labelled_mean is not None:
            self.labelled_mean.record(loss, inputs.get("labels"), were_filled=inputs is not given)
        return loss, *predicted

    def check_finite(self) -> dict[str, float]:
        """Return the components' means since the last log; raise `FloatingPointError` where one was not finite."""
        means, bad = self.components.means(self.accelerator)
        if bad:
            step = min(bad.values())
            names = ", ".join(name for name in bad if bad[name] == step)
            last = sorted(Path(self.args.output_dir).glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
            raise FloatingPointError(
                f"Expected finite losses, got NaN or infinity in {names} at step {step}. Training stops here; "
                + (f"the last checkpoint, {last[-1].name}, is kept. " if last else "no checkpoint had been written. ")
                + "Lower learning_rate or the weight of that loss, use bf16 instead of fp16, or look for corrupt "
                "inputs."
            )
        return means

    # ---- Checkpoints, whole or not there ----

    def train(
        self,
        resume_from_checkpoint: str | bool | ResumePoint | None = None,
        trial=None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        Train as Trainer does, or go on from a whole checkpoint.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                `True` takes the newest whole checkpoint of the last run in `output_dir`; or a checkpoint's folder.
                What [`find_resume_point`] has found is taken as it is.
            trial, ignore_keys_for_eval (*optional*):
                As in Trainer.

        Returns:
            [`~transformers.trainer_utils.TrainOutput`]

        Raises:
            `ValueError`: no checkpoint to go on from, or a damaged one.
        """
        point = find_resume_point(self.args.output_dir, resume_from_checkpoint)
        if point is None and resume_from_checkpoint:
            raise ValueError(
                f"Expected a checkpoint to resume from in output_dir={str(Path(self.args.output_dir))!r}, got none: "
                "train without resume_from_checkpoint, or name the run's output_dir, which all machines must see."
            )
        if point and point.checkpoint:
            self.check_checkpoint(point.checkpoint)
        if self.args.should_save:
            self.run = begin_run(self.args.output_dir, point)
        self.task_loss.count_labelled()  # of data that may have been put in place since
        self.before_training(point, trial)
        return super().train(point.checkpoint if point else None, trial, ignore_keys_for_eval)

    def check_checkpoint(self, folder: str) -> None:
        """Refuse a checkpoint of another trainer or model, before anything is loaded or trained."""
        check_training_state(folder, self.args)
        self.check_weights(folder)

    def check_weights(self, folder: str) -> None:
        """Refuse weights of another model."""
        if isinstance(self.model, PreTrainedModel) and not is_adapted(self.model):
            read_weights(self.model, folder)

    def before_training(self, point: ResumePoint | None, trial) -> None:
        """Prepare what a training needs, where the run begins or goes on."""

    def _run_epoch(self, *args, **kwargs):
        # Trainer takes a step beyond max_steps where the checkpoint that it resumes is the last one.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        elif (kwargs := go_on_in_stream(self.args, kwargs)) is not None:
            super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._saving_folder is None else str(self._saving_folder)

    def _save_checkpoint(self, model, trial):
        # Trainer writes checkpoints file by file in their place; here they are written beside it and moved.
        self.check_finite()
        run_dir = Path(self._get_output_dir(trial))
        checkpoint = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            with checkpoint_written_whole(checkpoint, self.args, self.accelerator, self.state, run=self.run) as folder:
                self._saving_folder = folder
                find_best(self.state, run_dir)
                super()._save_checkpoint(model, trial)
                for average in averages_among(self.callback_handler.callbacks) if self.args.should_save else ():
                    average.save(folder / checkpoint.name)
        except (OSError, RuntimeError, SafetensorError) as error:
            tell_failed_save(checkpoint, error, self.args.world_size)
            return
        finally:
            self._saving_folder = None
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))
        if self.args.should_save:
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            rotate_checkpoints(str(run_dir), limit, best, use_mtime=True)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if self._saving_folder is not None or not self.args.should_save:  # every rank comes here, one writes
            super()._save(str(folder), state_dict)
            return
        with files_written_whole(folder) as part:
            super()._save(str(part), state_dict)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self._saving_folder is None:  # what is pushed is a checkpoint in its place
            super()._push_from_checkpoint(checkpoint_folder)

    def complete_checkpoint(self, folder: str) -> None:
        """List what has been added to the copy of a checkpoint that is pushed."""
        write_manifest(folder, run=self.run)

    def sync_buffers(self, module: nn.Module) -> None:
        """Give every rank the buffers of rank 0."""
        # DDP sends rank 0's BatchNorm statistics before each forward; after the last one the ranks differ again, and
        # each would evaluate another model than the one that rank 0 saves.
        if self.args.world_size > 1:
            for buffer in module.buffers():
                buffer.copy_(broadcast(buffer.clone(), from_process=0))

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Evaluate as Trainer does, but by the images that have a label."""
        self.sync_buffers(self.model)
        self._fill_labels(dataloader.dataset)
        self.labelled_mean = LabelledMean(self, dataloader.dataset)
        compute_metrics = self.compute_metrics
        if compute_metrics is not None and not self.task_loss.is_regression:
            self.compute_metrics = functools.partial(measure_labelled, compute_metrics)
        try:
            output = super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            return self.labelled_mean.complete(output, metric_key_prefix)
        finally:
            self.compute_metrics, self.labelled_mean = compute_metrics, None

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        for average in averages_among(self.callback_handler.callbacks):
            average.load(resume_from_checkpoint)
        if isinstance(self.model, PreTrainedModel) or is_adapted(self.model):
            load_weights(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if isinstance(self.model, PreTrainedModel) or is_adapted(self.model):
            logger.info(f"Loading best model from {self.state.best_model_checkpoint} ({self.state.best_metric}).")
            load_weights(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()
