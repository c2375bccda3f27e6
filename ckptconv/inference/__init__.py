"""The running pipeline: modules, weights, devices, images."""
