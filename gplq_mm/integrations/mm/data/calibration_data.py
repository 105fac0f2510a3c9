# Copyright (c) gplq_mm contributors. Licensed under Apache-2.0.
"""Calibration images: training images through the test pipeline."""

import copy
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import print_log
from mmengine.registry import DATASETS, FUNCTIONS

from ....recipe import RecipeLike, as_recipe
from ....stream.distributed import world
from ..run.progress import ProgressLog


class CalibrationSet:
    """A seeded choice of training images, read with the test pipeline.

    Args:
        cfg: The run's config; uses ``train_dataloader`` and the pipeline and collate
            function of ``val_dataloader`` (or ``test_dataloader``).
        num_images: Images to draw.
        seed: Seed of the random choice.
        batch_size: Images per forward pass. Whole batches are distributed over the ranks, so N
            ranks see the same batches as one rank.
        all_if_fewer: Take the whole training set if it has fewer images.

    Raises:
        ValueError: If a dataloader is missing, the training set is smaller than
            ``num_images``, there are fewer batches than ranks, or an image is also
            in the validation or test set.
    """

    def __init__(
        self, cfg: Config, num_images: int, seed: int, batch_size: int, all_if_fewer: bool = False
    ) -> None:
        reference = cfg.get('val_dataloader') or cfg.get('test_dataloader')
        if not cfg.get('train_dataloader') or not reference:
            raise ValueError(
                'calibration reads training images with the test pipeline; the config needs '
                'train_dataloader and val_dataloader (or test_dataloader)'
            )
        pipeline = _innermost(reference['dataset'])['pipeline']
        self.dataset = DATASETS.build(with_pipeline(cfg.train_dataloader.dataset, pipeline))
        self.collate = _collate_function(reference)
        self._cfg = cfg
        self._order = np.random.default_rng(seed).permutation(len(self.dataset))
        if all_if_fewer:
            num_images = min(num_images, len(self.dataset))
        self._choose(num_images, batch_size, 'calibration')

    @classmethod
    def of_recipe(
        cls, cfg: Config, recipe: RecipeLike, num_images: int | None = None
    ) -> 'CalibrationSet':
        """The images of a recipe.

        Args:
            cfg: The run's config.
            recipe: Resolved recipe; ``auto`` is replaced by numbers.
            num_images: Replaces the recipe's number; None keeps it.

        Raises:
            ValueError: As for the class.
        """
        settings: Any = as_recipe(recipe).calibration
        number = settings.num_images if num_images is None else num_images
        return cls(cfg, number, settings.seed, settings.batch_size, settings.all_if_fewer)

    def sample(
        self, num_images: int | None, batch_size: int, most: int, section: str
    ) -> 'CalibrationSet':
        """Another number of images from the same random order, for another purpose.

        Args:
            num_images: Images to draw; None: ``most``, or all if there are fewer.
            batch_size: Images per forward pass.
            most: Images drawn if ``num_images`` is None.
            section: Section of the recipe that asks for them.

        Raises:
            ValueError: As for the class.
        """
        other = copy.copy(self)
        requested = min(most, len(self.dataset)) if num_images is None else num_images
        other._choose(requested, batch_size, section)
        return other

    def others(self, batches: int) -> list[Any]:
        """This rank's collated batches of the next images of the random order, outside this set.

        Args:
            batches: Largest number of batches, each of this set's size; images of this set if the
                training set has no others.
        """
        size, taken = len(self.batches[0]), len(self.indices)
        free = [int(i) for i in self._order[taken : taken + batches * size * world()[1]]]
        parts = [free[i : i + size] for i in range(0, len(free), size)] or self.batches[:batches]
        rank, ranks = world()
        return [self.collate([self.dataset[i] for i in part]) for part in parts[rank::ranks]]

    def following(self, num_images: int) -> 'CalibrationSet':
        """The next images of the random order; the number counts over all ranks.

        Args:
            num_images: Largest number of images; the first ones of this set if the training set has
                no others.

        Raises:
            ValueError: If an image is also in the validation or test set.
        """
        other, taken = copy.copy(self), len(self.indices)
        chosen = [int(i) for i in self._order[taken : taken + num_images]]
        other._take(chosen or self.indices[:num_images], len(self.batches[0]))
        return other

    def _choose(self, num_images: int, batch_size: int, section: str) -> None:
        if len(self.dataset) < num_images:
            raise ValueError(
                f'{section} asks for {num_images} images but the training set has '
                f'{len(self.dataset)}; write recipe=dict({section}=dict(num_images=...))'
            )
        batches = -(-num_images // batch_size)
        if batches < world()[1]:
            raise ValueError(
                f'{batches} calibration batch(es) cannot be distributed over {world()[1]} ranks; '
                'ask for more images or a smaller batch_size'
            )
        self._take([int(i) for i in self._order[:num_images]], batch_size)

    def _take(self, indices: list[int], batch_size: int) -> None:
        self.indices = indices
        self.batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
        self.paths = [image_path(self.dataset, i) for i in self.indices]
        _require_disjoint([image_identity(self.dataset, i) for i in self.indices], self._cfg)

    def __iter__(self) -> Iterator[Any]:
        """This rank's collated batches, in a fixed order."""
        rank, size = world()
        for batch in self.batches[rank::size]:
            yield self.collate([self.dataset[i] for i in batch])

    def numbered(self) -> Iterator[tuple[int, Any]]:
        """This rank's collated batches with their number over all ranks."""
        rank, size = world()
        for number in range(rank, len(self.batches), size):
            yield number, self.load(number)

    def load(self, number: int) -> Any:
        """One collated batch by its number over all ranks."""
        return self.collate([self.dataset[i] for i in self.batches[number]])

    def __len__(self) -> int:
        """Number of batches of this rank."""
        rank, size = world()
        return len(self.batches[rank::size])

    def log(self) -> None:
        """Log which images are used."""
        folders = [os.path.dirname(path) for path in self.paths if path]
        common = os.path.commonpath(folders) if folders else ''
        names = [
            os.path.relpath(p, common) if p else str(i)
            for p, i in zip(self.paths, self.indices, strict=True)
        ]
        print_log(
            f'calibration on {len(self.indices)} training images (test pipeline)'
            f'{common and f" of {common}"}: {", ".join(names)}',
            logger='current',
        )

    def run_pass(self, model: Any, title: str, passes: int = 0) -> Callable[[], None]:
        """A function that runs the model over this rank's batches.

        The heads do not run if the scope ends at backbone or neck.

        Args:
            model: Converted model, not wrapped.
            title: Name of the work in the log.
            passes: How often it will be called, for the progress with the remaining time; 0: the
                caller logs its own.
        """
        forward = _features_only if ends_before_heads(model) else _whole_model
        progress, called = ProgressLog(title), 0

        def run() -> None:
            nonlocal called
            was_training = model.training
            model.eval()
            with torch.no_grad():
                for index, batch in enumerate(self):
                    if passes:
                        name = f'batches, pass {called + 1} of {passes}'
                        progress(name, called * len(self) + index, passes * len(self))
                    forward(model, batch)
            called += 1
            model.train(was_training)

        print_log(f'{title}: {len(self.indices)} images', logger='current')
        return run


def ends_before_heads(model: Any) -> bool:
    """Whether the scope has no head, so that only features can be compared."""
    prefixes = {name.split('.')[0] for name in model.gplq.coverage.scope}
    return prefixes <= {'backbone', 'neck'} and hasattr(model, 'extract_feat')


def _features_only(model: Any, batch: Any) -> None:
    model.extract_feat(model.data_preprocessor(batch, False)['inputs'])


def _whole_model(model: Any, batch: Any) -> None:
    model.test_step(batch)


def with_pipeline(cfg: Mapping[str, Any], pipeline: list) -> dict[str, Any]:
    """Dataset config with another pipeline and without wrappers that resample.

    Args:
        cfg: Dataset config, possibly wrapped (``RepeatDataset``, ``ConcatDataset``, ...).
        pipeline: Transforms of the innermost data sets.
    """
    own = copy.deepcopy(dict(cfg))
    if 'datasets' in own:
        own['datasets'] = [with_pipeline(c, pipeline) for c in own['datasets']]
        own.pop('pipeline', None)
        return own
    if 'dataset' in own:
        inner = with_pipeline(own['dataset'], pipeline)
        return {**own, 'dataset': inner} if _is_subset(own) else inner
    own['pipeline'] = copy.deepcopy(pipeline)
    return own


def image_path(dataset: Any, index: int) -> str | None:
    """Real path of an image, or None if the data set does not give it."""
    info = dataset.get_data_info(index) if hasattr(dataset, 'get_data_info') else {}
    path = info.get('img_path')
    return os.path.realpath(path) if path else None


def image_identity(dataset: Any, index: int) -> str | None:
    """Identity of an image: its real path, or a hash of its pixels if they are in memory."""
    info = dataset.get_data_info(index) if hasattr(dataset, 'get_data_info') else {}
    pixels = info.get('img')
    if isinstance(pixels, np.ndarray) and not info.get('img_path'):
        return f'SHA-1 {hashlib.sha1(pixels.tobytes()).hexdigest()}'
    return image_path(dataset, index)


def _is_subset(wrapper: Mapping[str, Any]) -> bool:
    """Whether a wrapper leaves images out (the others only repeat or mix them)."""
    kind = wrapper.get('type')
    return str(getattr(kind, '__name__', kind)).rpartition('.')[2] == 'KFoldDataset'


def _innermost(cfg: Mapping[str, Any]) -> Mapping[str, Any]:
    while 'pipeline' not in cfg and ('dataset' in cfg or 'datasets' in cfg):
        cfg = cfg['dataset'] if 'dataset' in cfg else cfg['datasets'][0]
    return cfg


def _collate_function(dataloader: Mapping[str, Any]) -> Callable[[list], Any]:
    cfg = dict(dataloader.get('collate_fn') or {})
    if not cfg:
        return pseudo_collate
    name = cfg.pop('type')
    function = FUNCTIONS.get(name) if isinstance(name, str) else name
    return lambda samples: function(samples, **cfg)


def _require_disjoint(images: list[str | None], cfg: Config) -> None:
    known = {image for image in images if image}
    compared: list[Any] = []
    for name in ('val_dataloader', 'test_dataloader'):
        dataloader = cfg.get(name)
        if not dataloader or dataloader['dataset'] in compared:
            continue
        compared.append(dataloader['dataset'])
        try:
            dataset = DATASETS.build(copy.deepcopy(dataloader['dataset']))
        except FileNotFoundError as error:
            # training needs no test set; missing images cannot be shared
            print_log(f'{name} is not compared with the calibration images: {error}', 'current')
            continue
        shared = {image_identity(dataset, i) for i in range(len(dataset))} & known
        if shared:
            raise ValueError(
                f'{len(shared)} of {len(images)} calibration images are also in {name}, for '
                f'example {sorted(map(str, shared))[0]}; calibrate on training images only '
                '(check train_dataloader.dataset)'
            )
