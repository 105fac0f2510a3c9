# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""GPTQ of single layers of a stage-1 model, at any bits, from one pass over the images."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from ..ops import QuantizedLayer
from ..stream import Call, CallStore, UnitStream, find_units
from ..stream.passes import RunPass
from .algorithms import PTQConfig, build_weight_ptq
from .layer_matrix import CodeProducts
from .rounding.gptq import GPTQ
from .task import ROUNDS, PTQTask, WeightPTQ
from .unit_ptq import round_to_nearest


class SingleLayerGPTQ(WeightPTQ):
    """GPTQ on the inputs that each layer has in the stage-1 model, all other weights float.

    The products of the input codes do not depend on the weight's bits. They are summed once
    and stored in memory up to a budget, the rest on disk. A layer that is not a matrix
    product, or that no image reaches, is rounded to nearest with an ``mse`` range.

    Args:
        gptq: The algorithm with its options.
        model: Converted model in evaluation mode, activations quantized, weights float.
        layers: Layers that may be quantized later, by name.
        run_pass: Runs the model over this rank's images.
        budget_bytes: Bytes of products kept in memory.
        folder: Folder for the rest; the system's temporary folder if None.
    """

    name: ClassVar[str] = GPTQ.name

    def __init__(
        self,
        gptq: GPTQ,
        model: nn.Module,
        layers: Mapping[str, QuantizedLayer],
        run_pass: RunPass,
        budget_bytes: int = 1 << 27,
        folder: str | None = None,
    ) -> None:
        self.gptq = gptq
        self._kept = CallStore(budget_bytes, folder)
        self._products: dict[str, tuple[int, CodeProducts]] = {}
        weights = {n: nn.Parameter(la.weight.detach(), False) for n, la in layers.items()}
        task = PTQTask(model, layers, weights, run_pass)
        units = find_units(model, layers, run_pass)
        stream = UnitStream(model, units, run_pass, None, budget_bytes, folder)
        for index, unit in enumerate(units):
            inputs = stream.inputs(index)
            for name in filter(lambda n: layers[n].is_matrix_product, unit.layers):
                products, _ = gptq.products(task, unit, name, inputs, None)
                self._products[name] = (len(self._kept), products.with_sums([]))
                self._kept.append(Call(tuple(products.sums)))

    @torch.no_grad()
    def apply(self, task: PTQTask) -> None:
        """Quantize each layer independently."""
        for name, layer in task.layers.items():
            layer.weight_quantizer.reset()
            if name not in self._products:
                round_to_nearest(task, name)
                continue
            position, products = self._products[name]
            sums = [t.to(layer.weight.device) for t in self._kept[position].args]
            self.gptq.quantize_layer(layer, task.float_weights[name], products.with_sums(sums), [])


def layerwise_rounding(ptq: PTQConfig) -> list[WeightPTQ]:
    """Rounding algorithms of a recipe in a form that quantizes single layers independently.

    Args:
        ptq: As for ``build_weight_ptq``.

    Returns:
        The algorithms that round; if one of them needs images, GPTQ alone, for
        ``SingleLayerGPTQ``.

    Examples:
        >>> [a.name for a in layerwise_rounding(['repq', 'brecq'])]
        ['gptq']
        >>> [a.name for a in layerwise_rounding(['percentile', 'bias_correction'])]
        ['percentile']
    """
    algorithms = [a for a in build_weight_ptq(ptq) if a.phase == ROUNDS]
    if not any(a.needs_data for a in algorithms):
        return algorithms
    return [next((a for a in algorithms if isinstance(a, GPTQ)), GPTQ())]
