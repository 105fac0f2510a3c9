# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""An error of a data set is told in its own words, whatever the data set held at that moment."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mmengine.dataset import BaseDataset
from torch.utils.data import DataLoader

from gplq_mm.integrations.mm.data.data_errors import explain_data_error
from gplq_mm.integrations.mm.launch.tools import USER_ERROR, run_tool

ONE = '{"metainfo": {}, "data_list": [{"img_path": "a.png"}]}'
EMPTY = '{"metainfo": {}, "data_list": []}'


def read_image(info: dict[str, Any]) -> bytes:
    return Path(info['img_path']).read_bytes()


def fail(info: dict[str, Any]) -> None:
    raise ValueError('a mistake in a transform')


def dataset(folder: Path, text: str, transform: Callable = read_image) -> BaseDataset:
    path = folder / 'images.json'
    path.write_text(text)
    prefix = {'img_path': str(folder / 'nowhere')}
    return BaseDataset(str(path), data_prefix=prefix, pipeline=[transform])


def explained(run: Callable[[], object]) -> str | None:
    with pytest.raises((ValueError, TypeError, FileNotFoundError)) as caught:
        run()
    return explain_data_error(caught.value)


def test_a_data_set_without_images(tmp_path: Path) -> None:
    text = explained(lambda: dataset(tmp_path, EMPTY))
    assert text == (
        f'BaseDataset of {tmp_path}/images.json has no images; compare metainfo.classes with the '
        'names in the annotations, and check filter_cfg and indices'
    )


def test_a_truncated_annotation_file_is_named_with_the_place(tmp_path: Path) -> None:
    text = explained(lambda: dataset(tmp_path, ONE[:-2]))
    assert text is not None
    assert text.startswith(
        f'BaseDataset of {tmp_path}/images.json is no complete JSON file: Expect'
    )
    assert f'(char {len(ONE) - 2})' in text


def test_annotations_of_another_format_keep_their_own_error(tmp_path: Path) -> None:
    assert explained(lambda: dataset(tmp_path, '{"images": []}')) is None


@pytest.mark.parametrize('workers', [0, 1])
def test_a_missing_image_is_named_also_from_a_worker(tmp_path: Path, workers: int) -> None:
    images = dataset(tmp_path, ONE)
    text = explained(lambda: list(DataLoader(images, num_workers=workers)))  # type: ignore[arg-type]
    assert text is not None
    missing = f'names a file that is not there: {tmp_path}/nowhere/a.png; check data_prefix'
    assert text.endswith(missing)
    assert text.startswith('a data set' if workers else f'BaseDataset of {tmp_path}/images.json')


def test_an_error_of_a_transform_keeps_its_traceback(tmp_path: Path) -> None:
    images = dataset(tmp_path, ONE, fail)
    with pytest.raises(ValueError, match='a mistake in a transform'):
        run_tool(lambda: images[0])  # type: ignore[arg-type, return-value]


def test_other_missing_files_are_no_matter_of_a_data_set(tmp_path: Path) -> None:
    assert explained(lambda: (tmp_path / 'x').read_bytes()) is None


def test_a_tool_ends_in_this_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_tool(lambda: dataset(tmp_path, EMPTY)) == USER_ERROR  # type: ignore[arg-type, return-value]
    error = capsys.readouterr().err
    assert error.startswith('error: BaseDataset of ')
    assert error.count('\n') == 1
