"""The PyTorch wing: batch normalisation, its nn.Module, BLeNet and its training. Never imports jax."""

from bn_common.installed import needed_by

with needed_by("torch_bn"):
    from torch_bn.batch_norm import batch_norm
    from torch_bn.blenet import BLeNet
    from torch_bn.layers import BatchNorm
    from torch_bn.native import convert_batch_norm
    from torch_bn.precise import precise_statistics

__all__ = ["BLeNet", "BatchNorm", "batch_norm", "convert_batch_norm", "precise_statistics"]
