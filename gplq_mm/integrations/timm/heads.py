# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Feed-forward networks, and the layers that compute the class scores."""

from typing import Any

from timm.layers import ClassifierHead, Mlp
from timm.models import beit, eva, vision_transformer
from torch import Tensor

from ...convert import Context, register_ffn, register_roles, set_predictor_roles
from ...ops.feed_forward import FeedForward

PREDICTORS = r'^(head|head_dist|fc)$'
"""``VisionTransformer.head``, DeiT's ``head_dist``, ``ClassifierHead.fc``."""


class QuantMlp(FeedForward, Mlp):
    """``Mlp`` as one operator, if the engine fuses it."""

    def forward(self, x: Tensor) -> Tensor:
        """``(..., C)`` -> same."""
        out = self.recomputed(x, self.fc1, self.act, (self.drop1, self.norm), self.fc2)
        return super().forward(x) if out is None else self.drop2(out)


register_ffn(Mlp, QuantMlp)


@register_roles(vision_transformer.VisionTransformer, beit.Beit, eva.Eva, ClassifierHead)
def give_predictor_roles(module: Any, name: str, context: Context) -> None:
    """Set ``predictor`` for the layers that compute the class scores."""
    set_predictor_roles(module, name, context, PREDICTORS)
