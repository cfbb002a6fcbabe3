"""Load a model by Hub name or folder, with errors that say what to do."""

import os

import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
)
from transformers.utils import IMAGE_PROCESSOR_NAME, logging


logger = logging.get_logger(__name__)


def load_model(name_or_path: str, role: str, **kwargs) -> PreTrainedModel:
    """
    Load a model for a task from the Hub or a local folder; safetensors only.

    Args:
        name_or_path (`str`):
            Hub id or folder.
        role (`str`):
            What the model is for, as the error should call it: `"model"`, `"teacher_model"`.
        kwargs:
            Passed to `from_pretrained`.

    Returns:
        [`~transformers.PreTrainedModel`]: an instance of the class that the configuration names.

    Raises:
        `ValueError`: the model cannot be reached or read.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path)
        # The checkpoint's own class (a detector stays a detector); custom code is known to the auto class alone.
        architecture = (config.architectures or [""])[0]
        model_class = getattr(transformers, architecture, AutoModelForImageClassification)
        return model_class.from_pretrained(name_or_path, use_safetensors=True, **kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(explain_unreachable(name_or_path, role, error)) from error


def find_processor(name_or_path: str) -> BaseImageProcessor | None:
    """
    Load the image processor that was saved with a model.

    Args:
        name_or_path (`str`):
            Hub id or folder.

    Returns:
        `BaseImageProcessor`, or `None` where none was saved.
    """
    if os.path.isdir(name_or_path):
        saved = os.path.isfile(os.path.join(name_or_path, IMAGE_PROCESSOR_NAME))
    else:
        try:
            saved = bool(hf_hub_download(name_or_path, IMAGE_PROCESSOR_NAME))
        except LocalEntryNotFoundError:
            saved = False
            logger.warning(
                f"The image processor of {name_or_path} is neither in the cache nor within reach: its pixels are "
                "taken to be those of the other model. Pass teacher_processor if they are not."
            )
        except EntryNotFoundError:
            saved = False
    return AutoImageProcessor.from_pretrained(name_or_path) if saved else None


def explain_unreachable(name_or_path: str, role: str, error: Exception) -> str:
    """
    Say why a Hub name or folder could not be loaded and what to do.

    Args:
        name_or_path (`str`):
            Hub id or folder.
        role (`str`):
            What it is for, as the argument is called.
        error (`Exception`):
            What the library raised.

    Returns:
        `str`: one paragraph: expected, got, what to do.
    """
    if os.path.isdir(name_or_path):
        return f"Expected {role}={name_or_path!r} to hold a loadable config.json and *.safetensors: {error}"
    cache = "HF_HUB_CACHE, by default ~/.cache/huggingface/hub"
    reason = str(error).strip().partition("\n")[0]
    return (
        f"Expected {role} to be a folder or a Hub name that can be reached, got {name_or_path!r}, which is no folder "
        f"here and could not be had from the Hub ({reason}). Without a network, give a local folder, or fill the "
        f"Hub's cache ({cache}) on a machine that has one and set HF_HUB_OFFLINE=1."
    )
