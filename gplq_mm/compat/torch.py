# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Undocumented parts of torch that the package uses.

No other file uses a private name of torch; ``tests/test_compat/test_torch.py`` has a test for
each function here, which fails if torch changes.
"""

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd as ConvNd

__all__ = [
    'ConvNd',
    'LoadsState',
    'TensorState',
    'before_load_state_dict',
    'convolution_backward',
    'convolve',
    'has_forward_pre_hooks',
    'has_hooks',
    'learnable_fake_quantize',
    'load_safely_by_default',
    'output_padding',
    'own_tensor',
    'padding_of_input',
    'softmax_backward',
    'softmax_exponential',
    'stop_workers',
    'version_of',
]


class LoadsState(nn.Module):
    """A module with callbacks before and after its part of a state dict is loaded."""

    def before_load(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Called before this module's parameters and buffers are copied.

        Args:
            state_dict: The whole state dict; it may be changed before it is loaded.
            prefix: Prefix of this module's keys.
        """

    def after_load(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Called after this module's parameters and buffers are copied.

        Args:
            state_dict: The whole state dict.
            prefix: Prefix of this module's keys.
        """

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        self.before_load(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.after_load(state_dict, prefix)


def before_load_state_dict(
    module: nn.Module, hook: Callable[..., None], first: bool = False
) -> None:
    """Call ``hook(module, state_dict, prefix, ...)`` before the module's state is loaded.

    The method is public from torch 2.5 on. MMEngine's ``load_checkpoint`` calls the hook too.

    Args:
        module: Any module.
        hook: A function; it may change the state dict, which is a copy.
        first: Call it before the hooks that the module has, which may rename keys.
    """
    if hasattr(module, 'register_load_state_dict_pre_hook'):
        handle = module.register_load_state_dict_pre_hook(hook)
    else:
        handle = module._register_load_state_dict_pre_hook(hook, with_module=True)
    if first:
        hooks = module._load_state_dict_pre_hooks
        hooks.update({key: hooks.pop(key) for key in list(hooks) if key != handle.id})


def load_safely_by_default() -> None:
    """Have ``torch.load`` refuse code in a file unless its caller asks for it, as torch 2.6 does.

    MMEngine does not say how files are loaded; before torch 2.6 their code would run. torch then
    refuses it in the whole process, whatever a caller asks for.
    """
    if _release(torch.__version__) < (2, 6):
        os.environ.setdefault('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '1')


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split('.')[:2])


def version_of(tensor: Tensor) -> int:
    """Number of in-place changes of the memory of a tensor of any shape."""
    return tensor._version


class TensorState:
    """Memory and version of tensors: what has been read from them is valid while they match.

    The tensors are kept alive, so that no other tensor gets their memory.

    Args:
        *tensors: Tensors, or None.
    """

    def __init__(self, *tensors: Tensor | None) -> None:
        self._tensors = tensors
        self._state = self._read(tensors)

    def matches(self, *tensors: Tensor | None) -> bool:
        """Whether these are the tensors, unchanged since."""
        return self._read(tensors) == self._state

    @staticmethod
    def _read(tensors: Sequence[Tensor | None]) -> list[tuple[int, int] | None]:
        return [None if t is None else (t.data_ptr(), t._version) for t in tensors]


def own_tensor(x: Tensor) -> Tensor:
    """``x``, of any shape, as a tensor that is no view: in-place operations may change it."""
    return torch.ops.aten._unsafe_view(x, x.shape) if x._is_view() else x


_EXPONENTIALS = {'AVX2': (8, 'Sleef_expf8_u10'), 'AVX512': (16, 'Sleef_expf8_u10')}


@functools.cache
def softmax_exponential() -> tuple[int, int] | None:
    """What torch's softmax of float32 on this processor consists of.

    Returns:
        ``(lanes, address)``: floats in a vector of its sums, and the address of the function that
        gives 8 exponentials; None if torch does not say.
    """
    known = _EXPONENTIALS.get(torch.backends.cpu.get_cpu_capability())
    library = Path(torch.__file__).parent / 'lib' / 'libtorch_cpu.so'
    if known is None or not library.is_file():
        return None
    lanes, name = known
    function = getattr(ctypes.CDLL(str(library)), name, None)
    address = None if function is None else ctypes.cast(function, ctypes.c_void_p).value
    return None if address is None else (lanes, address)


def softmax_backward(grad: Tensor, probabilities: Tensor) -> Tensor:
    """Gradient of the logits of a softmax over the last axis.

    Args:
        grad: Gradient of the probabilities, ``(..., N)``.
        probabilities: Output of the softmax, same shape.
    """
    return torch._softmax_backward_data(grad, probabilities, -1, probabilities.dtype)


def convolution_backward(
    layer: Any,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    required: tuple[bool, bool],
    output_padding: list[int],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a convolution's input and weight.

    Args:
        layer: Convolution layer with stride, padding, dilation and groups.
        grad: Gradient of the output, ``(B, C_out, H', W')``.
        x: Input, ``(B, C_in, H, W)``.
        weight: Weight of the forward pass.
        required: Whether the gradient of the input and of the weight is required.
        output_padding: Output padding of a transposed convolution, else zeros.
    """
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        None,
        layer.stride,
        layer.padding,
        layer.dilation,
        layer.transposed,
        output_padding,
        layer.groups,
        [*required, False],
    )
    return grad_x, grad_weight


def convolve(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Output of a convolution, padding mode included, with another weight of the same shape."""
    return layer._conv_forward(x, weight, bias)


def padding_of_input(layer: nn.Conv2d) -> list[int]:
    """``(left, right, top, bottom)`` by which a convolution layer pads its input."""
    return list(layer._reversed_padding_repeated_twice)


def output_padding(
    layer: nn.ConvTranspose2d, x: Tensor, output_size: list[int] | None
) -> list[int]:
    """Output padding that gives the requested output size.

    Args:
        layer: Transposed convolution.
        x: Its input, ``(B, C_in, H, W)``.
        output_size: ``(H', W')``; None for the layer's own padding.
    """
    return layer._output_padding(
        x,
        output_size,
        layer.stride,  # type: ignore[arg-type]
        layer.padding,  # type: ignore[arg-type]
        layer.kernel_size,  # type: ignore[arg-type]
        2,
        layer.dilation,  # type: ignore[arg-type]
    )


def has_forward_pre_hooks(module: nn.Module) -> bool:
    """Whether a module has forward pre-hooks."""
    return bool(module._forward_pre_hooks)


def has_hooks(modules: Sequence[nn.Module]) -> bool:
    """Whether one of the modules has a forward or backward hook."""
    return any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        for module in modules
    )


def stop_workers(dataloader: Any) -> None:
    """Stop persistent workers of a dataloader; its next epoch starts new ones."""
    if getattr(dataloader, '_iterator', None) is not None:
        dataloader._iterator = None


def learnable_fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, grad_factor: float
) -> Tensor:
    """Fake quantization with one learned scale by torch's own operator.

    It is the operator of the learnable fake quantize in ``torch.ao.quantization``.

    Args:
        x: Any shape.
        scale: ``(1,)``.
        zero_point: ``(1,)``.
        qmin: Lowest code.
        qmax: Highest code.
        grad_factor: Factor of the scale's gradient.
    """
    return torch._fake_quantize_learnable_per_tensor_affine(
        x, scale, zero_point, qmin, qmax, grad_factor
    )
