"""Numbers for people."""

from __future__ import annotations


def millions(count: int) -> str:
    """Returns a number of parameters.

    >>> millions(2567463684), millions(83653863), millions(640)
    ('2,567 M', '83.7 M', '640')
    """
    if count < 50_000:
        return f"{count:,}"
    return f"{count / 1e6:,.{0 if count >= 1e9 else 1}f} M"


def size(nbytes: float) -> str:
    """Returns a number of bytes.

    >>> size(6938078334)
    '6.94 GB'
    """
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"
