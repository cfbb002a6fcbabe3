"""What `distill`, `mutual` and `detect` share: resuming, networks to compare with, and the run of a distillation."""

import copy
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets
import PIL.Image
import torch
import transformers.trainer
from transformers import BaseImageProcessor, PreTrainedModel, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from iekd_hf import EMACallback, IEKDTrainer

from ..data.rgb import to_rgb
from ..training.base_trainer import DistillationTrainer
from ..training.checkpoints import load_weights
from ..training.manifest import MANIFEST_FILE, find_damage, read_manifest, write_manifest, write_whole
from ..training.resume import RUN_FILE, ResumePoint, check_ran_to_its_end, find_resume_point
from .arguments import ModelArguments
from .progress import Progress
from .report.latency import median_milliseconds
from .report.results import OF_PEERS, SETTINGS, write_results
from .report.table import Result, latencies
from .terminal import say


# The settings that a run has begun with, in its output_dir; names that begin with an underscore are never pushed.
SETTINGS_FILE = "_settings.json"
# Where the moving average of a student is saved, in its output_dir.
AVERAGE_FOLDER = "average"


def find_start(args: TrainingArguments) -> ResumePoint | None:
    """Return where a run goes on; refuse to mix a new run into an old one's checkpoints, or to continue nothing."""
    resume, folder = args.resume_from_checkpoint, args.output_dir
    if isinstance(resume, str) and resume.lower() in ("true", "false"):  # a recipe has a bool
        resume = resume.lower() == "true"
    if not args.do_train:
        if Path(folder, RUN_FILE).is_file():
            raise ValueError(
                f"Expected an output_dir that holds no run with --do_train false, got {folder!r}, whose results would "
                "be overwritten: choose another --output_dir."
            )
        return None
    if not resume:
        if os.path.isdir(folder) and get_last_checkpoint(folder):
            raise ValueError(
                f"Expected an output_dir without checkpoints, got {folder!r} with "
                f"{os.path.basename(get_last_checkpoint(folder))}: add --resume_from_checkpoint true to continue that "
                "run, or choose another --output_dir."
            )
        return None
    point = find_resume_point(folder, resume)
    beside = (Path(folder).glob(f"_*/{name}") for name in (MANIFEST_FILE, "checkpoint-*", RUN_FILE))
    if point is None and not any(map(any, beside)):
        raise ValueError(
            f"Expected the output_dir of a run that has begun, got {folder!r} without any checkpoint: leave "
            "--resume_from_checkpoint out to start it, or name that run's --output_dir."
        )
    # What was finished beside the run is taken up even where the run itself has not begun.
    return point or ResumePoint()


@dataclass
class Compared:
    """Hold a row of the table with its model, and the model's own image processor where that is another."""

    result: Result
    model: PreTrainedModel
    processor: BaseImageProcessor | None = None


class CommandRun:
    """Hold what the trainers of one command share; a subclass has the data."""

    # Trains what the result is compared with, and what distils.
    trainer_class: type[DistillationTrainer] = DistillationTrainer
    distiller_class: type[IEKDTrainer] = IEKDTrainer
    # The metric that is shown while a network trains.
    shown_metric = "accuracy"
    # The images, and the student's image processor, once they are known.
    splits: datasets.DatasetDict
    processor: BaseImageProcessor
    # Makes the trainer that distils, of the teacher, the teacher's own processor and the arguments.
    make_distiller: Callable[[PreTrainedModel, BaseImageProcessor | None, TrainingArguments], IEKDTrainer]

    def __init__(self, args: TrainingArguments):
        self.args = args
        self.progress = Progress(self.shown_metric, lines=args.disable_tqdm or None)
        # All trainers take it, that of stage 1 too, as they take Transformers' own bars in a notebook.
        args.disable_tqdm, transformers.trainer.DEFAULT_PROGRESS_CALLBACK = False, self.progress
        self.stages, self.stage = 0, 0
        self.start = find_start(args)
        # As they were given: what is chosen by the data and the networks follows from them.
        self.given = {name: getattr(args, name) for name in (*SETTINGS, *OF_PEERS) if hasattr(args, name)}
        if self.start is not None:
            self.check_settings()
        set_seed(args.seed)

    def check_settings(self) -> None:
        """Refuse to go on with other settings than the run has begun with; it may go on for longer."""
        try:
            begun = json.loads(Path(self.args.output_dir, SETTINGS_FILE).read_text())
        except FileNotFoundError:
            return
        for name, value in self.given.items():
            if name != "num_train_epochs" and begun.get(name, value) != value:
                before = f"no --{name}" if begun[name] is None else f"--{name} {begun[name]}"
                raise ValueError(
                    f"Expected {before}, as the run in {self.args.output_dir} was started, got {value}: resume with "
                    "the arguments of that run, or choose another --output_dir."
                )

    def keep_settings(self) -> None:
        """Write down what a resumed run is compared with."""
        if self.args.should_save:
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
            write_whole(Path(self.args.output_dir, SETTINGS_FILE), json.dumps(self.given))

    def announce(self, what: str, epochs: float = 0, learner: str = "teacher") -> None:
        """Write the heading of a stage."""
        self.stage += 1
        say(f"[{self.stage}/{self.stages}] {what}{f', {self.schedule(learner, epochs)}' if epochs else ''}")

    def schedule(self, learner: str, epochs: float) -> str:
        """Return for how long a network is trained, and on what."""
        steps, most = self.steps_per_epoch(learner), self.args.max_steps
        length = f"{epochs:g} epoch{'s' * (epochs != 1)}"
        if steps is not None or most > 0:
            length = f"{most if steps is None else round(steps * epochs)} steps"
        images = self.trained_on(learner) or f"{len(self.common(learner)['train_dataset']):,} images"
        return f"{length} on {images}"

    def common(self, learner: str = "teacher") -> dict:
        """Return the arguments that every trainer of this command takes, with the images that one learns from."""
        raise NotImplementedError

    def trained_on(self, learner: str) -> str:
        """Return what a network learns from, for the table."""
        return ""

    def steps_per_epoch(self, learner: str) -> int | None:
        """Return the steps of the distilled student's epochs for one that learns from fewer images, in as many."""
        own, most = (len(self.common(name)["train_dataset"]) for name in (learner, "distilled student"))
        if learner != "plain student" or own == most or self.args.max_steps > 0:
            return None
        batches = most / (self.args.train_batch_size * self.args.world_size)
        batches = int(batches) if self.args.dataloader_drop_last else math.ceil(batches)
        return max(batches // self.args.gradient_accumulation_steps, 1)

    def evaluate(self, model: PreTrainedModel, processor: BaseImageProcessor | None = None) -> dict[str, float]:
        """Return a model's metrics on the validation images, as its own processor makes them if it has another."""
        raise NotImplementedError

    def get_teacher(self, model_args: ModelArguments) -> Compared:
        """Load the teacher, or build and train it, and measure it where it knows the data's classes."""
        raise NotImplementedError

    def measure_student(self, trainer: DistillationTrainer, result: Result) -> dict[str, float]:
        """Measure and save the metrics of the trainer's student, set those of its row, and return the card's."""
        raise NotImplementedError

    def predict(self, trainer: DistillationTrainer, student: PreTrainedModel) -> None:
        """Write what the student predicts for the test split, or else for the validation images."""
        raise NotImplementedError

    def report(self, compared: list[Compared]) -> None:
        """Print the table, and draw the picture."""
        raise NotImplementedError

    def for_the_card(self) -> dict:
        """Return what the model card says of the data and the run."""
        raise NotImplementedError

    def distil(self, student: PreTrainedModel, model_args: ModelArguments) -> None:
        """Train, measure and report a teacher, the student without it and the student with it; push the last."""
        args, compared, teacher_metrics, metrics = self.args, [], None, None
        self.stages, self.student_name = 2 + model_args.plain_student, model_args.student
        if args.do_train:
            plain = copy.deepcopy(student)  # the same start as the distilled student's
            paraphraser = model_args.paraphraser
            average = None if model_args.ema_decay is None else EMACallback(model_args.ema_decay)

            def make_distiller(teacher, processor, args):
                self.prepare_student(student, teacher)
                return self.distiller_class(
                    model=student,
                    teacher_model=teacher,
                    teacher_processor=processor,
                    paraphraser=paraphraser,
                    args=args,
                    callbacks=[] if average is None else [average],
                    **self.common("distilled student"),
                )

            self.make_distiller = make_distiller
            teacher = self.get_teacher(model_args)
            compared.append(teacher)
            teacher_metrics = teacher.result.metrics
            if model_args.plain_student:
                compared.append(Compared(self.train_plain(plain), plain))
            trainer = self.make_distiller(teacher.model, teacher.processor, args)
            distilled = Compared(self.train_distilled(trainer), student)
            compared += [distilled] if average is None else [self.keep_average(average.model), distilled]
        else:
            trainer = self.trainer_class(model=student, args=args, **self.common())
            compared.append(Compared(Result("student", student.num_parameters()), student))

        if args.do_eval:
            metrics = self.measure_student(trainer, compared[-1].result)
        if args.do_predict:
            self.predict(trainer, student)
        if trainer.is_world_process_zero():
            if args.do_eval:  # all at the end, one after the other, so that they can be compared
                for row in compared:
                    row.result.latency = self.latency(row.model, row.processor)
            self.report(compared)
        if args.push_to_hub:
            trainer.push_to_hub(
                teacher_metrics=teacher_metrics,
                metrics=metrics,
                latencies=latencies([row.result for row in compared]),
                **self.for_the_card(),
            )

    def write_results(self, results: list[Result], *names: str, **more) -> None:
        """Write results.json, with the settings that tell the run from others if it was one; some may be added."""
        settings = {name: getattr(self.args, name) for name in (*SETTINGS, *names)} | more
        write_results(results, settings if self.args.do_train else {}, self.args.output_dir)

    def prepare_student(self, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        """Let the distilled student begin with what a command gives it of its teacher, or refuse that."""

    def train_beside(
        self, name: str, epochs: float, models: dict[str, PreTrainedModel], make_trainer: Callable
    ) -> tuple[float, list[dict]]:
        """Train a network to compare with in a folder that is never pushed; a resumed run finds it there."""
        folder = Path(self.args.output_dir) / f"_{re.sub('[^a-z0-9]+', '_', name.lower())}"
        schedule = self.schedule(name, epochs)
        if self.start and (folder / MANIFEST_FILE).is_file():
            if damage := find_damage(folder):
                raise ValueError(
                    f"Expected the {name} in {folder} as it was saved, but {damage}: remove that folder to train "
                    "it again."
                )
            done = read_manifest(folder)
            if done.get("schedule", schedule) != schedule:
                raise ValueError(
                    f"Expected the {name} in {folder} to be trained as now, {schedule}, got one of "
                    f"{done['schedule']}: resume with the arguments of that run, or choose another --output_dir."
                )
            for subfolder, model in models.items():
                load_weights(model, str(folder / subfolder))
            say("  finished earlier")
            return done["seconds"], done["log_history"]
        args = copy.copy(self.args)
        args.output_dir, args.num_train_epochs, args.push_to_hub = str(folder), epochs, False
        args.report_to = []  # trackers would mix it with the run that it is compared with
        if args.metric_for_best_model and len(models) == 1:  # its epoch is chosen in the same way, by its own metric
            args.metric_for_best_model = re.sub(r"peer_\d+_", "", args.metric_for_best_model)
        if steps := self.steps_per_epoch(name):
            args.max_steps = round(steps * epochs)
            for kind in ("eval", "logging", "save"):  # after as many steps as the one that it is compared with
                if getattr(args, f"{kind}_strategy") == "epoch":
                    setattr(args, f"{kind}_strategy", type(getattr(args, f"{kind}_strategy"))("steps"))
                    setattr(args, f"{kind}_steps", steps)
        trainer = make_trainer(args)
        self.progress.name = name
        if trainer.is_world_process_zero():
            (folder / MANIFEST_FILE).unlink(missing_ok=True)  # of an earlier run
        self.keep_settings()
        output = trainer.train(find_resume_point(folder, self.start is not None))
        check_ran_to_its_end(trainer, f"the {name}")
        seconds = output.metrics["train_runtime"]
        trainer.save_model()
        if trainer.is_world_process_zero():
            patterns = [os.path.join(subfolder, "*") for subfolder in models]
            write_manifest(folder, patterns, schedule=schedule, seconds=seconds, log_history=trainer.state.log_history)
        return seconds, trainer.state.log_history

    def train_alone(self, model: PreTrainedModel, name: str, epochs: float) -> tuple[float, list[dict]]:
        """Train a model on its own loss, as [`train_beside`]."""
        return self.train_beside(
            name, epochs, {"": model}, lambda args: self.trainer_class(model=model, args=args, **self.common(name))
        )

    def measuring_trainer(self, model: PreTrainedModel, **common) -> DistillationTrainer:
        """Return a trainer that measures a model, and nothing else."""
        args = copy.copy(self.args)
        args.push_to_hub, args.report_to = False, []
        return self.trainer_class(model=model, args=args, **common)

    def measure(self, model: PreTrainedModel, **common) -> dict[str, float]:
        """Return a model's metrics, by the arguments of a trainer."""
        metrics = self.measuring_trainer(model, **common).evaluate()
        return {name.removeprefix("eval_"): value for name, value in metrics.items()}

    def train_teacher(
        self, teacher: PreTrainedModel, epochs: float, processor: BaseImageProcessor | None = None
    ) -> Result:
        """Train the teacher on the data, unless it is for no epochs; its metrics are still to be measured."""
        self.check(lambda args: self.make_distiller(teacher, processor, args))
        result = Result("teacher", teacher.num_parameters())
        if epochs > 0:
            seconds, result.log_history = self.train_alone(teacher, "teacher", epochs)
            result.seconds, result.trained_on = {"training": seconds}, self.trained_on("teacher")
            teacher.config.name_or_path = ""  # no longer the model of that name
        return result

    def train_plain(self, student: PreTrainedModel) -> Result:
        """Train the student without a teacher, on the same schedule, and measure it."""
        self.announce(f"Plain student: {self.student_name}", self.args.num_train_epochs, "plain student")
        seconds, history = self.train_alone(student, "plain student", self.args.num_train_epochs)
        measured = self.evaluate(student) if self.args.do_eval else {}
        result = Result("plain student", student.num_parameters(), measured, {"training": seconds}, history)
        result.trained_on = self.trained_on("plain student")
        return result

    def train_distilled(self, trainer: IEKDTrainer) -> Result:
        """Train both stages, and save the student with what is known of the training."""
        self.announce(f"Distilled student: {self.student_name}", self.args.num_train_epochs, "distilled student")
        self.progress.name = "stage 2"
        self.keep_settings()
        metrics = trainer.train(self.start).metrics
        check_ran_to_its_end(trainer, "the distilled student")
        seconds = {"stage 2": metrics["train_runtime"]}
        if "paraphraser_train_runtime" in metrics:
            seconds = {"stage 1": metrics["paraphraser_train_runtime"], **seconds}
        trainer.save_model()
        trainer.save_state()
        trainer.save_metrics("train", metrics)
        end, history = "_loss_gradient_share", trainer.state.log_history
        shares = {name.removesuffix(end): value for name, value in metrics.items() if name.endswith(end)}
        result = Result("distilled student", trainer.student.num_parameters(), {}, seconds, history)
        result.gradient_shares, result.trained_on = shares, self.trained_on("distilled student")
        return result

    def check(self, make_trainer: Callable) -> None:
        """Let a trainer, or the Hub, refuse now what it refuses, and not after other networks are trained."""
        args = copy.copy(self.args)
        args.report_to = []
        trainer = make_trainer(args)
        if self.start and self.start.checkpoint:
            trainer.check_checkpoint(self.start.checkpoint)
        best = f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}"
        if args.eval_strategy != "no" and best != "eval_loss" and best not in (measured := trainer.evaluate()):
            known = ", ".join(sorted(name.removeprefix("eval_") for name in measured))
            raise ValueError(
                f"Expected a metric of the evaluation in --metric_for_best_model, got {args.metric_for_best_model!r}: "
                f"choose one of {known}."
            )

    def first_image(self) -> PIL.Image.Image:
        """Return the first validation image, in RGB."""
        return to_rgb(self.splits["validation"][0]["image"])

    def keep_average(self, average: PreTrainedModel) -> Compared:
        """Save the moving average of the distilled student beside it, and measure it."""
        if self.args.should_save:
            for part in (average, self.processor):
                part.save_pretrained(os.path.join(self.args.output_dir, AVERAGE_FOLDER))
        measured = self.evaluate(average) if self.args.do_eval else {}
        return Compared(Result("distilled student, averaged", average.num_parameters(), measured), average)

    def latency(self, model: PreTrainedModel, processor: BaseImageProcessor | None = None) -> float:
        """Return the milliseconds that a model takes for one image, on one thread of the CPU in float32."""
        pixels = (processor or self.processor)(self.first_image(), return_tensors="pt")["pixel_values"]
        on_cpu = copy.deepcopy(model).to("cpu", torch.float32).eval()
        with torch.inference_mode():
            return median_milliseconds(lambda: on_cpu(pixel_values=pixels))
