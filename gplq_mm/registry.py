# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Child registries of MMEngine's, so that `type='gplq_mm.X'` works in any config.

MMEngine imports ``gplq_mm.registry`` automatically when a config names the scope
``gplq_mm``, and each registry then imports its ``locations``; no
``custom_imports`` line is needed.
"""

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import LOOPS as MMENGINE_LOOPS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_CONSTRUCTORS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import Registry

MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    scope='gplq_mm',
    locations=[
        'gplq_mm.integrations.mm.builder',
        'gplq_mm.integrations.mm.deployment.deployed_backbone',
        'gplq_mm.integrations.mm.necks',
        'gplq_mm.integrations.mm.studies.probe_model',
    ],
)
HOOKS = Registry(
    'hook', parent=MMENGINE_HOOKS, scope='gplq_mm', locations=['gplq_mm.integrations.mm.hook']
)
LOOPS = Registry(
    'loop',
    parent=MMENGINE_LOOPS,
    scope='gplq_mm',
    locations=['gplq_mm.integrations.mm.resumable_loop'],
)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_CONSTRUCTORS,
    scope='gplq_mm',
    locations=['gplq_mm.integrations.mm.optim'],
)
OPTIM_WRAPPERS = Registry(
    'optim_wrapper',
    parent=MMENGINE_OPTIM_WRAPPERS,
    scope='gplq_mm',
    locations=['gplq_mm.integrations.mm.cpu_amp'],
)
