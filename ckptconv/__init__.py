"""Turn a lone Stable Diffusion checkpoint into a diffusers folder, offline.

    import ckptconv

    found = ckptconv.inspect("sd_xl_base_1.0.safetensors")
    report = ckptconv.convert("sd_xl_base_1.0.safetensors", "sdxl", dtype="fp16")

Importing this package imports neither torch nor diffusers.
"""

__version__ = "0.1.0"

from .convert import convert, plan
from .detect import Detection, inspect
from .errors import CkptconvError
from .execute import Layout, Report
from .plan import Plan

__all__ = [
    "CkptconvError",
    "Detection",
    "Layout",
    "Plan",
    "Report",
    "__version__",
    "convert",
    "inspect",
    "plan",
]
