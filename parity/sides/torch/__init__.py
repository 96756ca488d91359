"""PyTorch's side of the bridge. Never imports jax."""

from bn_common.installed import needed_by

with needed_by("PyTorch's side of the bridge"):
    from parity.sides.torch.ask import answers
    from parity.sides.torch.module import (
        COUNTER,
        changed,
        dropout_rates,
        lifted,
        load_state,
        loss_of,
        numbers,
        numpy,
        put,
        randomised,
        to_dtype,
        versions,
        without_dropout,
    )
    from parity.sides.torch.precision import default_dtype
    from parity.sides.torch.record import layers_of, own_dtype, products, record
    from parity.sides.torch.tables import tables, with_tables
    from parity.sides.torch.train import check_optimizer, torch_steps

__all__ = [
    "COUNTER",
    "answers",
    "changed",
    "check_optimizer",
    "default_dtype",
    "dropout_rates",
    "layers_of",
    "lifted",
    "load_state",
    "loss_of",
    "numbers",
    "numpy",
    "own_dtype",
    "products",
    "put",
    "randomised",
    "record",
    "tables",
    "to_dtype",
    "torch_steps",
    "versions",
    "with_tables",
    "without_dropout",
]
