# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""A quantized model and its FP32 counterpart, built from the checkpoint of a GPLQ run."""

import copy
from collections.abc import Mapping
from typing import Any

from mmengine.config import ConfigDict
from mmengine.registry import DefaultScope
from torch import nn

from ....convert import quantizers
from ....recipe.recorded import recorded_recipe
from ....registry import MODELS
from .checkpoint_io import read_checkpoint
from .config_text import parse_config_text
from .run_checkpoint import (
    FINAL_NAME,
    KEY,
    check_quantized,
    file_sha256,
    is_quantized_checkpoint,
    load_float_,
)

_GIVE_FINAL = f'give the {FINAL_NAME} of a GPLQ run'


class QuantizedSource:
    """Checkpoint of a finished GPLQ run, from which models are built.

    Args:
        path: ``gplq_final.pth``.
        model: Config of the model if the checkpoint does not have it: either form of
            ``gplq_mm.GPLQ``, or the float model's.
        edit: Changes made to the float model's config: ``{'backbone': {'drop_path_rate': 0.1}}``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint, is a float one, or has no model config.
    """

    def __init__(
        self,
        path: str,
        model: Mapping[str, Any] | None = None,
        edit: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = str(path)
        self.checkpoint = read_checkpoint(path)
        if not is_quantized_checkpoint(self.checkpoint):
            raise ValueError(f'{path} holds no GPLQ state: it is a float checkpoint; {_GIVE_FINAL}')
        cfg, self.scope = self._config()
        if not (model or cfg):
            raise ValueError(
                f'{path} does not hold the config of its model; give it as model=dict(...)'
            )
        self.float_cfg = ConfigDict(float_model_config(model or cfg))
        _merge(self.float_cfg, edit or {})

    def quantized(self) -> nn.Module:
        """The model with integer weights and calibrated activations, in evaluation mode.

        Raises:
            ValueError: If the checkpoint is uncalibrated, is from before stage 2, or does not fit
                the model.
        """
        own = recorded_recipe(self.checkpoint[KEY]['recipe'])
        recipe = {**own, 'mimic': None, 'optim': {**own['optim'], 'drop_rates': 'keep'}}
        cfg = {'type': 'gplq_mm.GPLQ', 'model': self.float_cfg, 'recipe': recipe}
        model = self._build(cfg)
        check_quantized(model, self.checkpoint)
        model.load_state_dict(self.checkpoint['state_dict'])
        open_weights = [n for n, q in quantizers(model, 'weight').items() if not q.is_calibrated]
        if open_weights:
            raise ValueError(
                f'{self.path}: {len(open_weights)} weights are float, first {open_weights[0]} '
                f'(stage {self.checkpoint[KEY]["stage"]!r}); {_GIVE_FINAL}'
            )
        model.eval()
        return model

    def float_twin(self, path: str | None = None) -> nn.Module:
        """The FP32 model that the run began with, in evaluation mode.

        Args:
            path: Its checkpoint; the recorded one if None.

        Raises:
            ValueError: If the file does not exist, differs from the recorded one, or does not fit.
        """
        model = self._build(self.float_cfg)
        load_float_(model, read_checkpoint(path or self._recorded_float()))
        model.eval()
        return model

    def _recorded_float(self) -> str:
        source = self.checkpoint[KEY]['float_checkpoint']
        if source.get('sha256') and file_sha256(source['path']) != source['sha256']:
            raise ValueError(
                f'{source["path"]}, the FP32 checkpoint of {self.path}, does not exist or has '
                'changed; give it with fp32_checkpoint (tools/transfer.py: --fp32 PATH)'
            )
        if not source.get('path'):
            raise ValueError(f'{self.path} does not say which FP32 checkpoint it began with')
        return str(source['path'])

    def _build(self, cfg: Mapping[str, Any]) -> nn.Module:
        with DefaultScope.overwrite_default_scope(self.scope):
            return MODELS.build(copy.deepcopy(ConfigDict(cfg)))

    def _config(self) -> tuple[dict[str, Any], str]:
        """Model config and default scope that MMEngine's runner stored in the checkpoint."""
        text = self.checkpoint.get('meta', {}).get('cfg')
        values = parse_config_text(text) if text else {}
        cfg = dict(values.get('model') or {})
        if cfg and values.get('data_preprocessor'):
            cfg.setdefault('data_preprocessor', values['data_preprocessor'])
        return cfg, values.get('default_scope', 'mmpretrain')


def float_model_config(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The float model's config from any form of a GPLQ config; a float config is returned as is.

    Examples:
        >>> float_model_config(dict(type='gplq_mm.GPLQ', float_type='A', recipe='w4a4', head=None))
        {'type': 'A', 'head': None}
    """
    own = {k: v for k, v in cfg.items() if k not in ('recipe', 'strict')}
    if own.get('type') not in ('gplq_mm.GPLQ', 'GPLQ'):
        return own
    if 'model' in own:
        beside = {k: v for k, v in own.items() if k == 'data_preprocessor'}
        return {**beside, **own['model']}
    own['type'] = own.pop('float_type')
    return own


def _merge(cfg: dict[str, Any], edit: Mapping[str, Any]) -> None:
    for key, value in edit.items():
        if isinstance(value, Mapping) and isinstance(cfg.get(key), dict):
            _merge(cfg[key], value)
        else:
            cfg[key] = value
