# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Named tensors as the bytes of a ``.safetensors`` file, with a checksum, in torch alone.

Layout (https://github.com/huggingface/safetensors, "Format"): the length of the header as a
little-endian 64-bit integer; the header, a JSON object that gives dtype, shape and byte range of
each tensor and text under ``__metadata__``, padded with spaces; the tensors' bytes, little-endian,
row-major, without gaps.
"""

import hashlib
import json
import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    'F64': torch.float64,
    'F32': torch.float32,
    'F16': torch.float16,
    'BF16': torch.bfloat16,
    'I64': torch.int64,
    'I32': torch.int32,
    'I16': torch.int16,
    'I8': torch.int8,
    'U8': torch.uint8,
    'BOOL': torch.bool,
}
"""Names of the dtypes in the header."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ITEM_BYTES = {name: torch.empty(0, dtype=dtype).element_size() for name, dtype in DTYPES.items()}
CHECKSUM = 'sha256'
"""Metadata key of the checksum: SHA-256 of the header without this key, then of the data."""
_METADATA = '__metadata__'
_MOST_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


def encode_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Tensor:
    """The bytes of a file.

    Args:
        tensors: By name, on the CPU; not views of one another.
        metadata: Text by name; a checksum is added.

    Returns:
        uint8, one-dimensional.

    Raises:
        ValueError: If a dtype is not in ``DTYPES``.

    Examples:
        >>> data = encode_tensors({'a': torch.ones(2)}, {'by': 'me'})
        >>> decode_tensors(data)[0]
        {'a': tensor([1., 1.])}
    """
    _require_little_endian()
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    parts, end = [], 0
    for name in sorted(tensors, key=lambda n: (-tensors[n].element_size(), n)):
        tensor = tensors[name]
        if tensor.dtype not in NAMES:
            raise ValueError(
                f'{name} has dtype {tensor.dtype}; convert it to one of '
                f'{", ".join(map(str, NAMES))}'
            )
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            'dtype': NAMES[tensor.dtype],
            'shape': list(tensor.shape),
            'data_offsets': [start, end],
        }
        parts.append(tensor.detach().contiguous().view(-1).view(torch.uint8))
    data = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.uint8)
    header[_METADATA][CHECKSUM] = _checksum(header, data)
    text = _canonical(header)
    text += b' ' * (-len(text) % 8)
    return torch.cat([_from_bytes(len(text).to_bytes(8, 'little') + text), data])


def decode_tensors(content: Tensor) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Inverse of ``encode_tensors``.

    Args:
        content: uint8, ``(bytes,)``: a file of this project or of the safetensors library.

    Returns:
        The tensors, and the metadata without the checksum.

    Raises:
        ValueError: If the content is truncated, is no such file, or does not have its checksum;
            a file without checksum is accepted.
    """
    _require_little_endian()
    header, data = _split(content)
    metadata = dict(header.pop(_METADATA, {}))
    expected = metadata.pop(CHECKSUM, None)
    if expected is not None and expected != _checksum({_METADATA: metadata, **header}, data):
        raise ValueError('the content does not have the checksum that was written with it')
    return {name: _tensor(name, entry, data) for name, entry in header.items()}, metadata


def sha256_of(*parts: Any) -> str:
    """SHA-256 of bytes-like parts one after another, in hexadecimal digits.

    Examples:
        >>> sha256_of(b'ab', b'c')[:8]
        'ba7816bf'
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _split(content: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Header and data."""
    size = int.from_bytes(_to_bytes(content[:8]), 'little')
    if content.numel() < 8 or size > min(content.numel() - 8, _MOST_HEADER_BYTES):
        raise ValueError(f'it is truncated: it ends after {content.numel()} bytes')
    try:
        header = json.loads(_to_bytes(content[8 : 8 + size]))
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError
        raise ValueError(f'its header is no JSON: {error}') from error
    if not isinstance(header, dict):
        raise ValueError(f'its header is a {type(header).__name__}, not an object')
    data = content[8 + size :]
    ends = [_range_of(name, header[name])[1] for name in header if name != _METADATA]
    if max(ends, default=0) != data.numel():
        raise ValueError(
            f'it is truncated or damaged: it has {data.numel()} bytes of data, its header '
            f'describes {max(ends, default=0)}'
        )
    return header, data


def _range_of(name: str, entry: Any) -> tuple[int, int]:
    """Byte range of a tensor.

    Raises:
        ValueError: If the entry has another form, or its range another size than its shape.
    """
    try:
        size = math.prod(entry['shape']) * _ITEM_BYTES[entry['dtype']]
        start, end = map(int, entry['data_offsets'])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f'its header describes {name} as {entry!r}') from error
    if start < 0 or end - start != size:
        raise ValueError(f'its header gives {name} {end - start} bytes, its shape takes {size}')
    return start, end


def _tensor(name: str, entry: dict[str, Any], data: Tensor) -> Tensor:
    start, end = _range_of(name, entry)
    own = data[start:end].clone()  # a copy is aligned, a slice need not be
    return own.view(DTYPES[entry['dtype']]).view(entry['shape'])


def _checksum(header: Mapping[str, Any], data: Tensor) -> str:
    return sha256_of(_canonical(header), data.contiguous().numpy())


def _canonical(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, sort_keys=True, separators=(',', ':')).encode()


def _from_bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _to_bytes(content: Tensor) -> bytes:
    return content.contiguous().numpy().tobytes()


def _require_little_endian() -> None:
    if sys.byteorder != 'little':
        raise ValueError('packed files are little-endian; read and write them on such a machine')
