"""Load a model by Hub name or folder, with errors that say what to do."""

import json
import os

import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, logging

from .signature import OF_IMAGES, WITHOUT_MASKS, is_headless


logger = logging.get_logger(__name__)

# Where an image processor may be saved, and the key that tells: by itself, in a processor of several inputs (of SAM or
# CLIP; not so in those of text, and of Transformers 4), or, as timm has it, in the model's configuration.
_PROCESSOR_FILES = {IMAGE_PROCESSOR_NAME: "", PROCESSOR_NAME: "image_processor", CONFIG_NAME: "pretrained_cfg"}

# Keywords of from_pretrained that say where files come from.
_HUB_KEYWORDS = ("revision", "token", "subfolder", "cache_dir", "local_files_only", "force_download")


def load_if_named(model: nn.Module | str | None, role: str, init_kwargs: dict | None, dtype: str) -> nn.Module | None:
    """Load a model given by name; return a model unchanged."""
    if isinstance(model, str):
        return load_model(model, role, **{"dtype": dtype, **(init_kwargs or {})})
    if init_kwargs:
        raise ValueError(
            f"Expected {role} as a Hub id or folder with {role}_init_kwargs, got {type(model).__name__}: they are for "
            "from_pretrained, call it with them yourself."
        )
    return model


def load_model(name_or_path: str, role: str, **kwargs) -> PreTrainedModel:
    """Load a model for a task from the Hub or a local folder; safetensors only."""
    kwargs = {"trust_remote_code": False, **kwargs}
    if "torch_dtype" in kwargs:  # as `dtype` was called
        kwargs["dtype"] = kwargs.pop("torch_dtype")
    where = {name: kwargs[name] for name in (*_HUB_KEYWORDS, "trust_remote_code") if name in kwargs}
    try:
        config = AutoConfig.from_pretrained(name_or_path, **where)
        model_class = _class_of(config)
        model, report = model_class.from_pretrained(
            name_or_path, use_safetensors=True, output_loading_info=True, **kwargs
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(explain_unreachable(name_or_path, role, error)) from error
    missing = sorted(report["missing_keys"])
    if missing and is_headless(model) and all(name.startswith("pooler.") for name in missing):
        model.pooler = None  # no map comes from it, and random weights would make another teacher of each run
        missing = []
    if missing:
        raise ValueError(
            f"Expected every weight of {type(model).__name__} in {role}={name_or_path!r}, got {len(missing)} missing "
            f"({missing[0]} among them), which would be random: save it again with save_pretrained, or load it "
            "yourself and pass the model."
        )
    return model


def _class_of(config: PreTrainedConfig) -> type:
    """Return a checkpoint's own class: a detector stays a detector, and features come without a head."""
    architecture = (config.architectures or [""])[0]
    if own := getattr(transformers, (WITHOUT_MASKS | OF_IMAGES).get(architecture, architecture), None):
        return own
    # Custom code is known to the auto classes alone.
    known = getattr(config, "auto_map", None) or {}
    headless = "AutoModel" in known and AutoModelForImageClassification.__name__ not in known
    return AutoModel if headless else AutoModelForImageClassification


def find_processor(name_or_path: str, **kwargs) -> BaseImageProcessor | None:
    """Load the image processor that was saved with a model."""
    where = {name: kwargs[name] for name in _HUB_KEYWORDS if name in kwargs}
    saved = _has_processor(name_or_path, where)
    if not saved:
        return None
    trust = kwargs.get("trust_remote_code", False)
    try:
        return AutoImageProcessor.from_pretrained(name_or_path, trust_remote_code=trust, **where)
    except (OSError, ValueError) as error:
        raise ValueError(explain_unreachable(name_or_path, "the teacher's image processor", error)) from error


def _has_processor(name_or_path: str, where: dict) -> bool:
    """Return whether an image processor was saved."""
    unreachable = False
    for name, key in _PROCESSOR_FILES.items():
        if os.path.isdir(name_or_path):
            path = os.path.join(name_or_path, where.get("subfolder") or "", name)
            if not os.path.isfile(path):
                continue
        else:
            try:
                path = hf_hub_download(name_or_path, name, **where)
            except LocalEntryNotFoundError:
                unreachable = True
                continue
            except EntryNotFoundError:
                continue
        if not key:
            return True
        with open(path, encoding="utf-8") as file:
            if key in json.load(file):
                return True
    if unreachable:
        logger.warning(
            f"Could not look up the image processor of {name_or_path}, which is not in the cache, and the Hub cannot "
            "be reached: it is assumed to take the other model's pixels. Pass teacher_processor if it does not."
        )
    return False


def explain_unreachable(name_or_path: str, role: str, error: Exception) -> str:
    """Explain why a Hub name or folder could not be loaded, and what to do."""
    if "trust_remote_code" in str(error):
        return (
            f"Expected {role} without code of its own, got {name_or_path!r}, which has some that is not run unless "
            "you ask for it: read it, and if you trust it, set trust_remote_code (for a trainer in "
            "teacher_model_init_kwargs or model_init_kwargs), or load the model yourself."
        )
    if os.path.isfile(os.path.join(name_or_path, "adapter_config.json")):
        return (
            f"Expected a whole model in {role}={name_or_path!r}, got an adapter of PEFT: load it with its base, and "
            "save what merge_and_unload() returns."
        )
    if os.path.isdir(name_or_path):
        return f"Expected {role}={name_or_path!r} to hold a loadable config.json and *.safetensors: {error}"
    cache = "HF_HUB_CACHE, by default ~/.cache/huggingface/hub"
    reason = str(error).strip().partition("\n")[0]
    return (
        f"Expected {role} to be a folder or a Hub name that can be reached, got {name_or_path!r}, which is no folder "
        f"here and could not be fetched from the Hub ({reason}). Without a network, give a local folder, or fill the "
        f"Hub's cache ({cache}) on a machine that has one and set HF_HUB_OFFLINE=1."
    )
