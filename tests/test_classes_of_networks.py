"""Saved networks for the classes of the data: the same in another order, others, none by name."""

import pytest
import torch
from conftest import make_resnet

from iekd_hf.commands.boxes.run import build_detector
from iekd_hf.commands.images.run import build_model
from iekd_hf.commands.masks.run import build_segmenter


OWN, OTHER = ["blue", "green", "red cat"], ["red cat", "green", "blue"]
PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def logits_of(model):
    with torch.inference_mode():
        return model.eval()(pixel_values=PIXELS).logits


@pytest.mark.parametrize(
    ("build", "tiny", "dim"),
    [
        (lambda *args, **kw: build_model(*args, trust_remote_code=False, **kw), "cifar-resnet-8", -1),
        (lambda *args, **kw: build_detector(*args[:3], 4, *args[3:], **kw), "tiny-rt-detr-8", -1),
        (build_segmenter, "tiny-upernet-8", 1),
    ],
)
def test_classes_in_another_order(tmp_path, build, tiny, dim):
    """Each class keeps its own outputs, and its name."""
    saved = build(tiny, "--student", OWN, True)
    saved.save_pretrained(tmp_path / "saved")
    for new_head in (True, False):
        model = build(str(tmp_path / "saved"), "--student", OTHER, False, new_head=new_head)
        assert list(model.config.id2label.values()) == OTHER
        torch.testing.assert_close(logits_of(model), logits_of(saved).index_select(dim, torch.tensor([2, 1, 0])))


def test_a_network_of_other_classes_is_trained_or_refused(tmp_path):
    make_resnet(num_labels=3).save_pretrained(tmp_path / "saved")  # LABEL_0, ...: the order is all that is known
    named = {"trust_remote_code": False, "from_scratch": False}
    known = build_model(str(tmp_path / "saved"), "--student", OTHER, new_head=False, **named)
    torch.testing.assert_close(logits_of(known), logits_of(make_resnet(num_labels=3)))
    known.save_pretrained(tmp_path / "named")
    assert build_model(str(tmp_path / "named"), "--student", ["blue", "red cat"], **named).num_labels == 2
    words = (
        "to know the 2 classes of the data, blue, red cat, to be measured without training, "
        "got one of 3, red cat, green, blue: train it"
    )
    with pytest.raises(ValueError, match=words):
        build_model(str(tmp_path / "named"), "--student", ["blue", "red cat"], new_head=False, **named)
