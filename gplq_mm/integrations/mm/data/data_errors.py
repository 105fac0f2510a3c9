# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""One line for an error that a data set's files cause; other errors keep their own words."""

import json
import os
import traceback

from mmengine.dataset import BaseDataset

from ....compat.mmengine import is_empty_data_set


def explain_data_error(error: BaseException) -> str | None:
    """Explain an error of a data set: no images, a damaged annotation file, a missing file.

    Args:
        error: What a tool raised.

    Returns:
        The explanation, which contains the error; None if the error is none of these, such as one
        of a transform.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    owners = [frame.f_locals.get('self') for frame in frames]
    dataset = next((o for o in reversed(owners) if isinstance(o, BaseDataset)), None)
    if dataset is not None and is_empty_data_set(frames[-1]):
        return (
            f'{_name(dataset)} has no images; compare metainfo.classes with the names in the '
            'annotations, and check filter_cfg and indices'
        )
    if dataset is not None and isinstance(error, json.JSONDecodeError):
        return (
            f'{_name(dataset)} is no complete JSON file: {error}; copy or write the annotations '
            'again'
        )
    missing = _missing_file(error)
    if missing and dataset is not None:
        return f'{_name(dataset)} names a file that is not there: {missing}; check data_prefix'
    if missing and isinstance(error, FileNotFoundError) and error.errno is None:
        return f'a data set names a file that is not there: {missing}; check data_prefix'
    return None


def _missing_file(error: BaseException) -> str | None:
    """Text of a missing file's error, raised here or in a worker of a dataloader.

    A worker's error arrives as a new one, whose message ends with the line of the first.
    """
    if not isinstance(error, FileNotFoundError):
        return None
    if error.filename:
        return os.fspath(error.filename)
    lines = str(error).strip().splitlines()
    if not lines or 'DataLoader worker' not in lines[0]:
        return None
    return lines[-1].partition('directory: ')[2].strip("'") or lines[-1]


def _name(dataset: BaseDataset) -> str:
    """A data set's class, with its annotation file or the folder of its images."""
    where = dataset.ann_file or dataset.data_prefix
    return f'{type(dataset).__name__} of {where}'
