# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""A finished model's state dict in few bytes, and back.

Weights become packed codes. Constant tensors and few integers go into an index, vectors are joined,
integers in float tensors become bytes, a tensor with two names is stored once;
``docs/deployment.md`` describes the bytes.
"""

import json
import math
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..convert import quantizers, state_keys
from ..ops import QuantizedLayer
from .packed_weights import WeightForm, finished_layers, pack_weight
from .tensor_bytes import DTYPES, NAMES, decode_tensors, encode_tensors

FORMAT_VERSION = 1
INDEX = 'gplq_packed.index'
"""Name of the index among the tensors: JSON text, compressed by zlib, as uint8."""
GATHERED = 'gplq_packed.'
"""Begin of the names of tensors that hold many vectors, one tensor per dtype: ``...F32``."""
_INLINE = 16
"""Most elements of an integer tensor in the index."""
_VECTOR = 4096
"""Most elements of a gathered tensor; larger ones keep their own name in the file."""


@dataclass
class PackedState:
    """Content of a packed file, before it is bytes.

    Attributes:
        tensors: By name: packed codes under the weight's name, and what stays a tensor.
        index: How the state dict follows from them, plain data.
        unpacked: Layers whose weight is stored as it is: its codes do not restore it.
        full_precision: Float tensors that ``fp16`` left in float32: float16 cannot hold them.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    index: dict[str, Any] = field(default_factory=dict)
    unpacked: list[str] = field(default_factory=list)
    full_precision: list[str] = field(default_factory=list)

    def to_bytes(self, metadata: Mapping[str, str]) -> Tensor:
        """The file's bytes, in the layout of ``.safetensors``."""
        text = json.dumps(self.index, separators=(',', ':')).encode()
        index = torch.frombuffer(bytearray(zlib.compress(text, 9)), dtype=torch.uint8)
        return encode_tensors({**self.tensors, INDEX: index}, metadata)


class _Index:
    """Tables of the index while it is filled."""

    def __init__(self) -> None:
        self.weights: dict[str, Any] = {}
        self.parts: dict[str, list[Any]] = {}
        self.aliases: dict[str, str] = {}
        self.casts: dict[str, list[str]] = {}
        self.vectors: dict[str, list[Any]] = {}
        self.values: list[Any] = []
        self.inline: dict[str, dict[str, int]] = {}
        self._known: dict[str, int] = {}

    def put_inline(self, key: str, tensor: Tensor, values: list[Any]) -> None:
        """Store a tensor's values, equal ones once."""
        entry = [NAMES[tensor.dtype], list(tensor.shape), values]
        text = json.dumps(entry)
        if text not in self._known:
            self._known[text] = len(self.values)
            self.values.append(entry)
        owner, _, leaf = key.rpartition('.')
        self.inline.setdefault(owner, {})[leaf] = self._known[text]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            'version': FORMAT_VERSION,
            'weights': self.weights,
            'parts': self.parts,
            'aliases': self.aliases,
            'casts': self.casts,
            'vectors': self.vectors,
            'values': self.values,
            'inline': self.inline,
        }


@torch.no_grad()
def pack_state(model: nn.Module, fp16: bool = False) -> PackedState:
    """Pack a converted model's state dict.

    Args:
        model: Model after stage 2; layers with float weights are allowed and stay float.
        fp16: Store float tensors outside the quantizers in float16. The loaded model then has
            rounded biases, norms and float layers, and other outputs.

    Returns:
        What is to be written. Without ``fp16``, ``unpack_state`` gives the model's state dict bit
        for bit, but for the sign of zeros in packed weights and zero points, which no code has.
    """
    packed, index = PackedState(), _Index()
    state, index.aliases = _without_aliases(model.state_dict())
    for key, parts in _layers_by_tensor(model, state).items():
        results = {name: pack_weight(layer) for name, layer in parts.items()}
        done = {name: result for name, result in results.items() if result is not None}
        packed.unpacked += [name for name in results if name not in done]
        if len(done) < len(results) or not _covers(parts, state[key]):
            continue
        shape = list(state.pop(key).shape)
        if list(parts) != [key.removesuffix('.weight')]:
            index.parts[key] = [shape, list(parts)]
        for name, (form, codes) in done.items():
            packed.tensors[f'{name}.weight'] = codes
            index.weights[name] = form.as_dict()
    keys = state_keys(model)
    of_quantizers = {
        keys[f'{name}.{leaf}'] for name, q in quantizers(model).items() for leaf in q.state_dict()
    }
    for key, value in state.items():
        tensor = value.detach().cpu()
        values = _inline_values(tensor)
        if values is not None:
            index.put_inline(key, tensor, values)
            continue
        if key in of_quantizers:
            small = _as_integers(tensor) if key.endswith('.zero_point') else tensor
        else:
            small = _as_half(tensor) if fp16 else tensor
            if fp16 and tensor.dtype == torch.float32 and small is tensor:
                packed.full_precision.append(key)
        packed.tensors[key] = small
        if small.dtype != tensor.dtype:
            index.casts.setdefault(NAMES[tensor.dtype], []).append(key)
    of_codes = {f'{name}.weight' for name in index.weights}
    index.vectors = _gather_(packed.tensors, of_codes)
    packed.index = index.as_dict()
    return packed


def unpack_state(content: Tensor) -> dict[str, Tensor]:
    """The state dict of packed bytes.

    Args:
        content: Of ``PackedState.to_bytes``, ``(bytes,)``.

    Raises:
        ValueError: If the content is damaged, or of another version.
    """
    tensors, _ = decode_tensors(content)
    return restore_state(tensors)


def restore_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a packed file's tensors.

    Args:
        tensors: Tensors of the file, with ``INDEX``.

    Raises:
        ValueError: If the index is of another version, or does not fit the tensors.
    """
    state = dict(tensors)
    index = _read_index(state.pop(INDEX, None))
    if index.get('version') != FORMAT_VERSION:
        raise ValueError(
            f'it has format {index.get("version")!r}, this gplq_mm reads format {FORMAT_VERSION}; '
            'install the version of gplq_mm that wrote it'
        )
    try:
        return _restore(state, index)
    except (KeyError, IndexError, TypeError, RuntimeError) as error:
        raise ValueError(f'its index does not fit its tensors: {error!r}') from error


def _read_index(content: Tensor | None) -> dict[str, Any]:
    if content is None:
        raise ValueError(f'it has no {INDEX}')
    try:
        return dict(json.loads(zlib.decompress(content.numpy().tobytes())))
    except (ValueError, TypeError, zlib.error) as error:
        raise ValueError(f'its index cannot be read: {error}') from error


def _restore(state: dict[str, Tensor], index: Mapping[str, Any]) -> dict[str, Tensor]:
    for dtype, entries in index['vectors'].items():
        parts = state.pop(GATHERED + dtype).split([math.prod(shape) for _, shape in entries])
        for (key, shape), part in zip(entries, parts, strict=True):
            state[key] = part.view(shape).clone()
    for dtype, keys in index['casts'].items():
        state.update({key: state[key].to(DTYPES[dtype]) for key in keys})
    inline = [(o, leaf, i) for o, leaves in index['inline'].items() for leaf, i in leaves.items()]
    for owner, leaf, number in inline:
        dtype, shape, values = index['values'][number]
        tensor = torch.tensor(values, dtype=DTYPES[dtype])
        state[f'{owner}.{leaf}' if owner else leaf] = (
            tensor.view([1] * len(shape)).expand(shape).clone()
            if len(values) == 1
            else tensor.view(shape)
        )
    aliases = index['aliases'].items()
    state.update({alias: state[key] for alias, key in aliases})  # a layer may need one
    for name, data in index['weights'].items():
        form = WeightForm(**data)
        scale, zero = (state[f'{name}.weight_quantizer.{k}'] for k in ('scale', 'zero_point'))
        folded = state[f'{name}.input_quantizer.scale'] if form.fold_shape else None
        state[f'{name}.weight'] = form.restore(state[f'{name}.weight'], scale, zero, folded)
    for key, (shape, names) in index['parts'].items():
        flat = [state.pop(f'{name}.weight').reshape(-1) for name in names]
        state[key] = torch.cat(flat).view(shape)
    state.update({alias: state[key] for alias, key in aliases})
    return state


def _layers_by_tensor(
    model: nn.Module, state: Mapping[str, Tensor]
) -> dict[str, dict[str, QuantizedLayer]]:
    """Finished layers by the tensor of the state dict that holds their weight, in its order.

    A layer's name is here that of its keys in the state dict, see ``state_keys``.
    A layer may own its weight or be a part of one: the projections of ``nn.MultiheadAttention``
    are slices of ``in_proj_weight``. Of layers with the same weight the first is taken.
    """
    found: dict[str, dict[int, tuple[str, QuantizedLayer]]] = {}
    stored, scale = state_keys(model), '.weight_quantizer.scale'
    for module, layer in finished_layers(model).items():
        name = stored[module + scale].removesuffix(scale)
        own, place = f'{name}.weight', layer.weight.data_ptr()
        keys = [own] if own in state else state
        key = next((k for k in keys if _holds(state[k], layer.weight)), None)
        if key is not None:
            found.setdefault(key, {}).setdefault(place, (name, layer))
    return {key: dict(layers[place] for place in sorted(layers)) for key, layers in found.items()}


def _holds(tensor: Tensor, part: Tensor) -> bool:
    """Whether a tensor's memory includes that of another one, both in row-major order."""
    start = part.data_ptr() - tensor.data_ptr()
    end = start + part.numel() * part.element_size()
    is_inside = start >= 0 and end <= tensor.numel() * tensor.element_size()
    same_kind = tensor.dtype == part.dtype and tensor.device == part.device
    return is_inside and same_kind and tensor.is_contiguous() and part.is_contiguous()


def _covers(parts: Mapping[str, QuantizedLayer], tensor: Tensor) -> bool:
    """Whether the weights of layers, one after another, are all of a tensor."""
    return sum(layer.weight.numel() for layer in parts.values()) == tensor.numel()


def _gather_(tensors: dict[str, Tensor], kept: Collection[str]) -> dict[str, list[Any]]:
    """Join the small tensors of each dtype, in place: an entry of the header is as large as many.

    Args:
        tensors: By name.
        kept: Names of tensors that are not joined.

    Returns:
        Names and shapes of the joined tensors, in order, by the dtype's name.
    """
    small = [k for k, t in tensors.items() if k not in kept and t.numel() <= _VECTOR]
    found: dict[str, list[Any]] = {}
    parts: dict[str, list[Tensor]] = {}
    for key in small:
        tensor = tensors.pop(key)
        dtype = NAMES[tensor.dtype]
        found.setdefault(dtype, []).append([key, list(tensor.shape)])
        parts.setdefault(dtype, []).append(tensor.reshape(-1))
    tensors.update({GATHERED + dtype: torch.cat(flat) for dtype, flat in parts.items()})
    return found


def _without_aliases(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state without further names of the same memory, and these names."""
    first: dict[tuple, str] = {}
    kept, aliases = {}, {}
    for key, tensor in state.items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        known = first.setdefault(place, key) if tensor.numel() else key
        if known == key:
            kept[key] = tensor
        else:
            aliases[key] = known
    return kept, aliases


def _inline_values(tensor: Tensor) -> list[Any] | None:
    """Values for the index, one for a constant tensor; None if the tensor is not small."""
    flat = tensor.reshape(-1)
    if not flat.numel():
        return []
    if _bits(flat).eq(_bits(flat[:1])).all() and (
        not flat.is_floating_point() or flat[:1].isfinite().all()
    ):
        return flat[:1].tolist()
    is_small = flat.numel() <= _INLINE and not flat.is_floating_point()
    return flat.tolist() if is_small else None


def _as_integers(tensor: Tensor) -> Tensor:
    """A float tensor of small integers as bytes; the tensor itself if it holds other values."""
    for dtype in (torch.int8, torch.uint8):
        limits = torch.iinfo(dtype)
        if tensor.min() >= limits.min and tensor.max() <= limits.max:
            small = tensor.to(dtype)
            if torch.equal(small.to(tensor.dtype), tensor):  # a zero loses its sign
                return small
    return tensor


def _as_half(tensor: Tensor) -> Tensor:
    """A float32 tensor in float16; the tensor itself if it has another dtype or overflows."""
    if tensor.dtype != torch.float32:
        return tensor
    half = tensor.half()
    return half if torch.equal(half.isfinite(), tensor.isfinite()) else tensor


def _bits(tensor: Tensor) -> Tensor:
    """The memory of a tensor, as integers of the same size, to compare it bit for bit."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    is_float = tensor.is_floating_point()
    return tensor.view(kinds[tensor.element_size()]) if is_float else tensor
