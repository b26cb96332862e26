"""Prompts and selective tuning for vision-language models, as PEFT methods. Importing it registers them with PEFT.

`import peft_vlm` itself loads neither PEFT nor torch: a name below is loaded when it is used, and the methods are
registered at the first import of PEFT, or of a part of this package that needs PEFT. The parts that do without
(`_LIGHT`) start in a fraction of a second.
"""

import importlib
import sys
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_vlm.classification import ClassificationObjective
    from peft_vlm.classifier import PromptedClassifier
    from peft_vlm.hub import publish
    from peft_vlm.methods.atprompt import ATPromptObjective
    from peft_vlm.methods.bayesian import BayesianConfig, BayesianModel, BayesianObjective
    from peft_vlm.methods.clip_lora import CLIPLoRAObjective
    from peft_vlm.methods.cocoop import CoCoOpConfig, CoCoOpModel, CoCoOpObjective
    from peft_vlm.methods.coop import CoOpConfig, CoOpModel, CoOpObjective
    from peft_vlm.methods.cpl import CPLObjective
    from peft_vlm.methods.kgcoop import KgCoOpObjective
    from peft_vlm.methods.maple import MaPLeConfig, MaPLeModel, MaPLeObjective
    from peft_vlm.methods.pre import PREObjective
    from peft_vlm.methods.promptkd import PromptKDConfig, PromptKDModel, PromptKDObjective
    from peft_vlm.methods.promptsrc import PromptSRCConfig, PromptSRCModel, PromptSRCObjective
    from peft_vlm.methods.rpp import RPPConfig, RPPModel, RPPObjective
    from peft_vlm.methods.skip_tuning import (
        SkipTuningAnswerObjective,
        SkipTuningConfig,
        SkipTuningModel,
        SkipTuningObjective,
    )
    from peft_vlm.methods.tvp import TVPConfig, TVPModel, TVPObjective
    from peft_vlm.training import VLMTrainer, VLMTrainingArguments

__all__ = [
    "ATPromptObjective",
    "BayesianConfig",
    "BayesianModel",
    "BayesianObjective",
    "CLIPLoRAObjective",
    "CPLObjective",
    "ClassificationObjective",
    "CoCoOpConfig",
    "CoCoOpModel",
    "CoCoOpObjective",
    "CoOpConfig",
    "CoOpModel",
    "CoOpObjective",
    "KgCoOpObjective",
    "MaPLeConfig",
    "MaPLeModel",
    "MaPLeObjective",
    "PREObjective",
    "PromptKDConfig",
    "PromptKDModel",
    "PromptKDObjective",
    "PromptSRCConfig",
    "PromptSRCModel",
    "PromptSRCObjective",
    "PromptedClassifier",
    "RPPConfig",
    "RPPModel",
    "RPPObjective",
    "SkipTuningAnswerObjective",
    "SkipTuningConfig",
    "SkipTuningModel",
    "SkipTuningObjective",
    "TVPConfig",
    "TVPModel",
    "TVPObjective",
    "VLMTrainer",
    "VLMTrainingArguments",
    "publish",
]

#: Where the names above are defined: a name of a method stands in the method's folder.
_HOMES = {
    "ATPrompt": "methods.atprompt",
    "Bayesian": "methods.bayesian",
    "CLIPLoRA": "methods.clip_lora",
    "CPL": "methods.cpl",
    "ClassificationObjective": "classification",
    "CoCoOp": "methods.cocoop",
    "CoOp": "methods.coop",
    "KgCoOp": "methods.kgcoop",
    "MaPLe": "methods.maple",
    "PRE": "methods.pre",
    "PromptKD": "methods.promptkd",
    "PromptSRC": "methods.promptsrc",
    "PromptedClassifier": "classifier",
    "RPP": "methods.rpp",
    "SkipTuning": "methods.skip_tuning",
    "TVP": "methods.tvp",
    "VLMTrain": "training",
    "publish": "hub",
}
_PIPELINES = "transformers.pipelines"
#: Parts of this package that need neither PEFT nor torch.
_LIGHT = ("cli", "errors", "files", "serving", "settings")


def __getattr__(name: str) -> Any:
    """Load a public name, or a part of the package, when it is first used."""
    if name in __all__:
        home = next(home for beginning, home in _HOMES.items() if name.startswith(beginning))
        value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register() -> None:
    """Make PEFT know the methods, and its `push_to_hub` our cards."""
    _FINDER.is_registered = True
    # PEFT asks every model for this property, which transformers 5.23 has renamed: nothing that a user could change
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
    importlib.import_module(f"{__name__}.methods")
    importlib.import_module(f"{__name__}.hub")
    if _PIPELINES in sys.modules:
        _extend_pipelines()


def _extend_pipelines() -> None:
    """Make transformers' pipelines know the adapters, as soon as both are there."""
    importlib.import_module(f"{__name__}.hub.pipelines").extend_pipelines()


class _Finder(MetaPathFinder):
    """Sees the first import of PEFT, or of a part that needs it, and that of transformers' pipelines.

    Looking a module up loads nothing yet; what is to be done, its loader does.
    """

    is_registered = False

    def find_spec(
        self,
        fullname: str,
        path: Any,  # a folder without `__init__` has no sequence
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        package, _, rest = fullname.partition(".")
        needs_peft = fullname == "peft" or (package == __name__ and rest.partition(".")[0] not in _LIGHT)
        if fullname != _PIPELINES and (self.is_registered or not needs_peft):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Registers the methods before a module exists, so that none is imported half; extends pipelines after theirs.

    Args:
        loader: The module's own loader.
    """

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Register; give the module, which this has loaded in most cases.

        Args:
            spec: Of the module to load.
        """
        if spec.name != _PIPELINES:  # they load adapters by name without importing this package
            _register()
            if (module := sys.modules.get(spec.name)) is not None:
                self._spec = module.__spec__
                return module
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run a module, unless the registration has loaded it; pipelines learn the adapters.

        Args:
            module: The module.
        """
        if self._spec is not None:
            module.__spec__ = self._spec
            return
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if module.__name__ == _PIPELINES:
            _extend_pipelines()


_FINDER = _Finder()
sys.meta_path.insert(0, _FINDER)
if "peft" in sys.modules:
    _register()
