"""The channel split of the student, the factor encoder, and the paraphraser that compresses the teacher's maps."""

import copy
import math
import os
from pathlib import Path

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from torch import nn


SPLIT_MODES = ("random", "natural")
DECODERS = ("conv", "transposed", "linear")


class ChannelSplit(nn.Module):
    """
    Partition channels, once, into an inheritance and an exploration part (section 3.1 of the paper).

    The indices are buffers: they are saved, restored and moved with the module, so a resumed run keeps its split.

    Args:
        num_channels (`int`):
            Channels of the student's feature map.
        inheritance_ratio (`float`, *optional*, defaults to 0.5):
            Share of the channels that inherit, in [0, 1]. At 0 or 1 one part is empty; in between both have at least
            one channel.
        mode (`str`, *optional*, defaults to `"random"`):
            `"random"` draws the channels, `"natural"` takes the first ones for inheritance.
        seed (`int`, *optional*, defaults to 0):
            Seed of the draw. Global random state is neither read nor moved.

    Raises:
        `ValueError`: a ratio outside [0, 1], an unknown mode, or too few channels for two parts.

    Example:

    ```python
    >>> import torch
    >>> from iekd_hf import ChannelSplit
    >>> split = ChannelSplit(num_channels=5, inheritance_ratio=0.5, mode="natural")
    >>> f_inh, f_exp = split(torch.randn(2, 5, 8, 8))
    >>> f_inh.shape, f_exp.shape
    (torch.Size([2, 2, 8, 8]), torch.Size([2, 3, 8, 8]))

    ```
    """

    def __init__(self, num_channels: int, inheritance_ratio: float = 0.5, mode: str = "random", seed: int = 0):
        super().__init__()
        if not 0 <= inheritance_ratio <= 1:
            raise ValueError(f"Expected inheritance_ratio within [0, 1], got {inheritance_ratio}.")
        if mode not in SPLIT_MODES:
            raise ValueError(f"Expected mode to be one of {', '.join(SPLIT_MODES)}; got {mode!r}.")
        num_inheriting = round(num_channels * inheritance_ratio)
        if 0 < inheritance_ratio < 1:
            if num_channels < 2:
                raise ValueError(
                    f"Expected at least 2 channels to split, got {num_channels}: choose a wider layer, or "
                    "inheritance_ratio 0 or 1."
                )
            num_inheriting = min(max(num_inheriting, 1), num_channels - 1)
        if mode == "random":
            order = torch.randperm(num_channels, generator=torch.Generator().manual_seed(seed))
        else:
            order = torch.arange(num_channels)
        self.register_buffer("inheritance_indices", order[:num_inheriting].sort().values)
        self.register_buffer("exploration_indices", order[num_inheriting:].sort().values)

    def forward(self, feature_map: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `(f_inh, f_exp)`, the two groups of channels of `(batch_size, num_channels, height, width)`."""
        return feature_map.index_select(1, self.inheritance_indices), feature_map.index_select(
            1, self.exploration_indices
        )


def _coder(in_channels: int, out_channels: int, size: int, convolution: type[nn.Module] = nn.Conv2d) -> nn.Sequential:
    """Build three convolutions, the second changing the width, as the authors order and initialise them."""
    layers: list[nn.Module] = [nn.LeakyReLU(0.1)]
    for c_in, c_out in ((in_channels, in_channels), (in_channels, out_channels), (out_channels, out_channels)):
        conv = convolution(c_in, c_out, kernel_size=size, stride=1, padding=size // 2, bias=False)
        nn.init.normal_(conv.weight, std=math.sqrt(2 / (size**2 * c_out)))
        layers += [conv, nn.BatchNorm2d(c_out), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


class FactorEncoder(nn.Module):
    """
    Encode one part of the student's feature map into a factor of the teacher's factor's width (section 3.1).

    LeakyReLU(0.1), then three times: convolution without bias, BatchNorm, LeakyReLU(0.1). Height and width stay.

    Args:
        in_channels (`int`):
            Channels of the part, i.e. of `f_inh` or `f_exp`.
        factor_channels (`int`):
            Channels k of the factor.
        kernel_size (`int`, *optional*, defaults to 3):
            Height and width of the convolutions, an odd number.

    Example:

    ```python
    >>> import torch
    >>> from iekd_hf import FactorEncoder
    >>> encoder = FactorEncoder(in_channels=64, factor_channels=32)
    >>> encoder(torch.randn(2, 64, 8, 8)).shape, sum(p.numel() for p in encoder.parameters())
    (torch.Size([2, 32, 8, 8]), 64768)

    ```
    """

    def __init__(self, in_channels: int, factor_channels: int, kernel_size: int = 3):
        super().__init__()
        self.layers = _coder(in_channels, factor_channels, kernel_size)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        """Map `(batch_size, in_channels, height, width)` to `(batch_size, factor_channels, height, width)`."""
        return self.layers(feature_map)


class Paraphraser(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="iekd_hf",
    tags=["iekd", "knowledge-distillation", "paraphraser"],
    model_card_template=Path(__file__).with_name("paraphraser_card.md").read_text(encoding="utf-8"),
):
    """
    Compress a teacher's feature maps into compact factors, and decode them again: the factor autoencoder.

    Trained once per teacher on its reconstruction error alone, then frozen; many students of that teacher can reuse it
    (`save_pretrained`, `from_pretrained` and `push_to_hub` work as for any Hugging Face model, in safetensors).
    Sources: Kim et al., *Paraphrasing Complex Network*, NeurIPS 2018; Huang et al., CVPR 2021, section 3.1. Layer
    order, missing biases, initialisation and the plain convolutions of the decoder are those of the latter's released
    code.

    Args:
        in_channels (`int`):
            Channels of the teacher's feature map.
        factor_channels (`int`):
            Channels k of the factor; half of `in_channels` in both papers.
        decoder (`str`, *optional*, defaults to `"conv"`):
            `"conv"` (plain convolutions), `"transposed"` (transposed ones, as the papers' text says) or `"linear"`
            (plain ones without the last LeakyReLU, for maps that are negative as often as positive).
        kernel_size (`int`, *optional*, defaults to 3):
            Height and width of the convolutions, an odd number.

    Raises:
        `ValueError`: an unknown decoder.

    Example:

    ```python
    >>> import torch
    >>> from iekd_hf import Paraphraser
    >>> paraphraser = Paraphraser(in_channels=64, factor_channels=32)
    >>> f_T = torch.randn(2, 64, 8, 8)
    >>> paraphraser.encode(f_T).shape, paraphraser(f_T).shape, sum(p.numel() for p in paraphraser.parameters())
    (torch.Size([2, 32, 8, 8]), torch.Size([2, 64, 8, 8]), 129600)

    ```

    `facts` is what [`IEKDTrainer`] knows of the paraphraser that it has trained, for its model card.
    """

    def __init__(self, in_channels: int, factor_channels: int, decoder: str = "conv", kernel_size: int = 3):
        super().__init__()
        if decoder not in DECODERS:
            raise ValueError(f"Expected decoder to be one of {', '.join(DECODERS)}; got {decoder!r}.")
        self.in_channels = in_channels
        self.factor_channels = factor_channels
        self.facts: dict[str, str | float] = {}
        self.encoder = _coder(in_channels, factor_channels, kernel_size)
        convolution = nn.ConvTranspose2d if decoder == "transposed" else nn.Conv2d
        self.decoder = _coder(factor_channels, in_channels, kernel_size, convolution)
        if decoder == "linear":
            del self.decoder[-1]

    def encode(self, feature_map: torch.Tensor) -> torch.Tensor:
        """Return the factor `(batch_size, factor_channels, height, width)` of a teacher's map."""
        return self.encoder(feature_map)

    def without_decoder(self) -> "Paraphraser":
        """Return a paraphraser that shares this one's encoder and can do no more than encode."""
        encoding = copy.copy(self)
        encoding._modules = {"encoder": self.encoder}
        return encoding

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        """Return the reconstruction of `(batch_size, in_channels, height, width)`."""
        return self.decoder(self.encoder(feature_map))

    def generate_model_card(self, **facts) -> ModelCard:
        """
        Write the model card.

        Args:
            facts:
                What the attribute `facts` does not say, or says otherwise: `teacher` and `dataset` (Hub ids), `layer`,
                `license`, `reconstruction_loss` and `mean_map_loss` (held-out images), `repo_id`. `save_pretrained`
                and `push_to_hub` take them as `model_card_kwargs`.

        Returns:
            `ModelCard`
        """
        facts = {**self.facts, **facts}
        data = copy.deepcopy(self._hub_mixin_info.model_card_data)
        for name in ("license", "teacher"):
            data[name] = facts.get(name)
        data["datasets"] = [facts["dataset"]] if facts.get("dataset") else None
        return ModelCard.from_template(
            data,
            template_str=self._hub_mixin_info.model_card_template,
            model=self,
            parameters=sum(parameter.numel() for parameter in self.parameters()),
            **{"repo_id": ".", **facts},
        )

    def push_to_hub(self, repo_id: str, *, model_card_kwargs: dict | None = None, **kwargs) -> str:
        """Push as any model of the Hub's mixin; the card says how to load it from there."""
        facts = {"repo_id": repo_id, **(model_card_kwargs or {})}
        return super().push_to_hub(repo_id, model_card_kwargs=facts, **kwargs)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **kwargs):
        if os.path.isdir(model_id) and not os.path.isfile(os.path.join(model_id, SAFETENSORS_SINGLE_FILE)):
            raise ValueError(
                f"Expected a paraphraser in {model_id}, got no {SAFETENSORS_SINGLE_FILE}: save it there with "
                "Paraphraser.save_pretrained."
            )
        return super()._from_pretrained(model_id=model_id, **kwargs)

    @classmethod
    def _load_as_pickle(cls, model, model_file: str, map_location: str, strict: bool):
        # The mixin falls back to a pickled `pytorch_model.bin` where there is no safetensors file.
        raise ValueError(
            f"Expected a paraphraser in safetensors, got only {Path(model_file).name}, a pickle, which is not loaded: "
            "save it again with Paraphraser.save_pretrained."
        )
