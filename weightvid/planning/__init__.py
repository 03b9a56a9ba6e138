"""From a checkpoint and options to a plan of its archive: which tensors are quantized, and how."""
