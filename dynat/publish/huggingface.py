"""A folder for the Hugging Face hub: safetensors, ``config.json`` and a model card with its results."""

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from dynat.config import yaml_files
from dynat.networks.weights import load_weights
from dynat.paper.cells import name
from dynat.publish.audited import Release, Result
from dynat.publish.papers import Paper, paper_of
from dynat.runtime.files import write_atomically, write_json

HUB = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}  # the hub's names
KINDS = {"digits": "scikit-learn-digits"}  # of data that the hub has not


def write(release: Release, folder: Path) -> Iterator[str]:
    """Write ``model.safetensors``, the very bytes of the audit, ``config.json`` and ``README.md``."""
    write_atomically(folder / "model.safetensors", release.weights.read_bytes())
    shape = list(release.data.test_images.shape[1:])
    config = {"network": release.spec, "input": {"shape": shape, "range": [0, 1], "dtype": "float32"}}
    write_json(folder / "config.json", config | {"classes": list(release.data.classes)})
    card = card_of(release)
    write_atomically(folder / "README.md", str(card).encode())
    yield f"model card with {len(card.data.eval_results or ())} results"


def card_of(release: Release) -> ModelCard:
    """The model card: its metadata with an ``EvalResult`` per accuracy, and its text."""
    setting, method, seed = release.name.split("/")
    citation = yaml_files.parse((release.root / "CITATION.cff").read_text(encoding="utf-8"))
    source, paper = release.study.data.source, paper_of(method)
    data = ModelCardData(
        license=citation["license"].lower(),
        library_name="dynat",
        pipeline_tag="image-classification",
        tags=["adversarial-robustness", "adversarial-training", release.spec["name"], method],
        datasets=[HUB[source]] if source in HUB else None,
        model_name=f"{setting}-{method}-{seed}",
        eval_results=[_evaluation(release, each) for each in release.results],
    )
    warnings = dict.fromkeys(text for each in release.results for text in each.warnings)
    recipe = release.params.recipe(setting, method).model_dump(exclude_defaults=True)
    return ModelCard.from_template(
        data,
        template_str=files("dynat.publish").joinpath("model_card.md").read_text("utf-8"),
        title=f"{method} on {setting}",
        setting=setting,
        method=method,
        seed=seed,
        epoch=load_weights(release.weights)[1]["epoch"],
        paper=paper,
        results=[_row(each) for each in release.results],
        warnings=list(warnings),
        shape=[None, *release.data.test_images.shape[1:]],
        data=_training_data(release),
        recipe=json.dumps(recipe, indent=1),  # which is YAML, too
        licence=citation["license"],
        citation="\n\n".join(_bibtex(each) for each in _cited(paper, citation)),
    )


def _evaluation(release: Release, result: Result) -> EvalResult:
    measured, counted, source = result.measured, result.counted, release.study.data.source
    return EvalResult(
        task_type="image-classification",
        task_name="Image classification under attack",
        dataset_type=HUB.get(source, KINDS.get(source, source)),
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


def _row(result: Result) -> dict[str, Any]:
    measured, counted = result.measured, result.counted
    text = "{accuracy:.2f} [{low:.1f}, {high:.1f}]".format(**counted)
    radius = "" if measured.attack == "clean" else measured.epsilon
    about = {"name": name(measured.column), "epsilon": radius, "text": text}
    return about | {"n": counted["n"], "precision": result.precision}


def _training_data(release: Release) -> str:
    spec, data = release.study.data, release.data
    counts = [f"{len(data.train_labels):,} images to train on"]
    counts += [f"{len(data.validation_labels):,} held out, by which the epoch was chosen"]
    counts += [f"{len(data.test_labels):,} to test with"]
    checked = next((f", {kind} {value}" for kind in ("sha256", "md5") if (value := getattr(spec, kind))), "")
    archive = f" (`{spec.archive}`{checked})" if spec.archive else " (inside scikit-learn)"
    return f"{spec.source}{archive}: {', '.join(counts)}; {len(data.classes)} classes."


def _cited(paper: Paper, citation: dict[str, Any]) -> list[Paper]:
    """The method's paper, where it has one, and the software."""
    own = citation["preferred-citation"]["url"]
    software = Paper(key="dynat", link=own, name=citation["title"], authors="", venue=citation["version"])
    software["authors"] = ", ".join(each["name"] for each in citation["authors"])
    return [software] if not paper["authors"] else [paper, software]


def _bibtex(paper: Paper) -> str:
    """An entry of BibTeX, its year the last number of four digits in key or venue."""
    year = [*re.findall(r"\d{4}", f"{paper['key']} {paper['venue']}")]
    fields = {"title": f"{{{paper['name']}}}", "author": paper["authors"].replace(", ", " and ")}
    fields |= {"howpublished": paper["venue"], "url": paper["link"]} | ({"year": year[-1]} if year else {})
    lines = [f"  {key} = {{{value}}}" for key, value in fields.items()]
    return f"@misc{{{paper['key']},\n" + ",\n".join(lines) + "\n}"
