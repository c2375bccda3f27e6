"""Turn a lone Stable Diffusion checkpoint into a diffusers folder, offline.

    import ckptconv

    found = ckptconv.inspect("sd_xl_base_1.0.safetensors")
    report = ckptconv.convert("sd_xl_base_1.0.safetensors", "sdxl", dtype="fp16")
    pipeline = ckptconv.load_pipeline("sd_xl_base_1.0.safetensors", device="cuda", dtype="fp16")

Importing this package imports neither torch nor diffusers.
"""

from .conversion.convert import convert, plan
from .conversion.export import Exported, export
from .conversion.write import Layout, Report
from .detection.detect import Detection, inspect
from .errors import CkptconvError
from .inference.pipeline import load_pipeline
from .planning.plan import Plan
from .verification.result import Verification
from .verification.verify import verify
from .version import __version__

__all__ = [
    "CkptconvError",
    "Detection",
    "Exported",
    "Layout",
    "Plan",
    "Report",
    "Verification",
    "__version__",
    "convert",
    "export",
    "inspect",
    "load_pipeline",
    "plan",
    "verify",
]
