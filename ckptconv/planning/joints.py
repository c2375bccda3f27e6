"""Whether components belong together: what one reads must be as wide as what the others give."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping

from ..maps.architecture import Joint
from .step import Target

Tensors = Mapping[str, Mapping[str, Target]]
"""By component, its tensors by key."""


def misfits(joints: Iterable[Joint], tensors: Tensors) -> tuple[str, ...]:
    """Returns a sentence for each axis that is not as long as the other components need.

    Args:
        joints: of the architecture. One is passed over if a tensor that it needs is missing.
        tensors: of every component that is there.
    """
    return tuple(problem for joint in joints for problem in _misfits(joint, tensors))


def _misfits(joint: Joint, tensors: Tensors) -> Iterator[str]:
    given = [next(_found(name, axis, tensors), None) for name, axis in joint.gives.items()]
    there = [target for target in given if target]
    if len(there) < len(given):
        return
    lengths = (t.shape[axis] for t, axis in zip(there, joint.gives.values(), strict=True))
    needed = sum(lengths) * joint.times + joint.plus
    because = f" ({joint.because})" if joint.because else ""
    for name, axis in joint.reads.items():
        unfit = (t for t in _found(name, axis, tensors) if t.shape[axis] != needed)
        if target := next(unfit, None):
            sources = " and ".join(map(_shape, there))
            yield f"{_shape(target)}, but axis {axis} should be {needed}: {sources}{because}"


def _found(name: str, axis: int, tensors: Tensors) -> Iterator[Target]:
    """Yields the tensors of a name, in which `*` stands for any text, that have the axis."""
    component, _, pattern = name.partition("/")
    known = tensors.get(component, {})
    for key in fnmatch.filter(known, pattern) if "*" in pattern else {pattern} & known.keys():
        if len(known[key].shape) > axis:
            yield known[key]


def _shape(target: Target) -> str:
    return f"{target.component}/{target.key} has shape {list(target.shape)}"
