"""Turn a lone Stable Diffusion or FLUX.1 checkpoint into a diffusers folder, offline.

    import ckptconv

    found = ckptconv.inspect("sd_xl_base_1.0.safetensors")
    report = ckptconv.convert("sd_xl_base_1.0.safetensors", "sdxl", dtype="fp16")
    pipeline = ckptconv.load_pipeline("sd_xl_base_1.0.safetensors", device="cuda", dtype="fp16")

Importing this package imports neither torch nor diffusers.
"""

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
