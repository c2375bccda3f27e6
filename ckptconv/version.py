"""The version of ckptconv."""

__version__ = "0.1.0"
