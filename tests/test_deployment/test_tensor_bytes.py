# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""The bytes are those of the safetensors library; damage is noticed."""

import pytest
import torch
from torch import Tensor

from gplq_mm.deployment.tensor_bytes import DTYPES, decode_tensors, encode_tensors, sha256_of

TENSORS = {
    **{f'of {name}': torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in DTYPES.items()},
    'scalar': torch.tensor(0.1),
    'empty': torch.zeros(3, 0),
    'transposed': torch.arange(6.0).reshape(2, 3).t(),
}
CONTENT = encode_tensors(TENSORS, {'text': 'a "quoted" line\n'})


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


def test_round_trip() -> None:
    tensors, metadata = decode_tensors(CONTENT)
    assert same(tensors, TENSORS)
    assert metadata == {'text': 'a "quoted" line\n'}


def test_no_tensor_at_all() -> None:
    assert decode_tensors(encode_tensors({}, {'a': 'b'})) == ({}, {'a': 'b'})


def test_the_library_reads_our_bytes_and_we_read_its() -> None:
    library = pytest.importorskip('safetensors.torch')
    assert same(library.load(CONTENT.numpy().tobytes()), TENSORS)
    contiguous = {k: v.contiguous() for k, v in TENSORS.items()}
    theirs = torch.frombuffer(bytearray(library.save(contiguous, {'x': 'y'})), dtype=torch.uint8)
    tensors, metadata = decode_tensors(theirs)
    assert same(tensors, TENSORS)
    assert metadata == {'x': 'y'}


@pytest.mark.parametrize('length', [0, 5, 8, 100, CONTENT.numel() - 1])
def test_a_truncated_file_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match='truncated'):
        decode_tensors(CONTENT[:length])


@pytest.mark.parametrize('place', [CONTENT.numel() - 1, CONTENT.numel() - 60])
def test_a_changed_byte_is_noticed(place: int) -> None:
    changed = CONTENT.clone()
    changed[place] ^= 1
    with pytest.raises(ValueError, match='checksum'):
        decode_tensors(changed)


def test_changed_metadata_is_noticed() -> None:
    text = CONTENT.numpy().tobytes().replace(b'quoted', b'QUOTED')
    with pytest.raises(ValueError, match='checksum'):
        decode_tensors(torch.frombuffer(bytearray(text), dtype=torch.uint8))


@pytest.mark.parametrize(
    ('header', 'message'),
    [
        (b'[]', 'a list, not an object'),
        (b'{"a":', 'no JSON'),
        (b'{"a":{"dtype":"F8","shape":[1],"data_offsets":[0,1]}}', 'describes a as'),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1]}}', '1 bytes, its shape takes 4'),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[-1,0]}}', 'its header gives a'),
        (b'{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}', 'describes 9'),
    ],
)
def test_a_wrong_header_is_refused(header: bytes, message: str) -> None:
    content = bytearray(len(header).to_bytes(8, 'little') + header)
    with pytest.raises(ValueError, match=message):
        decode_tensors(torch.frombuffer(content, dtype=torch.uint8))


def test_a_dtype_without_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r'a has dtype torch.complex64; convert it'):
        encode_tensors({'a': torch.zeros(1, dtype=torch.complex64)}, {})


def test_sha256() -> None:
    assert sha256_of(b'a', b'bc') == sha256_of(b'abc')
