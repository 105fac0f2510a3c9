# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Packed checkpoints: in the layout of MMEngine's, as ``.pth`` or ``.safetensors``.

A packed ``.pth`` has the entries ``meta``, ``gplq`` and ``state_dict`` of any checkpoint of a run;
its state dict has one key, ``gplq_packed``, whose uint8 tensor is the content of a
``.safetensors`` file. A model of this package unpacks it when it is loaded.
"""

import ast
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..version import __version__
from .packed_state import FORMAT_VERSION, INDEX, PackedState, pack_state, restore_state
from .tensor_bytes import decode_tensors, encode_tensors, sha256_of

PACKED_KEY = 'gplq_packed'
"""The only key of a packed state dict."""
ABOUT = 'packed'
"""Entry of ``checkpoint['gplq']`` that describes the packing."""
_CHECKPOINT = 'checkpoint'
"""Metadata key of a ``.safetensors`` file: all but the state dict, as a Python literal."""
_HASH = 'about_sha256'


def packed_checkpoint(model: nn.Module, about: Mapping[str, Any], fp16: bool = False) -> dict:
    """A packed checkpoint of a finished model.

    Args:
        model: Converted model after stage 2.
        about: All entries of its checkpoint but the state dict: ``meta``, ``gplq``.
        fp16: Store the float remainder in float16, see ``pack_state``.

    Returns:
        Checkpoint for ``torch.save``; ``torch.load`` reads it with ``weights_only=True``.

    Raises:
        ValueError: If ``about`` has more than plain values.
    """
    packed = pack_state(model, fp16)
    about = plain_values({k: v for k, v in about.items() if k != 'state_dict'})
    gplq = {k: v for k, v in about.get('gplq', {}).items() if k != ABOUT}
    gplq[ABOUT] = _description(packed, fp16)
    checkpoint = {**about, 'gplq': gplq}
    gplq[ABOUT][_HASH] = _hash_of(checkpoint)
    content = packed.to_bytes({'format': 'pt'})
    return {**checkpoint, 'state_dict': {PACKED_KEY: content}}


def is_packed(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's state dict is packed."""
    return PACKED_KEY in checkpoint.get('state_dict', ())


def unpack_checkpoint_(checkpoint: dict[str, Any], path: Any = 'the checkpoint') -> None:
    """Replace a packed state dict by the float one, in place; other checkpoints stay.

    Args:
        checkpoint: Loaded checkpoint.
        path: Its file, for messages.

    Raises:
        ValueError: If the content is truncated, was changed, or has another version.
    """
    if not is_packed(checkpoint):
        return
    state = _unpack(checkpoint['state_dict'][PACKED_KEY], path)
    if checkpoint['gplq'][ABOUT].get(_HASH) != _hash_of(checkpoint):
        raise _damaged(path, 'its recipe, config or meta is not the one that was written')
    checkpoint['state_dict'] = state


def unpack_keys(model: nn.Module, state_dict: dict[str, Any], prefix: str = '', *args: Any) -> None:
    """Load pre-hook of a model: replace a packed state dict by the float one, in place.

    For callers of ``load_state_dict`` that read files themselves: mmdet's ``init_detector`` and
    ``DetInferencer``, mmpretrain's ``get_model`` and inferencers, MMEngine's runner.

    Args:
        model: Converted model.
        state_dict: State dict to load.
        prefix: Prefix of the model's keys.
        *args: Further arguments of a pre-hook, unused.

    Raises:
        ValueError: See ``unpack_checkpoint_``.
    """
    content = state_dict.pop(prefix + PACKED_KEY, None)
    if content is not None:
        state = _unpack(content, 'the checkpoint')
        state_dict.update({prefix + key: value for key, value in state.items()})


def to_safetensors(checkpoint: Mapping[str, Any]) -> Tensor:
    """The bytes of the ``.safetensors`` file of a checkpoint, packed or not.

    Args:
        checkpoint: Entries of plain values, and tensors under ``state_dict``.

    Raises:
        ValueError: If an entry has more than plain values.
    """
    about = plain_values({k: v for k, v in checkpoint.items() if k != 'state_dict'})
    tensors, metadata = checkpoint['state_dict'], {'format': 'pt'}
    if is_packed(checkpoint):
        tensors, metadata = decode_tensors(tensors[PACKED_KEY])
    return encode_tensors(tensors, {**metadata, _CHECKPOINT: repr(about)})


def from_safetensors(content: Tensor, path: Any = 'the file') -> dict[str, Any]:
    """The checkpoint of a ``.safetensors`` file.

    Args:
        content: The file's bytes, uint8, ``(bytes,)``.
        path: The file, for messages.

    Returns:
        The entries of the checkpoint, with the float state dict; a file that this package did not
        write gives its tensors under ``state_dict``.

    Raises:
        ValueError: If the content is truncated, was changed, is no such file, or has another
            version.
    """
    try:
        tensors, metadata = decode_tensors(content)
        about = ast.literal_eval(metadata.get(_CHECKPOINT, '{}'))
        return {**about, 'state_dict': restore_state(tensors) if INDEX in tensors else tensors}
    except (ValueError, SyntaxError) as error:
        raise ValueError(
            f'{path} cannot be read: {error}; write or download the file again'
        ) from error


def plain_values(value: Any, where: str = 'checkpoint') -> Any:
    """A copy with plain types only, which a Python literal can hold.

    Subclasses of dict, list and str become these; arrays and tensors become lists, or numbers if
    they have one value.

    Args:
        value: Value of a checkpoint's meta.
        where: Its place, for messages.

    Raises:
        ValueError: If a value has another type; the message names it.

    Examples:
        >>> plain_values({'classes': ('a', 'b'), 'mean': torch.ones(2)})
        {'classes': ('a', 'b'), 'mean': [1.0, 1.0]}
    """
    if isinstance(value, Mapping):
        return {plain_values(k, where): plain_values(v, f'{where}.{k}') for k, v in value.items()}
    if isinstance(value, list | tuple):
        items = [plain_values(v, f'{where}[{i}]') for i, v in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    kinds: tuple[type, ...] = (bool, int, float, str, bytes)
    for kind in kinds:
        if isinstance(value, kind):
            return kind(value)
    if value is None:
        return None
    if hasattr(value, 'tolist'):
        return plain_values(value.tolist(), where)
    raise ValueError(
        f'{where} is a {type(value).__name__}, which a packed file cannot hold; remove it from '
        "the checkpoint's meta, or make it a string"
    )


def _unpack(content: Tensor, path: Any) -> dict[str, Tensor]:
    try:
        return restore_state(decode_tensors(content.cpu())[0])
    except ValueError as error:
        raise _damaged(path, error) from error


def _damaged(path: Any, reason: Any) -> ValueError:
    return ValueError(
        f'{path}: the packed weights cannot be used: {reason}; write the file again with '
        'tools/deploy.py'
    )


def _description(packed: PackedState, fp16: bool) -> dict[str, Any]:
    return {
        'format': FORMAT_VERSION,
        'gplq_mm': __version__,
        'torch': str(torch.__version__),
        'float_dtype': 'float16' if fp16 else 'float32',
        'equals_unpacked': not fp16,
        'float_weights': list(packed.unpacked),
        'kept_float32': list(packed.full_precision),
    }


def _hash_of(checkpoint: Mapping[str, Any]) -> str:
    """SHA-256 of all but the state dict and the hash itself."""
    about = {k: v for k, v in checkpoint.items() if k != 'state_dict'}
    gplq = about['gplq']
    described = {k: v for k, v in gplq[ABOUT].items() if k != _HASH}
    return sha256_of(repr({**about, 'gplq': {**gplq, ABOUT: described}}).encode())
