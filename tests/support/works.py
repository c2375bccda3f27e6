"""Work that goes wrong, in a module that a worker imports at once."""

from __future__ import annotations

import os
import signal
from typing import Any

from ckptconv.batch.work import Conversion, Done, Inspection, Moved, Pair


class Broken(Inspection):
    """Has a bug that one file shows."""

    def __call__(self, pair: Pair, *rest: Any) -> Done:
        return {"size": 1 // (pair.source != "b")}, None


class Deadly(Conversion):
    """Dies of one file."""

    def __call__(self, pair: Pair, moved: Moved, /) -> Done:
        if pair.source.endswith("b.safetensors"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(pair, moved)
