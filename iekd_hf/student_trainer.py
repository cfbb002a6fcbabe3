"""What makes a student with its encoders one model to Trainer, without any algorithm: wrapping, saving, the card."""

import os
from pathlib import Path

import torch

from .features.tap import FeatureTap
from .hub.card_facts import Network, numbers
from .hub.model_card import distilled
from .method.factors import ChannelSplit
from .method.trainable import StudentWithEncoders, check_trainable
from .teacher.frozen import FrozenTeacher
from .training.base_trainer import DistillationTrainer
from .training.checkpoints import ENCODERS_FOLDER, check_made_by, load_encoders, save_encoders, save_paraphrasers
from .training.paraphraser_stage import PARAPHRASER_FOLDER, ParaphraserStage


class StudentTrainer(DistillationTrainer):
    """
    Extend [`DistillationTrainer`] by a student that trains together with encoders, and a frozen teacher.

    Trainer's `model` stays the bare student, which is what is evaluated, saved, pushed and shown to callbacks; its
    `model_wrapped`, which is what trains, is the student with its encoders. A checkpoint holds both.
    """

    teacher: FrozenTeacher
    teacher_row: Network
    student_layers: list[str]
    stage_1: ParaphraserStage
    student_side: StudentWithEncoders | None = None
    _fingerprint: str | None = None  # of the paraphrasers, once they are there

    def _build_student_side(self) -> None:
        """Find the student's channels, split them, and make the encoders; a student without a loss is refused."""
        args = self.args
        tap = FeatureTap(self.model, self.student_layers, before_activation=args.knowledge == "preactivation")
        sample = {name: value for name, value in self._sample.items() if name not in self.label_names}
        outputs, widths = tap.probe(sample if self.has_own_loss else self._sample, stop_after_last=False)
        if not self.has_own_loss:
            self.task_loss(self.model, outputs, labels=None)
        splits = [ChannelSplit(width, args.inheritance_ratio, args.split_mode, args.split_seed) for width in widths]
        if args.lambda_inh > 0 or args.lambda_exp > 0:
            check_trainable(tap, sample)
        factor_channels = self.stage_1.factor_channels()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)  # the same encoders whatever was built before them
            self.student_side = StudentWithEncoders(
                self.model,
                tap,
                splits,
                factor_channels,
                inherit=args.lambda_inh > 0,
                explore=args.lambda_exp > 0,
                knowledge=args.knowledge,
            ).to(args.device, self.model.dtype, memory_format=args.memory_format)

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

    # ---- Checkpoints and the model card ----

    def card_facts(self, metrics: dict, teacher_metrics: dict | None) -> tuple[list[Network], str, tuple[str, ...]]:
        """Return the rows of teacher and student, and how the student was taught."""
        self.teacher_row.metrics = numbers(teacher_metrics or {})
        student = Network.of("student", self.model, metrics)
        return [self.teacher_row, student], distilled(self.args, self.teacher_row), ("ie",)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the plain student; a checkpoint and the run's own folder get encoders and splits beside it."""
        super().save_model(output_dir, _internal_call)
        folder = output_dir if _internal_call else None  # a checkpoint's; a push has none
        if not _internal_call and self._fingerprint and output_dir in (None, self.args.output_dir):
            folder = os.path.join(self.args.output_dir, ENCODERS_FOLDER)
        if folder is not None and self.args.should_save:
            save_encoders(self.student_side, folder, type(self).__name__, **self._encoders_made_for())

    def complete_checkpoint(self, folder: str) -> None:
        """Add the paraphrasers, which are kept in `output_dir`, to a checkpoint that is pushed."""
        if self.stage_1.kind is not None and self.teacher.paraphrasers:
            save_paraphrasers(self.teacher.paraphrasers, Path(folder) / PARAPHRASER_FOLDER)

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
