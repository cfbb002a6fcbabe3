"""Make Transformers' auto classes know the CIFAR ResNets, without importing Transformers and torch for that alone."""

import importlib.util
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder


def register_cifar_resnets() -> None:
    """Register configuration and model with the auto classes: now, or once Transformers is imported."""
    if "transformers" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterImport("transformers", _register))


def _register() -> None:
    from transformers import AutoConfig, AutoModelForImageClassification

    # The model's own file may be what imports Transformers first, and is half executed then. It is executed anew, as
    # `import` returns what is in sys.modules at its end.
    sys.modules.pop(f"{__package__}.modeling_cifar_resnet", None)
    from .modeling_cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification

    AutoConfig.register(CifarResNetConfig.model_type, CifarResNetConfig)
    AutoModelForImageClassification.register(CifarResNetConfig, CifarResNetForImageClassification)


class _AfterImport(MetaPathFinder):
    """Find a module as the other finders do, once, and call a function when it has been imported."""

    def __init__(self, name: str, then: Callable[[], None]):
        self.name, self.then = name, then

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_call(module):
            execute(module)
            self.then()

        spec.loader.exec_module = execute_and_call
        return spec
