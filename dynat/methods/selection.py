"""What params.yaml and this machine tell of the selected trainings before DVC removes any output."""

import torch

from dynat.config.fields import KeyedError
from dynat.config.params import Params
from dynat.data.download import verify, verify_weights
from dynat.data.sources import extent
from dynat.errors import UserError
from dynat.methods.setup import is_compiled, refuse_training
from dynat.runtime import distributed, machine


def refuse_setting(params: Params, setting: str) -> None:
    """Raise :class:`UserError`, naming a key as typed, for what cannot be run of a selected ``setting``.

    Of own images only the stages know how many and how large they are.
    """
    study, section = params.study[setting], f"study.{setting}"
    machine.refuse_unfit(f"{section}.machine", study.machine)
    verify(study.data, f"{section}.data")
    for name in (each for each, its in params.checkpoints.items() if its == setting):
        verify_weights(params.checkpoint[name], f"checkpoint.{name}")
    processes, known = distributed.launched(params.launch), extent(study.data, f"{section}.data")
    if known is not None:
        try:
            for kind in ("attack", "autoattack"):
                study.check_test_images(kind, known.test)
        except KeyedError as error:
            raise UserError(f"{section}.{error}") from None
    for method in (*params.trained, *params.frozen_guides):
        study, recipe = params.study_of(setting, method), params.recipe(setting, method)
        device = "cuda" if study.machine.device != "cpu" and torch.cuda.is_available() else "cpu"
        if is_compiled(study, recipe, device):
            machine.compiler(f"{section}.train.engine", torch.device(device))
        refuse_training(params, setting, method, known, processes)
