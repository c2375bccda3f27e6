"""Turn a lone Stable Diffusion or FLUX.1 checkpoint into a diffusers folder, offline.

    import ckptconv

    found = ckptconv.inspect("sd_xl_base_1.0.safetensors")
    report = ckptconv.convert("sd_xl_base_1.0.safetensors", "sdxl", dtype="fp16")
    pipeline = ckptconv.load_pipeline("sd_xl_base_1.0.safetensors", device="cuda", dtype="fp16")

Importing this package imports neither torch nor diffusers, and a name of it loads its module on
first use: the script `ckptconv` begins here, and can be interrupted right away.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .conversion.convert import convert, plan
    from .conversion.export import Exported, export
    from .conversion.write import Report
    from .detection.detect import Detection, inspect
    from .detection.facts import Fact
    from .errors import (
        Ambiguous,
        CheckFailed,
        CkptconvError,
        DeviceError,
        FileRefused,
        HeaderError,
        Incomplete,
        MapError,
        NotACheckpoint,
        OutputError,
        UnsafePickle,
        UsageError,
    )
    from .inference.pipeline import load_pipeline
    from .maps.architecture import KeyMaps
    from .options import Choices, Options
    from .planning.plan import Plan
    from .verification.result import Check, Problem, Verification
    from .verification.verify import verify
    from .version import __version__

__all__ = [
    "Ambiguous",
    "Check",
    "CheckFailed",
    "Choices",
    "CkptconvError",
    "Detection",
    "DeviceError",
    "Exported",
    "Fact",
    "FileRefused",
    "HeaderError",
    "Incomplete",
    "KeyMaps",
    "MapError",
    "NotACheckpoint",
    "Options",
    "OutputError",
    "Plan",
    "Problem",
    "Report",
    "UnsafePickle",
    "UsageError",
    "Verification",
    "__version__",
    "convert",
    "export",
    "inspect",
    "load_pipeline",
    "plan",
    "verify",
]

_HOMES = (
    *("version", "errors", "detection.detect", "maps.architecture", "options", "detection.facts"),
    *("planning.plan", "conversion.write", "conversion.convert", "conversion.export"),
    *("verification.result", "verification.verify", "inference.pipeline"),
)
"""The modules that define these names, in the order in which they are searched."""


def __getattr__(name: str) -> Any:
    for home in _HOMES if name in __all__ else ():
        if hasattr(module := import_module(f".{home}", __name__), name):
            globals()[name] = getattr(module, name)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
