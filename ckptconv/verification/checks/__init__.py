"""The checks of `ckptconv verify`: one module for each thing that can be wrong."""
