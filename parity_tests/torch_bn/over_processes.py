"""BLeNet trained by several processes of PyTorch's, and one batch norm by itself. A program: each process runs it.

torchrun --nproc-per-node 2 -m parity_tests.torch_bn.over_processes OUT.npz float64 37
"""

import sys
import warnings

import numpy as np
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

import torch_bn
from parity_tests.jax_bn.over_devices import FIG_SIZE, batches
from torch_bn.layers import synchronize
from torch_bn.training import train_step


def initial_model(dtype):
    torch.manual_seed(0)
    return torch_bn.BLeNet(channels=1, fig_size=FIG_SIZE, num_class=10).to(getattr(torch, dtype))


def trained(model, dtype, batch_size, *, synchronized=True):
    """The loss of every step, and the gradients of the first by name."""
    processes, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    parallel = DistributedDataParallel(synchronize(model) if synchronized else model) if processes > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, labels, order = batches(batch_size, dtype)
    losses, gradients = [], {}
    for batch in order:
        mine = np.array_split(batch, processes)[rank]
        images = torch.from_numpy(np.moveaxis(x[mine], -1, 1).copy())
        share = len(mine) * processes / batch_size
        found = train_step(
            parallel, optimizer, images, torch.from_numpy(labels[mine]).long(), label_smoothing=0.05, share=share
        )
        loss = found.loss.double()
        if processes > 1:
            dist.all_reduce(loss)
        losses.append(loss.item() / batch_size)
        gradients = gradients or {name: v.grad.numpy().copy() for name, v in model.named_parameters()}
    return np.array(losses), gradients


NORMS = {"plain": (3, 2), "far": (1e6, 0.1)}


def inputs(kind, dtype):
    """x, gamma, beta, moving mean and variance, dy; x unlike from process to process."""
    rng, (mean, std) = np.random.default_rng(0), NORMS[kind]
    x = rng.normal(mean, std, (11, 3, 4))
    x[:5] += std
    values = rng.uniform(0.5, 2, 3), rng.normal(0, 1, 3), rng.normal(0, 1, 3), rng.uniform(0.5, 2, 3)
    return [v.astype(dtype) for v in (x, *values, rng.normal(0, 1, x.shape))]


def one_batch_norm(kind, dtype):
    """y, the moving statistics, dx, dgamma and dbeta, of the whole batch."""
    count, rank = dist.get_world_size(), dist.get_rank()
    x, gamma, beta, mean, var, dy = map(torch.from_numpy, inputs(kind, dtype))
    rows = np.array_split(np.arange(len(x)), count)[rank]
    leaves = [v.requires_grad_() for v in (x[rows], gamma, beta)]
    options = {"unbiased_moving_var": True, "group": dist.group.WORLD}
    y, *moved = torch_bn.batch_norm(*leaves, mean, var, train=True, **options)
    y.backward(dy[rows])
    every = [None] * count
    dist.all_gather_object(every, [v.detach().numpy() for v in (y, *moved, *(v.grad for v in leaves))])
    ys, means, variances, dxs, dgammas, dbetas = zip(*every, strict=True)
    return np.concatenate(ys), means[0], variances[0], np.concatenate(dxs), sum(dgammas), sum(dbetas)


def main():
    warnings.simplefilter("error")  # no deprecated call
    path, dtype, batch_size = sys.argv[1], sys.argv[2], int(sys.argv[3])
    dist.init_process_group("gloo")
    model = initial_model(dtype)
    losses, gradients = trained(model, dtype, batch_size)
    state = {name: v.numpy() for name, v in model.state_dict().items()}
    # To the bit the same in every process.
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, {name: v.tobytes() for name, v in state.items()})
    assert all(one == every[0] for one in every)
    local = initial_model(dtype)
    local_losses, local_gradients = trained(local, dtype, batch_size, synchronized=False)
    found = {f"local/gradient/{name}": v for name, v in local_gradients.items()} | {"local/losses": local_losses}
    found |= {f"local/state/{name}": v.numpy() for name, v in local.state_dict().items()}
    norms = {f"norm/{kind}/{i}": v for kind in NORMS for i, v in enumerate(one_batch_norm(kind, dtype))}
    if dist.get_rank() == 0:
        gradients = {f"gradient/{name}": v for name, v in gradients.items()}
        np.savez(
            path, losses=losses, **{f"state/{name}": v for name, v in state.items()}, **gradients, **norms, **found
        )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
