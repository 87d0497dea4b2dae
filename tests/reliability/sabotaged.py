"""Faults in data, penalty and resume, each as a patch, and the test of the suite that must fail under it.

As a pytest plugin (`-p sabotaged`) it applies the one that the environment variable SABOTAGE names.
"""

import os
from collections.abc import Callable

import pytest

PATCHES: dict[str, tuple[Callable, str]] = {}


def pytest_configure(config):
    patch, _ = PATCHES[os.environ["SABOTAGE"]]
    patch(pytest.MonkeyPatch())


def under(test: str) -> Callable:
    """Return a decorator that lists a patch beside the test that must fail under it."""

    def listed(patch):
        PATCHES[patch.__name__.replace("_", " ")] = (patch, test)
        return patch

    return listed


def _wrap(patch, owner, name, around):
    """Replace owner.name by `around(original)`."""
    patch.setattr(owner, name, around(getattr(owner, name)))


def _skip(patch, owner, name):
    patch.setattr(owner, name, lambda *args, **kwargs: None)


# --- data -------------------------------------------------------------------------------------------------------------


def _orders(patch, change):
    from slimming.data.sampler import EpochSampler

    def around(original):
        return lambda self: iter(change(self, list(original(self))))

    _wrap(patch, EpochSampler, "__iter__", around)


@under("data/test_sampler.py::test_evaluation_counts_every_image_once")
def an_image_counted_twice_in_evaluation(patch):
    _orders(patch, lambda self, order: order if self.shuffle else [*order, order[0]])


@under("data/test_sampler.py::test_order_depends_on_seed_and_epoch_alone")
def an_image_trained_on_twice(patch):
    _orders(patch, lambda self, order: [order[0], *order[:-1]] if self.shuffle else order)


@under("data/test_sampler.py::test_ranks_share_training_images_evenly")
def every_rank_trains_on_the_same_images(patch):
    from slimming.data.sampler import EpochSampler

    def around(original):
        return lambda self, n, **kw: original(self, n, **kw | {"rank": 0})

    _wrap(patch, EpochSampler, "__init__", around)


@under("data/test_sampler.py::test_order_depends_on_seed_and_epoch_alone")
def every_epoch_in_the_same_order(patch):
    from slimming.data.sampler import EpochSampler

    _skip(patch, EpochSampler, "set_epoch")


@under("data/test_sampler.py::test_batches_are_fetched_whole")
def a_label_shifted_in_its_batch(patch):
    from slimming.data.sampler import TensorImages

    def around(original):
        def fetch(self, indices):
            images, labels = original(self, indices)
            return images, labels.roll(1)

        return fetch

    _wrap(patch, TensorImages, "__getitems__", around)


@under("data/test_modules.py::test_image_folder")
def a_label_shifted_in_a_folder(patch):
    from slimming.data import ImageFolder

    def around(original):
        def load(self, train):
            images, labels = original(self, train)
            return images, labels.roll(1)

        return load

    _wrap(patch, ImageFolder, "load", around)


@under("data/test_modules.py::test_evaluation_is_not_augmented")
def augmentation_in_evaluation(patch):
    from slimming.data.base import ImageData

    _wrap(
        patch, ImageData, "transform", lambda original: lambda self, images, augment=False: original(self, images, True)
    )


@under("data/test_imagenet.py::test_a_validation_split_is_not_augmented")
def augmentation_of_a_validation_split(patch):
    from slimming.data import ImageNet

    def around(original):
        return lambda self, files, labels, augment: original(self, files, labels, True)

    _wrap(patch, ImageNet, "_images", around)


@under("data/test_sampler.py::test_validation_split_is_stratified_disjoint_and_exact")
def validation_images_trained_on(patch):
    import torch

    from slimming.data import base

    _wrap(patch, base, "split_off", lambda f: lambda labels, size: (torch.arange(len(labels)), f(labels, size)[1]))


@under("data/test_modules.py::test_normalised_batches_have_no_mean_and_unit_deviation")
def images_normalised_twice(patch):
    from slimming.data import base

    _wrap(patch, base, "normalise", lambda f: lambda images, mean, std: (f(images, mean, std) - mean) / std)


@under("stages/test_train_stage.py::test_without_validation_data_nothing_is_selected")
def the_best_epoch_chosen_on_the_test_set(patch):
    from slimming.training.recorder import Recorder

    def around(original):
        def end(self, trainer, module):
            trainer.callback_metrics["val/acc"] = trainer.callback_metrics.get("test/acc", 0)
            self._evaluated = True
            original(self, trainer, module)

        return end

    _wrap(patch, Recorder, "on_train_epoch_end", around)


# --- penalty ----------------------------------------------------------------------------------------------------------


@under("training/test_penalty_in_trainer.py::test_float64")
def the_penalty_twice_per_step(patch):
    from slimming.channels.penalty import Penalty

    def around(original):
        return lambda self, factor=1.0: (original(self, factor), original(self, factor))

    _wrap(patch, Penalty, "add_gradient", around)


@under("training/test_penalty_in_trainer.py::test_fp16_with_a_scaler")
def the_penalty_on_scaled_gradients(patch):
    from slimming.training import module

    patch.setattr(module, "loss_factor", lambda trainer, module: 1 / trainer.accumulate_grad_batches)


@under("training/test_penalty_in_trainer.py::test_float64")
def the_penalty_whole_for_every_accumulated_batch(patch):
    from slimming.training import module

    patch.setattr(module, "loss_factor", lambda trainer, module: 1.0)


@under("training/test_penalty_in_trainer.py::test_float64")
def the_penalty_after_clipping(patch):
    from slimming.training.module import SlimmingModule

    def around(original):
        def clip(self, *args, **kwargs):
            original(self, *args, **kwargs)
            self.penalty.add_gradient(1.0)

        return clip

    patch.setattr(SlimmingModule, "on_after_backward", lambda self: None)
    _wrap(patch, SlimmingModule, "configure_gradient_clipping", around)


@under("training/test_penalty_in_trainer.py::test_float64")
def the_penalty_pushes_a_gamma_of_zero(patch):
    import torch

    patch.setattr(torch, "_foreach_sign", lambda tensors: [torch.where(t >= 0, 1.0, -1.0).to(t) for t in tensors])


@under("training/test_penalty_in_trainer.py::test_float64")
def gammas_without_a_gradient_left_out(patch):
    from slimming.channels.penalty import Penalty

    def around(original):
        def add(self, factor=1.0):
            some = {k: g for k, g in self.gammas.items() if g.grad is not None}
            original(Penalty(some, self.sparsity), factor)

        return add

    _wrap(patch, Penalty, "add_gradient", around)


@under("training/test_callback.py::test_equals_the_penalty_in_the_loss")
def the_callback_forgets_the_penalty(patch):
    from slimming import SlimmingCallback

    _skip(patch, SlimmingCallback, "on_after_backward")


# --- resume -----------------------------------------------------------------------------------------------------------

RESUMED = "stages/test_train_stage.py::test_resumed_equals_uninterrupted"


@under(RESUMED)
def the_random_state_not_restored(patch):
    from slimming.data.base import ImageData

    _skip(patch, ImageData, "seed_epoch")


@under(RESUMED)
def the_optimizer_not_restored(patch):
    from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

    _skip(patch, _CheckpointConnector, "restore_optimizers")


@under(RESUMED)
def the_learning_rate_schedule_not_restored(patch):
    from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

    _skip(patch, _CheckpointConnector, "restore_lr_schedulers")


@under(RESUMED)
def the_history_not_restored(patch):
    from slimming.training.recorder import Recorder

    _skip(patch, Recorder, "load_state_dict")


@under(RESUMED)
def the_weights_not_restored(patch):
    from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

    _skip(patch, _CheckpointConnector, "restore_model")


@under(RESUMED)
def the_epoch_begun_counted_as_done(patch):
    from lightning.pytorch.loops.fit_loop import _FitLoop

    def around(original):
        def load(self, state, **kwargs):
            original(self, state, **kwargs)
            self.epoch_progress.current.processed += 1
            self.epoch_progress.current.completed += 1

        return load

    _wrap(patch, _FitLoop, "on_load_checkpoint", around)
