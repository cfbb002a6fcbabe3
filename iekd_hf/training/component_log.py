"""Running sums of the loss components, kept on the device until they are logged."""

import torch


class ComponentLog:
    """
    Sum loss components on the device, without a synchronisation per step, and keep the first step that was not
    finite.
    """

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.names: tuple[str, ...] = ()
        self.count = 0

    def record(self, components: dict[str, torch.Tensor], step: int) -> None:
        """Add one micro-batch's scalars, which belong to optimizer step `step`."""
        values = torch.stack([value.detach().float() for value in components.values()])
        if not self.count:
            self.names = tuple(components)
            self.sums = torch.zeros_like(values)
            self.first_bad_step = torch.full_like(values, -1)
        unseen = (self.first_bad_step < 0) & ~values.isfinite()
        self.first_bad_step = torch.where(unseen, step, self.first_bad_step)
        self.sums += values
        self.count += 1

    def means(self, accelerator) -> tuple[dict[str, float], dict[str, int]]:
        """Return the means over micro-batches and ranks, and the first bad step of each component that has one."""
        if not self.count:
            return {}, {}
        gathered = accelerator.gather(torch.stack([self.sums / self.count, self.first_bad_step])[None]).cpu()
        steps = gathered[:, 1].masked_fill(gathered[:, 1] < 0, torch.inf).amin(dim=0)
        bad = {name: int(step) for name, step in zip(self.names, steps.tolist(), strict=True) if step != torch.inf}
        return dict(zip(self.names, gathered[:, 0].mean(dim=0).tolist(), strict=True)), bad
