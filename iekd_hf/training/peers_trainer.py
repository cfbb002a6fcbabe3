"""Make Trainer treat several models as one: evaluate, save, load and push each of them."""

import contextlib
import inspect
import os
import re
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import EvalLoopOutput

from ..hub.card_facts import CardFacts, Network
from .base_trainer import DistillationTrainer
from .checkpoints import load_weights, read_weights


class PeersTrainer(DistillationTrainer):
    """
    Let Trainer hold several models, `peer_1`, `peer_2`, ...

    `Trainer.model` is the first one, and each in turn while it is evaluated, saved or loaded.

    - Evaluation gives `eval_peer_1_<metric>`, ... and the mean `eval_<metric>`;
    - each is saved as a plain model in a folder of its name, also on the Hub, where all are in one repository.
    """

    def __init__(self, models: list[PreTrainedModel], **kwargs):
        self.models = list(models)
        self._accepted = [inspect.signature(model.forward).parameters.keys() for model in models]
        super().__init__(model=models[0], **kwargs)
        for model in models[1:]:
            if self.place_model_on_device:
                self._move_model_to_device(model, self.args.device)

    def named_peers(self) -> dict[str, PreTrainedModel]:
        """Return the models by name: `peer_1`, `peer_2`, ..."""
        return {f"peer_{i}": model for i, model in enumerate(self.models, start=1)}

    def inputs_of(self, index: int, inputs: dict) -> dict:
        """Return what the model of that index takes of a batch, which holds what any of them takes."""
        return {name: value for name, value in inputs.items() if name in self._accepted[index]}

    @contextlib.contextmanager
    def _acting_as(self, model: PreTrainedModel) -> Iterator[None]:
        self.model, first = model, self.model
        try:
            yield
        finally:
            self.model = first

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns = [
                *dict.fromkeys([*self._signature_columns, *(n for a in self._accepted for n in a)])
            ]

    def floating_point_ops(self, inputs: dict) -> int:
        """Estimate a step's operations as Trainer does, over all models."""
        if self._counted is None:
            counts = [model.num_parameters(exclude_embeddings=True) for model in self.models]
            self._counted, self._num_parameters = self.model, sum(counts)
        return super().floating_point_ops(inputs)

    # ---- Evaluation ----

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Run each model over the data; predictions are a tuple, metrics are each model's and their means."""
        outputs = {}
        for name, model in self.named_peers().items():
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressCallback) and callback.prediction_bar is not None:
                    callback.prediction_bar.reset()  # a run over the data for each model
            with self._acting_as(model):
                outputs[name] = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, f"{metric_key_prefix}_{name}"
                )
        metrics, values = {}, {}
        for name, output in outputs.items():
            metrics |= output.metrics
            for key, value in output.metrics.items():
                if isinstance(value, (int, float)):
                    values.setdefault(key.replace(f"_{name}", "", 1), []).append(value)
        metrics |= {key: sum(each) / len(each) for key, each in values.items() if len(each) == len(outputs)}
        first = outputs["peer_1"]
        predictions = tuple(output.predictions for output in outputs.values())
        return EvalLoopOutput(predictions, first.label_ids, metrics, first.num_samples)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Predict with one model, from what it takes of the batch."""
        inputs = self.inputs_of(self.models.index(self.model), inputs)
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    # ---- Checkpoints and the Hub ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        output_dir = output_dir or self.args.output_dir
        for name, model in self.named_peers().items():
            with self._acting_as(model):
                super()._save(os.path.join(output_dir, name), state_dict)
            # A model that brings its code has it in its folder, but of a folder in a repository transformers reads
            # weights only, and takes the code from the repository's root.
            if self.args.should_save and model._auto_class is not None:
                custom_object_save(model, output_dir)

    def check_weights(self, folder: str) -> None:
        """Refuse weights of other models."""
        for name, model in self.named_peers().items():
            read_weights(model, os.path.join(folder, name))

    def load_peers(self, folder: str) -> None:
        """Restore the models from where they were saved together."""
        for name, model in self.named_peers().items():
            load_weights(model, os.path.join(folder, name))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self.load_peers(resume_from_checkpoint)

    def _load_best_model(self):
        self.load_peers(self.state.best_model_checkpoint)

    def complete_output_dir(self) -> None:
        """Save all models: Trainer copies one from a checkpoint to where it pushes from."""
        self._save(self.args.output_dir)

    def how_to_load(self) -> str:
        """Return code that loads each model by its folder."""
        imports, loads = {}, []
        for name, model in self.named_peers().items():
            imports.setdefault(type(model).__module__.partition(".")[0], set()).add(type(model).__name__)
            loads.append(
                f'{name} = {type(model).__name__}.from_pretrained("{self.hub_model_id or "."}", subfolder="{name}")'
            )
        lines = [f"from {package} import {', '.join(sorted(names))}" for package, names in sorted(imports.items())]
        return "\n".join([*lines, "", *loads])

    def card_facts(self, metrics: dict, teacher_metrics: dict | None) -> CardFacts:
        """Return a row for each model, with what was measured of it."""
        rows = []
        for name, model in self.named_peers().items():
            # Of several data sets: <data set>_peer_1_<metric>.
            found = {key: re.fullmatch(rf"(|.+_){name}_(.+)", key) for key in metrics}
            own = {match[1] + match[2]: metrics[key] for key, match in found.items() if match}
            rows.append(Network.of(name, model, own))
        return CardFacts(rows)
