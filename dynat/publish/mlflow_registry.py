"""A version in MLflow's model registry: the ONNX network, its signature, and the run that it came from."""

import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx

from dynat.errors import UserError
from dynat.publish import onnx_file
from dynat.publish.audited import Release
from dynat.runtime.files import sha256
from dynat.runtime.tracking import DEFAULTS, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient


def write(release: Release, folder: Path) -> Iterator[str]:
    """Write the model, log the folder to the training's run and register it as ``<setting>-<method>``.

    Raises :class:`UserError` if that run is not in the store, or the store takes nothing.
    """
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    yield from onnx_file.write(release, folder)
    shape, float32 = release.data.test_images.shape[1:], np.dtype(np.float32)
    signature = ModelSignature(
        Schema([TensorSpec(float32, (-1, *shape), "images")]),
        Schema([TensorSpec(float32, (-1, len(release.data.classes)), "logits")]),
    )
    requirements = [f"{each}=={version(each)}" for each in ("onnx", "onnxruntime", "numpy")]
    network = onnx.load(folder / onnx_file.FILE)
    model = str(folder / "model")
    mlflow.onnx.save_model(network, model, signature=signature, pip_requirements=requirements)
    (folder / onnx_file.FILE).unlink()  # it is in the model
    try:
        client = mlflow.MlflowClient(tracking_uri())
        yield _register(client, release, folder)
    except MlflowException as error:
        reason = " ".join(str(error).split())
        raise UserError(f"MLflow at {tracking_uri()}: {reason}; nothing is registered") from None


def _register(client: "MlflowClient", release: Release, folder: Path) -> str:
    from mlflow.exceptions import MlflowException

    run_id = release.record().get("mlflow_run_id")
    if not run_id:
        text = f"metrics/runs/train/{release.name}.json names no MLflow run of {release.name}"
        raise UserError(f"{text}; log it with python -m dynat.runtime.tracking")
    run, weights = client.get_run(run_id), sha256(release.weights)
    if run.data.tags.get("model.sha256", weights) != weights:
        raise UserError(f"MLflow run {run_id} is of other weights than {release.weights}; run dvc repro")
    name, place = f"{release.setting}-{release.method}", f"published/{weights[:10]}"
    client.log_artifacts(run_id, str(folder), place)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {"dynat.run": release.name, "model.sha256": weights, "dynat.lineage": f"{place}/lineage.json"}
    tags["dynat.audit"] = release.summary
    source = f"runs:/{run_id}/{place}/model"
    registered = client.create_model_version(name, source, run_id, tags=tags)
    return f"MLflow at {tracking_uri()}: {name} version {registered.version}, of run {run_id}"
