# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Check of the required libraries: installed, compatible, or the command that fixes them.

Libraries are found by import and by feature, not by distribution name: `mmcv` may come from
`mmcv`, `mmcv-full` or a source tree, and only `import mmcv.ops` shows whether it has operators.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from types import ModuleType

OK, MISSING, CLASHES = 'ok', 'missing', 'clashes'

_BUILD_MMCV = 'MMCV_WITH_OPS=1 pip install --no-build-isolation'
_REBUILD_MMCV = f'pip cache remove mmcv; {_BUILD_MMCV} --force-reinstall --no-deps mmcv==2.1.0'
_DISTRIBUTIONS = {'pkg_resources': "'setuptools<81'", 'cv2': 'opencv-python'}
_ASKS_FOR = re.compile(r'[Pp]lease install (\w+)\s*(>=[^,\s]+),\s*(<[\w.]*\w)')


@dataclass(frozen=True)
class Finding:
    """State of one library.

    Attributes:
        name: Import name, or `python`.
        version: Its own version string; empty if it is missing.
        state: `ok`, `missing` or `clashes`.
        why: Reason for the state, or a remark if it is ok.
        mend: Shell command that fixes it; empty if it is ok.
    """

    name: str
    version: str
    state: str
    why: str = ''
    mend: str = ''


@dataclass(frozen=True)
class Component:
    """One library: how to install it and what to test beyond its import.

    Attributes:
        name: Import name.
        install: Shell command that installs a version compatible with the others.
        probe: Called with the imported module; returns a remark, raises if a feature fails.
        repair: Shell command if it is installed and does not work; `install` if empty.
    """

    name: str
    install: str
    probe: Callable[[ModuleType], str] = lambda module: ''
    repair: str = ''


def is_installed(name: str) -> bool:
    """Whether a top-level module can be found, without importing it.

    Args:
        name: Import name, such as `mmdet`.
    """
    return find_spec(name) is not None


def _probe_torch(torch: ModuleType) -> str:
    if not hasattr(torch.nn.functional, 'scaled_dot_product_attention'):
        raise RuntimeError('torch >= 2.0 is needed')
    if not torch.cuda.is_available():
        return 'CUDA: not available'
    return f'CUDA {torch.version.cuda}: {torch.cuda.get_device_name(0)}'


def _probe_torchvision(torchvision: ModuleType) -> str:
    import_module('torchvision.ops')
    return ''


def _probe_numpy(numpy: ModuleType) -> str:
    if is_installed('torch'):  # a torch built for NumPy 1 cannot read arrays of NumPy 2
        import_module('torch').from_numpy(numpy.zeros(1))
    return ''


def _probe_mmcv(mmcv: ModuleType) -> str:
    """Load the compiled operators, and compare their CUDA support with torch's.

    Raises:
        ImportError: There are no operators, or they were built for another torch.
        RuntimeError: torch has a GPU, the operators support the CPU only.
    """
    ops = import_module('mmcv.ops')
    cuda = ops.get_compiling_cuda_version()
    if cuda == 'not available' and import_module('torch').cuda.is_available():
        raise RuntimeError('torch has a GPU, but the operators were built for the CPU only')
    return f'operators: {"CPU" if cuda == "not available" else f"CUDA {cuda}"}'


def _probe_pycocotools(pycocotools: ModuleType) -> str:
    import_module('pycocotools.mask')
    return ''


def _probe_mmdet(mmdet: ModuleType) -> str:
    if not is_installed('mmdet.structures'):
        raise RuntimeError('mmdet >= 3.0 is needed')
    return ''


def _probe_mmpretrain(mmpretrain: ModuleType) -> str:
    if not is_installed('mmpretrain.structures'):
        raise RuntimeError('mmpretrain >= 1.0 is needed')
    if is_installed('transformers'):
        _import_beside_transformers('mmpretrain.models')
    return ''


def _import_beside_transformers(name: str) -> None:
    """Import the models of mmpretrain 1.2: all fail to import if its multimodal models fail.

    Raises:
        RuntimeError: No model of the library can be imported.
    """
    try:
        import_module(name)
    except (ImportError, TypeError) as error:
        version = _distribution_version('transformers')
        raise RuntimeError(
            f'{name} does not import with transformers {version} ({error}). '
            'Please install transformers>=4.28, <4.50.'
        ) from error


def _probe_mmseg(mmseg: ModuleType) -> str:
    if not is_installed('mmseg.structures'):
        raise RuntimeError('mmsegmentation >= 1.0 is needed')
    import_module('mmseg.models')  # ftfy and regex, which mmsegmentation does not require
    return ''


COMPONENTS = (
    Component('torch', 'pip install torch==2.11.0', _probe_torch),
    Component('torchvision', 'pip install torch==2.11.0 torchvision==0.26.0', _probe_torchvision),
    Component('numpy', 'pip install numpy', _probe_numpy),
    Component('mmengine', 'pip install mmengine==0.10.7'),
    Component('mmcv', f'{_BUILD_MMCV} mmcv==2.1.0', _probe_mmcv, _REBUILD_MMCV),
    Component('mmdet', 'pip install mmdet==3.3.0', _probe_mmdet),
    Component('mmpretrain', 'pip install mmpretrain==1.2.0', _probe_mmpretrain),
    Component('mmseg', 'pip install mmsegmentation==1.2.2 ftfy regex', _probe_mmseg),
    Component('pycocotools', 'pip install pycocotools', _probe_pycocotools),
)


def repair_command(message: str, default: str) -> str:
    """The pip command that satisfies an OpenMMLab version assertion.

    Args:
        message: Text of the assertion in `mmdet/__init__.py` or `mmpretrain/__init__.py`.
        default: Command if the text requires no version.

    Returns:
        A shell command.

    Example:
        >>> repair_command('MMEngine==1.0 is used. Please install mmengine>=0.7.1, <1.0.0.', '')
        "pip install 'mmengine>=0.7.1,<1.0.0'"
    """
    found = _ASKS_FOR.search(message)
    if found is None:
        return default
    name, lowest, below = found.groups()
    pip = _BUILD_MMCV if name == 'mmcv' else 'pip install'
    return f"{pip} '{name}{lowest},{below}'"


def inspect_component(component: Component) -> Finding:
    """Import a component, run its probe, and report the result.

    Args:
        component: Entry of `COMPONENTS`.
    """
    name = component.name
    if not is_installed(name):
        return Finding(name, '', MISSING, 'not installed', component.install)
    try:
        module = import_module(name)
        version = str(getattr(module, '__version__', '')) or _distribution_version(name)
        return Finding(name, version, OK, component.probe(module))
    except Exception as error:  # a broken binary can raise anything: OSError, RuntimeError, ...
        text = ' '.join(str(error).split())
        why = f'{type(error).__name__}: {text}'
        return Finding(name, _distribution_version(name), CLASHES, why, _mend(component, error))


def _mend(component: Component, error: Exception) -> str:
    """Choose the shell command for a component that is installed and fails to import."""
    default = component.repair or component.install
    if isinstance(error, ModuleNotFoundError) and error.name:
        root = error.name.split('.')[0]
        if root != component.name:
            installs = {c.name: c.install for c in COMPONENTS}
            return installs.get(root, f'pip install {_DISTRIBUTIONS.get(root, root)}')
    return repair_command(str(error), default)


def _distribution_version(name: str) -> str:
    """Version from the metadata, for a library that fails to import."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ''


def check_versions(*names: str) -> None:
    """Raise an error for versions that do not work together, before a long run.

    Args:
        names: Import names that are required, such as `'mmdet'`. Others are only checked if they
            are installed.

    Raises:
        ValueError: A name is not in `COMPONENTS`.
        ImportError: A required library is missing, or an installed one is incompatible; the message
            has one line for each, with the shell command that fixes it.
    """
    known = [component.name for component in COMPONENTS]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f'cannot check {unknown}; allowed: {known}')
    findings = [inspect_component(component) for component in COMPONENTS]
    bad = [f for f in findings if f.state == CLASHES or (f.state == MISSING and f.name in names)]
    if bad:
        lines = [f'{f.name} {f.version}: {f.why}\n  fix: {f.mend}' for f in bad]
        raise ImportError('the installed libraries do not fit:\n' + '\n'.join(lines))
