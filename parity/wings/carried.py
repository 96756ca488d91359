"""A run of the JAX wing as one of PyTorch's: its weights under PyTorch's names, in PyTorch's layouts."""

from __future__ import annotations

from bn_common.trained import Trained


def to_torch(run: Trained) -> Trained:
    """The same network, as `python -m torch_bn.training` would have left it.

    Raises:
      ValueError: the weights are another network's.
    """
    import jax_bn.predict
    import torch_bn
    from bn_common.config import NUM_CLASS
    from parity import weights

    model, variables = jax_bn.predict.network(run)
    target = torch_bn.BLeNet(channels=1, fig_size=run.fig_size, num_class=NUM_CLASS)
    found = weights.to_torch(variables, target, flax_module=model)
    return run._replace(framework="torch", weights={name: v.numpy() for name, v in found.items()})
