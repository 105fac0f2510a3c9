# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""One line for errors that other libraries raise for the user's files, disk, network or names."""

import errno
import re
import traceback
from types import FrameType

_DISK = {
    errno.ENOSPC: 'free some space',
    errno.EDQUOT: 'free some of your quota',
    errno.EROFS: 'write to another folder',
    errno.EACCES: 'change its permissions, or give another path',
    errno.EPERM: 'change its permissions, or give another path',
    errno.EFBIG: 'raise the largest size of a file (ulimit -f)',
}
"""Errors of the operating system that a user removes, and how."""
_TORCH_WRITES = re.compile(r'PytorchStreamWriter failed writing|inline_container.*unexpected pos')
_LOADS = re.compile(r'load_from_\w+')
_AGAIN = 'then start the same command again, a training with --resume'


def explain_library_error(error: BaseException) -> str | None:
    """Explain an error that this package did not raise.

    Args:
        error: What a tool raised.

    Returns:
        The explanation, which contains the error's own words; None for an error of another kind,
        whose traceback says more.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for explain in (_of_checkpoint, _of_disk, _of_registry, _of_image, _of_folder):
        line = explain(error, frames)
        if line is not None:
            return ' '.join(line.split())
    return None


def _of_disk(error: BaseException, frames: list[FrameType]) -> str | None:
    """A full or read-only disk, a missing permission."""
    if isinstance(error, OSError) and error.errno in _DISK:
        place = f' {error.filename}' if error.filename else ''
        return f'cannot write or read{place}: {error.strerror}; {_DISK[error.errno]}, {_AGAIN}'
    if isinstance(error, RuntimeError) and _TORCH_WRITES.search(str(error)):
        return f'torch cannot write a file ({error}); is the disk full? Free some space, {_AGAIN}'
    return None


def _of_checkpoint(error: BaseException, frames: list[FrameType]) -> str | None:
    """A checkpoint that MMEngine cannot load: of no zoo, of a server that does not answer."""
    of = [f for f in frames if _LOADS.fullmatch(f.f_code.co_name) and 'filename' in f.f_locals]
    if not of or not isinstance(error, OSError | KeyError | ImportError):
        return None
    return (
        f'the checkpoint {of[0].f_locals["filename"]} cannot be loaded: {type(error).__name__}: '
        f'{error}; put the file on this machine and give its path'
    )


def _of_registry(error: BaseException, frames: list[FrameType]) -> str | None:
    """A type that no library registers."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else ''
    if ' is not in the ' not in text or not any(_is_of_mmengine(frame) for frame in frames[-2:]):
        return None
    return text.partition(' More details')[0]


def _is_of_mmengine(frame: FrameType) -> bool:
    return str(frame.f_globals.get('__name__')).startswith('mmengine.registry')


def _of_image(error: BaseException, frames: list[FrameType]) -> str | None:
    """An image that cannot be decoded, or that lacks the annotation that a transform loads."""
    words = _last_line(error)
    named = re.search(r'failed to load image: (.+)', words)
    if named and isinstance(error, AssertionError):
        return (
            f'the image {named[1]} cannot be decoded: it is damaged or of an unknown format; '
            'replace it, or take it out of the annotations'
        )
    if isinstance(error, KeyError) and words.endswith("'mask'") and _loads_annotations(error):
        return (
            "an image's annotations have no masks (segmentation), and LoadAnnotations of the "
            'pipeline asks for them; train a model with boxes only, with_mask=False, or annotate '
            'masks'
        )
    return None


def _of_folder(error: BaseException, frames: list[FrameType]) -> str | None:
    """A folder of class folders without images."""
    if isinstance(error, RuntimeError) and str(error).startswith('Found 0 files in subfolders'):
        return f'a data set has no images: {error} Check data_root, data_prefix and ann_file.'
    return None


def _loads_annotations(error: BaseException) -> bool:
    names = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    return '_process_masks' in names or '_process_masks' in str(error)


def _last_line(error: BaseException) -> str:
    """An error's text; of a dataloader's worker the last line, which is the error's own."""
    text = str(error)
    return text.strip().splitlines()[-1] if 'DataLoader worker' in text else text
