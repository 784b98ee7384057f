"""RobustBench: ``model_info``, weights, and the entry of its model zoo that loads them with ``strict=True``.

Keys and texts are those of its published ``model_info`` (236 files, commit 78fcc9e); networks are its own
classes: ``ResNet``, ``PreActResNet`` with the final batch norm, TRADES' ``WideResNet``.
"""

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynat.errors import UserError
from dynat.networks.weights import load_weights
from dynat.paper.published import values
from dynat.paper.tables import HERE
from dynat.publish.audited import Release, Result
from dynat.publish.papers import paper_of
from dynat.runtime.files import write_atomically

FOOTNOTE = r"Uses \(\ell_{\infty} \) = 0.031 ≈ 7.9/255 instead of 8/255."
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
WHOLE = 10_000  # test images of both data sets
ZOO = '''"""The entry of robustbench/model_zoo/{dataset}.py for models/{dataset}/Linf/{key}.pt."""

from collections import OrderedDict

from robustbench.model_zoo.architectures.{module} import {names}
from robustbench.model_zoo.architectures.utils_architectures import normalize_model

linf = OrderedDict([("{key}", {{"model": lambda: {network}, "gdrive_id": None}})])
'''


def write(release: Release, folder: Path) -> Iterator[str]:
    """Write ``model_info``, ``models`` and ``model_zoo`` as RobustBench's repository has them.

    Raises :class:`UserError` for a network, data or a radius that it does not judge.
    """
    module, names, network, architecture = architecture_of(release.spec)
    info, paper = (
        model_info(release, architecture),
        paper_of(release.method, release.method not in release.params.checkpoint),
    )
    key, dataset = f"{paper['key']}_{architecture}", info["dataset"]
    text = json.dumps(info, indent=2)  # escapes what is not ASCII, as the published ones do
    write_atomically(folder / f"model_info/{dataset}/Linf/{key}.json", text.encode())
    buffer = io.BytesIO()
    torch.save(state_dict(load_weights(release.weights)[0], release.spec), buffer)
    write_atomically(folder / f"models/{dataset}/Linf/{key}.pt", buffer.getvalue())
    zoo = ZOO.format(dataset=dataset, key=key, module=module, names=names, network=network)
    write_atomically(folder / f"model_zoo/{dataset}.py", zoo.encode())
    yield f"{key}: clean {info['clean_acc']}, AutoAttack {info['autoattack_acc']} at {info['eps']}"
    if not paper["link"]:
        yield f"fill in link, name, authors and venue: {release.method} has no paper in papers.json"


def architecture_of(spec: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Module, names to import, expression of the network and its printed name, by RobustBench.

    ``spec`` is what ``dynat.networks.architectures.build`` takes. :class:`UserError` if it has no such class.
    """
    kind, classes = spec["name"], spec["num_classes"]
    reason = None
    if kind == "wrn":
        options = {"depth": spec.get("depth", 34), "widen_factor": spec.get("widen", 10)}
        architecture = "WideResNet-{depth}-{widen_factor}".format(**options)
        options |= {"num_classes": classes} | ({"sub_block1": True} if spec.get("sub_block1") else {})
        found = ("wide_resnet", "WideResNet", f"WideResNet({_arguments(options)})")
    elif kind in ("resnet", "preact_resnet"):
        blocks = list(spec.get("blocks") or (2, 2, 2, 2))
        if list(spec.get("strides") or (1, 2, 2, 2)) != [1, 2, 2, 2] or spec.get("width", 64) != 64:
            reason = "its ResNets have the strides 1, 2, 2, 2 and the width 64"
        name, block = ("ResNet", "BasicBlock") if kind == "resnet" else ("PreActResNet", "PreActBlock")
        architecture = f"{name}-{2 * sum(blocks) + 2}"
        options = {"num_classes": classes}
        options |= {"bn_before_fc": True, "out_shortcut": True} if kind == "preact_resnet" else {}
        found = ("resnet", f"{block}, {name}", f"{name}({block}, {blocks}, {_arguments(options)})")
    else:
        reason = f"it has no class for {kind!r}, only for resnet, preact_resnet and wrn"
    if reason is None and spec.get("in_channels", 3) != 3:
        reason = "its networks read 3 channels"
    if reason:
        raise UserError(f"robustbench: {reason}; publish --as huggingface, onnx or torch.export instead")
    if spec.get("mean") is not None:
        normalised = {"mean": tuple(spec["mean"]), "std": tuple(spec["std"])}
        found = (*found[:2], f"normalize_model({found[2]}, {_arguments(normalised)})")
    return (*found, architecture)


def _arguments(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in options.items())


def state_dict(weights: Mapping[str, Tensor], spec: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state that RobustBench's network loads: our names, below its ``normalize_model`` where we do."""
    if spec.get("mean") is None:
        return dict(weights)
    constants = {f"normalize.{key}": torch.tensor(spec[key]).view(1, 3, 1, 1) for key in ("mean", "std")}
    return constants | {f"model.{name}": value for name, value in weights.items()}


def model_info(release: Release, architecture: str) -> dict[str, Any]:
    """The entry of the leaderboard, its keys in the order of the published ones.

    AutoAttack is that at 8/255 if it was run, on as many images as there are; :class:`UserError` without one.
    """
    dataset, attacked = _dataset(release), _autoattack(release)
    clean = next((each for each in release.results if each.measured.column == "clean"), None)
    if clean is None:
        raise UserError(f"{release.name}: robustbench needs the clean accuracy; run dvc repro")
    paper, epsilon = (
        paper_of(release.method, release.method not in release.params.checkpoint),
        attacked.measured.epsilon,
    )
    notes = [FOOTNOTE] if epsilon == "0.031" else []
    for what, each in (("Clean accuracy", clean), ("AutoAttack", attacked)):
        if each.measured.n < WHOLE:
            notes.append(f"{what} on the first {each.measured.n:,} test images.")
    if release.guide and release.guide["origin"] != HERE:
        notes.append(f"Learned from weights trained elsewhere: {release.guide['origin']}.")
    if release.study.data.source == "image_folder":
        notes.append("Test images from a folder, not from the official archive.")
    info: dict[str, Any] = {
        **{key: paper[key] for key in ("link", "name", "authors")},
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": dataset,
        "venue": paper["venue"],
        "architecture": architecture,
        "eps": epsilon,
        "clean_acc": f"{clean.counted['accuracy']:.2f}",
        "reported": _reported(release),
        "autoattack_acc": f"{attacked.counted['accuracy']:.2f}",
    }
    info |= {"footnote": "<br>".join(notes)} if notes else {}
    return info | {"unreliable": any("AutoAttack warned" in text for text in attacked.warnings)}


def _dataset(release: Release) -> str:
    source = release.study.data.source
    if source == "image_folder" and list(release.data.classes) == CIFAR10:
        source = "cifar10" if release.data.test_images.shape[1:] == (3, 32, 32) else source
    if source not in ("cifar10", "cifar100"):
        key = f"study.{release.setting}.data.source"
        raise UserError(f"robustbench: {key} is {source}; it judges cifar10 and cifar100")
    return source


def _autoattack(release: Release) -> Result:
    runs = [
        each
        for each in release.results
        if each.measured.column.startswith("aa") and each.measured.epsilon in ("8/255", "0.031")
    ]
    if not runs:
        text = f"{release.name} has no AutoAttack at 8/255 or 0.031"
        raise UserError(f"robustbench: {text}; set study.{release.setting}.autoattack.epsilon, run dvc repro")
    return max(runs, key=lambda each: (each.measured.epsilon == "8/255", each.measured.n))


def _reported(release: Release) -> str:
    """The paper's own AutoAttack accuracy of this row; empty, as in 20 published ones, where it has none."""
    rows = values()
    own = (rows["setting"] == release.setting) & (rows["recipe"] == release.method)
    if not release.method.startswith("dynat") or release.study.train.modern:
        return ""
    return next((f"{float(value):.2f}" for value in rows[own & (rows["column"] == "aa")]["published"]), "")
