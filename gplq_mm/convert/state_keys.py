# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Keys of a model's state dict by the names of its tensors."""

from torch import nn


def state_keys(model: nn.Module) -> dict[str, str]:
    """Key in the state dict of each parameter and buffer, by its dotted name.

    They are equal but where a state-dict hook renames: mmpretrain's ``TimmClassifier`` stores
    ``model.blocks.0...`` as ``blocks.0...``.

    Args:
        model: Any module. Buffers that are not saved have no key.

    Examples:
        >>> state_keys(nn.Sequential(nn.Linear(2, 2)))
        {'0.weight': '0.weight', '0.bias': '0.bias'}
    """
    state = model.state_dict(keep_vars=True)
    stored = {id(tensor): key for key, tensor in state.items()}
    named = [*model.named_parameters(remove_duplicate=False)]
    named += model.named_buffers(remove_duplicate=False)  # type: ignore[arg-type]
    keys = {n: n if state.get(n) is t else stored.get(id(t)) for n, t in named}
    return {name: key for name, key in keys.items() if key is not None}
