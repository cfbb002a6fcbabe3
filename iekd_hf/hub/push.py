"""Push to the Hub: a failed push never ends training, and no local path is uploaded."""

import contextlib
import os
import shlex
import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

from huggingface_hub import ModelCard, create_branch
from torch import nn
from transformers import Trainer
from transformers.modelcard import TrainingSummary
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils import logging

from ..models.adapters import is_adapted
from .card_facts import CardFacts, Network, hub_id, last_metrics, numbers
from .model_card import write_card


logger = logging.get_logger(__name__)

# What Trainer leaves out of a push, which a push by hand must leave out too.
_LEFT_OUT = ("_*", "checkpoint-*")
_STAGING_FOLDER = "_push"


class HubTrainer(Trainer):
    """
    Extend [`~transformers.Trainer`]'s pushes.

    - A failed push is logged with the command to retry it; training goes on, and everything is saved in `output_dir`.
    - A repository that cannot be written to is an error before training starts.
    - A missing branch is created.
    - With `hub_strategy="checkpoint"` or `"all_checkpoints"`, a checkpoint is pushed with all that resuming it takes,
      from a copy that later saves cannot remove in the middle of the upload.
    - The model card says what the model is, how it was taught and what was measured.
    """

    _tag_names = ("iekd", "knowledge-distillation")

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, and the branch that `hub_revision` names, where they are missing."""
        check_base_is_public(self.model)
        try:
            super().init_hf_repo(token, private)
            self._make_branch(self.args.hub_revision, token)
        except Exception as error:
            self.hub_model_id = None
            raise ValueError(
                f"Expected a repository {self._repository()} on the Hub that can be pushed to, got {_reason(error)}: "
                "log in with a token that may write (`hf auth login`), or train without push_to_hub and push later."
            ) from error

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """Save the model, its processor and its card in `output_dir`, and upload them."""
        try:
            if self.hub_model_id is None:
                self.init_hf_repo(token=token, private=private)
            self._make_branch(revision, token)
            pushed = super().push_to_hub(commit_message, blocking, token, revision, private, **kwargs)
        except Exception as error:
            # It may have come before all was saved; should saving be what has failed, that is raised here.
            self.save_model(_internal_call=True)
            self.create_model_card(**kwargs)
            self._tell_failed_push(error, revision)
            return None
        if isinstance(pushed, Future):
            pushed.add_done_callback(lambda job: self._tell_failed_push(job.exception(), revision))
        return pushed

    def save_state(self) -> None:
        """Save the state as Trainer does; the best checkpoint goes by its name, because the file is pushed."""
        with self._best_by_name():
            super().save_state()

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        *,
        teacher_metrics: dict[str, float] | None = None,
        metrics: dict[str, float] | None = None,
        picture: str | None = None,
        latencies: dict[str, float] | None = None,
    ) -> None:
        """Write the model card, `README.md` in `output_dir`."""
        if not self.is_world_process_zero():
            return
        facts = self.card_facts(numbers(last_metrics(self) if metrics is None else metrics), teacher_metrics)
        for network in facts.networks:
            network.latency = (latencies or {}).get(network.role)
        own = [network for network in facts.networks if network.in_repository]
        for network in own:
            network.source = network.source if finetuned_from is None else hub_id(finetuned_from)
        sources = {network.source or "" for network in own}
        summary = TrainingSummary.from_trainer(
            self,
            language=language,
            license=license,
            tags=self._tags(tags),
            model_name=model_name or self._repository().rpartition("/")[2],
            finetuned_from=sources.pop() if len(sources) == 1 else "",  # whose licence goes on
            tasks=tasks,
            # Nothing is guessed: where Trainer knows no data set's id it takes its file format ("imagefolder").
            dataset_tags=dataset_tags or [],
            dataset=dataset,
            dataset_args=dataset_args or [],
            dataset_metadata=[],
        )
        write_card(self, summary, facts, self.how_to_load(), picture)

    def card_facts(self, metrics: dict, teacher_metrics: dict | None) -> CardFacts:
        """Return the rows of the card's table, how the model was taught, and the papers of that."""
        return CardFacts([Network.of("model", self.model, metrics)])

    def how_to_load(self) -> str | None:
        """Return code that loads what is pushed, where the usual one does not do."""
        return None

    def _tags(self, tags: str | list[str] | None) -> list[str]:
        path = os.path.join(self.args.output_dir, "README.md")
        earlier = ModelCard.load(path).data.tags or [] if os.path.exists(path) else []
        tags = [tags] if isinstance(tags, str) else list(tags or [])
        return list(dict.fromkeys([*tags, *self._tag_names, *earlier]))

    def complete_output_dir(self) -> None:
        """Save in `output_dir` what Trainer does not copy there from a checkpoint, before it is pushed."""

    def complete_checkpoint(self, folder: str) -> None:
        """Add to the copy of a checkpoint that is pushed what resuming takes and is kept elsewhere."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        strategy, earlier = self.args.hub_strategy, []
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done():
            if not self.args.hub_always_push:
                return
            earlier = list(self.push_in_progress.jobs)
        staged = None
        try:
            if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                checkpoint_folder = staged = self._stage(checkpoint_folder)
                self.complete_checkpoint(staged)
            self.complete_output_dir()
            super()._push_from_checkpoint(checkpoint_folder)
        except Exception as error:  # a tracker that pushes along, say; the checkpoint itself is saved
            self._tell_failed_push(error, self.args.hub_revision)
            if staged is not None:
                shutil.rmtree(staged, ignore_errors=True)
            return
        jobs = [job for job in self.push_in_progress.jobs if job not in earlier]
        for job in jobs:
            job.add_done_callback(lambda job: self._tell_failed_push(job.exception(), self.args.hub_revision))
        if staged is not None:
            jobs[-1].add_done_callback(lambda _: shutil.rmtree(staged, ignore_errors=True))

    def _stage(self, checkpoint_folder: str) -> str:
        """Copy a checkpoint to push it, with the best one by its name."""
        staged = Path(self.args.output_dir, _STAGING_FOLDER, Path(checkpoint_folder).name)
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(checkpoint_folder, staged, copy_function=_link)
        (staged / TRAINER_STATE_NAME).unlink()  # one file with the checkpoint's own, which stays as it is
        with self._best_by_name():
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
        return str(staged)

    @contextlib.contextmanager
    def _best_by_name(self) -> Iterator[None]:
        best = self.state.best_model_checkpoint
        self.state.best_model_checkpoint = best and os.path.basename(best)
        try:
            yield
        finally:
            self.state.best_model_checkpoint = best

    def _make_branch(self, revision: str | None, token: str | None) -> None:
        # Trainer takes the branch to be there; pull requests ("refs/pr/1") are not made this way.
        if self.is_world_process_zero() and revision not in (None, "main") and not revision.startswith("refs/"):
            create_branch(self.hub_model_id, branch=revision, token=token or self.args.hub_token, exist_ok=True)

    def _repository(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or os.path.basename(os.path.abspath(self.args.output_dir))

    def _tell_failed_push(self, error: BaseException | None, revision: str | None) -> None:
        if error is None or not self.is_world_process_zero():
            return
        command = ["hf", "upload", self._repository(), self.args.output_dir, "."]
        command += [part for pattern in _LEFT_OUT for part in ("--exclude", pattern)]
        revision = revision or self.args.hub_revision
        command += ["--revision", revision] if revision else []
        command += ["--private"] if self.args.hub_private_repo else []
        logger.error(
            f"The push to {self._repository()} has failed: {_reason(error)}. What it would have pushed is saved in "
            f"{self.args.output_dir}. To push it later, with a token that may write (`hf auth login`), run\n"
            f"    {shlex.join(command)}"
        )


def check_base_is_public(model: nn.Module) -> None:
    """Refuse to push an adapter whose file would name a folder of this machine as its base."""
    for config in model.peft_config.values() if is_adapted(model) else ():
        base = config.base_model_name_or_path
        if base and hub_id(base) is None:
            raise ValueError(
                "Expected an adapter of a model of the Hub to push, got one of the folder "
                f"{os.path.basename(base)!r}, which no one else could load: load the base by its name on the Hub, or "
                "push model.merge_and_unload()."
            )


def _link(source: str, target: str) -> None:
    """Make a second name for a file instead of a copy, where the file system can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _reason(error: BaseException) -> str:
    """Describe an error in one line, without the signed URL of an upload."""
    cause = error.__cause__ if isinstance(error, (RuntimeError, ValueError)) and error.__cause__ else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    text = str(error).strip().partition("\n")[0].rstrip(".:")
    return f"{type(cause).__name__}{f' (HTTP status {status})' if status else ''}: {text}"
