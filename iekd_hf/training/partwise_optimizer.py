"""One optimizer over parts that are updated in turn, each by an optimizer of its own."""

import torch


class PartwiseOptimizer(torch.optim.Optimizer):
    """
    Hold an optimizer for each part of a model, and step only the parts that have gradients.

    To Trainer, accelerate and a learning rate schedule it is one optimizer: one state, one list of parameter groups,
    one file in a checkpoint. A part without gradients keeps its state as it is: no moment decays and no step is
    counted, which optimizers that count steps by group would do in one common `step()`.
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer]):
        self.optimizers = optimizers
        # The groups are the parts' own, so that a schedule that sets their learning rates sets it there.
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})

    def step(self, closure=None) -> None:
        """Step the optimizers of the parts that have gradients."""
        for optimizer in self.optimizers:
            if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
                optimizer.step()

    def train(self) -> None:
        """Tell the parts that training goes on, which optimizers without a schedule want to know."""
        self._tell("train")

    def eval(self) -> None:
        """Tell the parts that what they have trained is evaluated or saved."""
        self._tell("eval")

    def _tell(self, mode: str) -> None:
        for optimizer in self.optimizers:
            if hasattr(optimizer, mode):
                getattr(optimizer, mode)()

    def state_dict(self) -> dict:
        """Return the states of all parts."""
        return {"parts": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restore what [`state_dict`] has returned."""
        for optimizer, state in zip(self.optimizers, state_dict["parts"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
