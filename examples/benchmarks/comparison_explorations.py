"""
Ways to explore that were tried and that the library does not offer: `ie-ft,exploration=centred` in compare_methods.py.

`as in the paper`: away from the teacher's factors. `own`: away from what the student's other half inherits, the form
printed in the paper's summary. `centred`: as in the paper, between factors less their mean over the batch, so that one
answer to all images is no answer. `where-wrong`: inherits from images that the teacher classifies as they are
labelled, explores on the others; it needs the teacher's logits: `ie-ft+kd,lambda_kd=1e-9,exploration=where-wrong`.
"""

import torch

from iekd_hf import IEKDTrainer
from iekd_hf.method.objective import factor_losses


class AwayFromItself(IEKDTrainer):
    """Compare what explores with what inherits."""

    def _losses(self, outputs, F_inh, F_exp, labels, targets, inputs):
        losses = super()._losses(outputs, F_inh, F_exp, labels, targets, inputs)
        return losses | factor_losses([], F_exp, [F.detach() for F in F_inh], self.args)


class Centred(IEKDTrainer):
    """Compare what explores with the teacher, both less their mean over the batch."""

    def _losses(self, outputs, F_inh, F_exp, labels, targets, inputs):
        losses = super()._losses(outputs, F_inh, F_exp, labels, targets, inputs)
        centred = ([F.float() - F.float().mean(dim=0) for F in factors] for factors in (F_exp, targets.factors))
        explored, from_teacher = centred
        return losses | factor_losses([], explored, from_teacher, self.args)


class WhereWrong(IEKDTrainer):
    """Inherit where the teacher is right, explore where it is wrong."""

    def _losses(self, outputs, F_inh, F_exp, labels, targets, inputs):
        losses = super()._losses(outputs, F_inh, F_exp, labels, targets, inputs)
        right = targets.logits.argmax(dim=1) == labels.given
        for part, counts in (((F_inh, []), right), (([], F_exp), ~right)):
            masks = counts.view(-1, 1, 1)
            alike = [[torch.where(masks[..., None], F, 0.0) for F in factors] for factors in part]
            from_teacher = [torch.where(masks[..., None], F, 0.0) for F in targets.factors]
            losses |= factor_losses(*alike, from_teacher, self.args)
        return losses


EXPLORATIONS = {
    "as in the paper": IEKDTrainer,
    "own": AwayFromItself,
    "centred": Centred,
    "where-wrong": WhereWrong,
}
