"""The digits' `dynat` in every format, read back by the library that receives it."""

import builtins
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dynat.audit.__main__ import main as audit
from dynat.errors import UserError
from dynat.networks.weights import load_network
from dynat.publish.__main__ import FORMATS, publish
from dynat.publish.agreement import compare
from dynat.publish.audited import Release, audited

CPU = torch.device("cpu")
RUN = "digits/dynat/0"
Publish = Callable[..., Path]


def stored(repository: Path) -> tuple[Tensor, Tensor]:
    """Test images in [0,1] and what the stored weights make of them."""
    release = audited(repository, RUN)
    images = release.data.test_images.float() / 255
    return images, load_network(repository / f"models/{RUN}/target.safetensors", CPU)[0](images)


def witnesses(repository: Path) -> int:
    """Stored adversarial images of the best epoch, counted from the files alone."""
    from safetensors import safe_open

    count = 0
    for kind in ("attack", "autoattack"):
        with safe_open(repository / f"metrics/{kind}/{RUN}.witness.safetensors", "pt") as file:
            names = [name for name in file.keys() if name.startswith("best/")]  # noqa: SIM118
            count += sum(len(file.get_tensor(name)) for name in names if name.endswith("/indices"))
    return count


# ----------------------------------------------------------------------------------------------- formats


@pytest.mark.slow
def test_onnxruntime_computes_the_stored_logits_and_is_fooled_by_every_stored_image(
    repository: Path, published: Publish, capsys: pytest.CaptureFixture[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    folder = published("onnx")
    images, logits = stored(repository)
    session = onnxruntime.InferenceSession(folder / "network.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 7, len(images)):  # any batch
        (found,) = session.run(["logits"], {"images": images[:count].numpy()})
        assert (torch.from_numpy(found) - logits[:count]).abs().max() <= 1e-4
    agreement = json.loads((folder / "agreement.json").read_text())
    adversarial = agreement["adversarial"]
    assert adversarial["images"] == witnesses(repository) > 0
    assert adversarial["misclassified"] + len(adversarial["ties"]) == adversarial["images"]
    assert agreement["logits"]["largest_difference"] <= agreement["logits"]["bound"] == 1e-4
    assert f"of {adversarial['images']} stored adversarial images fool" in capsys.readouterr().out


@pytest.mark.slow
def test_torch_export_computes_the_stored_logits_without_this_project(
    repository: Path, published: Publish, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = published("torch.export")
    images, logits = stored(repository)
    save_file({"images": images}, tmp_path / "images")
    script = (
        "import sys, torch; from safetensors.torch import *; sys.modules['dynat'] = None\n"
        "network, images, out = sys.argv[1:]; x = load_file(images)['images']\n"
        "save_file({'logits': torch.export.load(network).module()(x)}, out)"
    )
    files = (folder / "network.pt2", tmp_path / "images", tmp_path / "logits")
    subprocess.run([sys.executable, "-c", script, *map(str, files)], check=True, cwd=tmp_path)
    assert torch.allclose(load_file(tmp_path / "logits")["logits"], logits, rtol=0, atol=1e-4)
    assert json.loads((folder / "agreement.json").read_text())["adversarial"]["images"] == witnesses(
        repository
    )


@pytest.mark.slow
def test_the_hub_reads_every_accuracy_from_the_card_with_radius_n_and_interval(
    repository: Path, published: Publish
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    folder = published("huggingface")
    card = hub.ModelCard.load(folder / "README.md")
    results = {each.metric_name.split(",")[0]: each for each in card.data.eval_results}
    metrics = json.loads((repository / f"metrics/attack/{RUN}.json").read_text())["best"]
    assert {"Clean", "PGD-20", "C&W", "AA"} <= results.keys()
    pgd = results["PGD-20"]
    assert pgd.metric_value == metrics["pgd20"]["accuracy"]
    assert pgd.metric_args["interval"] == [metrics["pgd20"]["low"], metrics["pgd20"]["high"]]
    expected = {"epsilon": "0.12", "norm": "Linf", "n": 60, "precision": "fp32", "warnings": []}
    assert expected.items() <= pgd.metric_args.items()
    assert results["AA"].metric_args["epsilon"] == "0.3"
    assert (card.data.license, card.data.library_name) == ("mit", "dynat")
    for text in ("## Training data", "## Recipe", "2408.13102", "@software{dynat"):
        assert text in card.text
    network, epoch = load_network(folder / "model.safetensors", CPU)  # as the card says
    images, logits = stored(repository)
    assert torch.equal(network(images), logits)
    assert f"epoch {epoch}, the best" in card.text
    config = json.loads((folder / "config.json").read_text())
    assert config["network"]["name"] == "cnn"
    assert config["classes"] == list("0123456789")


@pytest.mark.slow
def test_mlflow_serves_the_registered_version_which_names_its_run_and_lineage(
    repository: Path, published: Publish
) -> None:
    pytest.importorskip("onnxruntime")
    import mlflow

    record = json.loads((repository / f"metrics/runs/train/{RUN}.json").read_text())
    client = mlflow.MlflowClient(f"sqlite:///{repository}/mlflow.db")
    before = client.get_run(record["mlflow_run_id"])
    published("mlflow")
    (version,) = client.search_model_versions("name = 'digits-dynat'")
    assert version.run_id == record["mlflow_run_id"]
    assert version.tags["model.sha256"] == record["model_sha256"]
    assert version.tags["dynat.run"] == RUN
    mlflow.set_tracking_uri(f"sqlite:///{repository}/mlflow.db")
    try:
        model = mlflow.pyfunc.load_model("models:/digits-dynat/1")
        images, logits = stored(repository)
        found = torch.from_numpy(model.predict({"images": images.numpy()})["logits"])
        lineage = mlflow.artifacts.load_dict(f"runs:/{version.run_id}/{version.tags['dynat.lineage']}")
    finally:
        mlflow.set_tracking_uri(None)
    assert torch.allclose(found, logits, rtol=0, atol=1e-4)
    assert model.metadata.signature.inputs.inputs[0].shape == (-1, 1, 8, 8)
    assert lineage["run"] == RUN
    assert client.get_run(version.run_id).info == before.info, "the run itself is as it was"


@pytest.mark.slow
def test_lineage_has_what_the_audit_prints_and_the_crate_is_there_where_asked(
    repository: Path, published: Publish, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = published("huggingface", "--crate")
    lineage = json.loads((folder / "lineage.json").read_text())
    content = (folder / "model.safetensors").read_bytes()
    assert lineage["weights"]["sha256"] == hashlib.sha256(content).hexdigest()
    capsys.readouterr()
    assert audit([RUN, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert lineage["audit"] == printed
    assert all(each["ok"] for each in printed)
    assert (folder / "crate/ro-crate-metadata.json").exists()


# ----------------------------------------------------------------------------------------------- refusals


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_what_the_audit_does_not_hold_is_not_published(repository: Path, tmp_path: Path, form: str) -> None:
    path = repository / f"metrics/attack/{RUN}.json"
    path.write_text(path.read_text().replace('"epsilon": 0.12', '"epsilon": 0.13'))
    command = [sys.executable, "-m", "dynat.publish", RUN, "--as", form, str(tmp_path / "out")]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2
    assert line.startswith(f"error: {RUN} is not published, for its audit does not hold: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_network_that_robustbench_has_no_class_for_is_refused_with_that_reason(
    repository: Path, published: Publish, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="it has no class for 'cnn'"):
        published("robustbench")
    assert [*(tmp_path / "out").iterdir()] == [], "all or nothing"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "reason"),
    [
        ("digits/dynat", "name a run as setting/method/seed"),
        ("digits/dynet/0", "did you mean digits/dynat/0"),
        ("table1/DYNAT/0", "no such cell"),
    ],
)
def test_a_name_that_is_no_run_is_refused(repository: Path, tmp_path: Path, run: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        publish([run, "--as", "torch.export", str(tmp_path / "out")])


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["models", "data", "witness"])
def test_what_is_not_here_is_named(repository: Path, published: Publish, missing: str) -> None:
    names = {"models": f"models/{RUN}/target.safetensors", "data": "data/digits.safetensors"}
    name = names.get(missing, f"metrics/attack/{RUN}.witness.safetensors")
    if missing == "models":  # all that the stage wrote, as in a fresh clone
        shutil.rmtree((repository / name).parent)
    else:
        (repository / name).unlink()
    with pytest.raises(UserError, match=name):
        published("torch.export")


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(UserError, match="is not an empty folder; name a new one"):
        publish([RUN, "--as", "onnx", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("form", "package"), [("onnx", "onnxruntime"), ("huggingface", "huggingface_hub"), ("mlflow", "onnx")]
)
def test_a_missing_package_is_one_line_that_names_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, package: str
) -> None:
    for name in [name for name in sys.modules if name.startswith("dynat.publish.")]:
        if name.rsplit(".", 1)[1] in FORMATS.values():
            monkeypatch.delitem(sys.modules, name)
    imported = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return imported(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    reason = f"--as {form} needs the package {package}; install it with uv sync --extra publish"
    with pytest.raises(UserError, match=reason):
        publish([RUN, "--as", form, str(tmp_path / "out")])


# ---------------------------------------------------------------------------------------------- agreement


@pytest.fixture
def release(repository: Path) -> Release:
    return audited(repository, RUN)


@pytest.mark.slow
def test_an_export_with_other_logits_is_refused(release: Release, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"exported logits differ by 0\.001, more than 0\.0001"):
        list(compare(release, lambda images: release.network(images) + 0.001, tmp_path))
    with pytest.raises(UserError, match="exported logits differ by nan"):
        list(compare(release, lambda images: release.network(images) * torch.nan, tmp_path))


@pytest.mark.slow
def test_an_adversarial_image_that_no_longer_fools_is_named_or_refused(
    release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack, indices, images = next(each for each in release.adversarial() if len(each[1]))
    label = int(release.data.test_labels[indices[0]])
    monkeypatch.setattr(Release, "adversarial", lambda self: [(attack, indices[:1], images[:1])])

    def exported(lead: float) -> Callable[[Tensor], Tensor]:
        def run(batch: Tensor) -> Tensor:
            logits = release.network(batch).clone()
            if len(batch) == 1:
                logits[0] = 0
                logits[0, label] = lead
            return logits

        return run

    *_, tie = compare(release, exported(5e-5), tmp_path)
    assert f"a tie: {attack}, sample {int(indices[0])}, margin -5e-05" in tie
    found = json.loads((tmp_path / "agreement.json").read_text())["adversarial"]
    assert (found["images"], found["misclassified"]) == (1, 0)
    with pytest.raises(UserError, match=f"1 adversarial images do not fool .* {attack}, sample"):
        list(compare(release, exported(0.1), tmp_path))
