"""A folder for the Hugging Face hub: safetensors, ``config.json`` and a model card with its results."""

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from dynat.config import yaml_files
from dynat.networks.weights import load_weights
from dynat.paper.cells import name
from dynat.publish.audited import Release, Result
from dynat.publish.papers import paper_of
from dynat.runtime.files import write_atomically, write_json

HUB = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}  # the hub's names


def write(release: Release, folder: Path) -> Iterator[str]:
    """Write ``model.safetensors``, the very bytes of the audit, ``config.json`` and ``README.md``."""
    write_atomically(folder / "model.safetensors", release.weights.read_bytes())
    shape = list(release.data.test_images.shape[1:])
    config = {"network": release.spec, "input": {"shape": shape, "range": [0, 1], "dtype": "float32"}}
    write_json(folder / "config.json", config | {"classes": list(release.data.classes)})
    card = card_of(release)
    write_atomically(folder / "README.md", str(card).encode())
    yield f"model card with {len(release.results)} results"


def card_of(release: Release) -> ModelCard:
    """The model card: its metadata with an ``EvalResult`` per accuracy, and its text."""
    setting, method, seed = release.name.split("/")
    citation = yaml_files.parse((release.root / "CITATION.cff").read_text(encoding="utf-8"))
    source = release.study.data.source
    data = ModelCardData(
        license=citation["license"].lower(),
        library_name="dynat",
        pipeline_tag="image-classification",
        tags=["adversarial-robustness", "adversarial-training", release.spec["name"], method],
        datasets=[HUB[source]] if source in HUB else None,
        model_name=f"{setting}-{method}-{seed}",
        eval_results=[_evaluation(release, each) for each in release.results],
    )
    recipe = release.params.recipe(setting, method).model_dump(exclude_defaults=True)
    return ModelCard.from_template(
        data,
        template_str=files("dynat.publish").joinpath("model_card.md").read_text("utf-8"),
        run=(setting, method, seed),
        epoch=load_weights(release.weights)[1]["epoch"],
        paper=paper_of(method),
        results=release.results,
        column=name,
        warnings=list(dict.fromkeys(text for each in release.results for text in each.warnings)),
        spec=release.study.data,
        data=release.data,
        recipe=json.dumps(recipe, indent=1),
        citation=citation,
    )


def _evaluation(release: Release, result: Result) -> EvalResult:
    measured, counted, source = result.measured, result.counted, release.study.data.source
    return EvalResult(
        task_type="image-classification",
        task_name="Image classification under attack",
        dataset_type=HUB.get(source, source),
        dataset_name=release.setting,
        dataset_split="test",
        metric_type="accuracy",
        metric_name=_title(result),
        metric_value=counted["accuracy"],
        metric_args={
            "attack": measured.attack if measured.kind == "attack" else "autoattack-standard",
            "epsilon": measured.epsilon if measured.attack != "clean" else "0",
            "norm": "Linf",
            "n": counted["n"],
            "interval": [counted["low"], counted["high"]],
            "confidence": 0.95,
            "precision": result.precision,
            "seed": measured.attack_seed,
            "warnings": result.warnings,
        },
    )


def _title(result: Result) -> str:
    """As ``PGD-20, epsilon 8/255, n 10000``: of one data set, no two results have one name."""
    measured = result.measured
    radius = "" if measured.attack == "clean" else f", epsilon {measured.epsilon}"
    return f"{name(measured.column)}{radius}, n {measured.n}"
