"""A recipe is five free choices: what makes sense is accepted and runs, what does not is refused with why."""

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import Tiny, random_images, random_labels
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dynat.config.fields import describe
from dynat.config.params import Params, load
from dynat.config.recipe import Recipe
from dynat.config.train import Train, rescale
from dynat.methods.batches import Batch
from dynat.methods.step import Engine

PARAMS = load(Path(__file__).parents[2] / "params.yaml")
SCHEDULE = {"epochs": 100, "lr": 0.1, "weight_decay": 5e-4}
ATTACK = {"loss": "ce", "start": "uniform", "epsilon": 8 / 255, "step": 2 / 255}

# Why a recipe is refused, and the choices that make it so in an otherwise plain adversarial training.
CONTRADICTIONS = """
outer: no term is switched on | outer.adversarial=none
outer.kl=mart: needs outer.beta above 0 | outer.kl=mart
labels=guide: no term uses a label | labels=guide NATURAL outer.beta=6
alpha: there is no adversarial term | alpha=0.5 NATURAL outer.beta=6
inner.steps: no term uses the adversarial examples; set 0 | NATURAL
inner.steps=0: makes the KL of outer.beta always 0 | inner.steps=0 outer.beta=6
inner.stop.budget: never reached | inner.stop.budget.100=1
inner.epsilon: Input should be greater than 0 | inner.epsilon=0
inner.step: Input should be greater than 0 | inner.step=0
weights.rule: there is no robust term | weights.rule=mail inner.steps=0 NATURAL
weights.rule: gairat counts inner.steps | weights.rule=gairat inner.steps=0
weights.begin: never reached | weights.rule=mail weights.begin=100
smoothing.target: no cross entropy | smoothing.target=0.1 outer.adversarial=bce
smoothing.guide: there is no guide | smoothing.guide=0.1
batch_norm.guide: there is no guide | batch_norm.guide=2
batch_norm.target: list adversarial, which outer forwards | batch_norm.target=[]
batch_norm.target: list natural, which outer forwards | batch_norm.target=[adversarial] outer.beta=1
batch_norm.guide: Input should be greater than or equal to 1 | labels=guide batch_norm.guide=0
inner.stop.ramp_until: never reached | inner.stop.ramp_until=102
awp.objective: no term is switched on | awp.gamma=0.01 awp.objective.adversarial=none
awp.objective.kl=mart: needs awp.objective.beta above 0 | awp.gamma=0.01 awp.objective.kl=mart
awp.objective.adversarial=mse: there is no guide | awp.gamma=0.01 awp.objective.adversarial=mse
awp.labels=guide: there is no guide | awp.gamma=0.01 awp.labels=guide awp.objective={}
awp.labels=guide: no term of awp uses a label | labels=guide awp.labels=guide PROXY
awp.begin: never reached | awp.gamma=0.01 awp.begin=100 awp.objective={}
schedule.drops: never reached | schedule.drops.100=0.1
guide=frozen: no choice reads a guide | guide=frozen
smoothing.guide: there is no guide | labels=guide guide=frozen smoothing.guide=0.1
batch_norm.guide: there is no guide | labels=guide guide=frozen batch_norm.guide=2
inner.loss=kl_guide_moving: reads the guide on x', which needs guide=frozen | inner.loss=kl_guide_moving
inner.loss=kl_guide_linear: reads the guide on x', which needs guide=frozen | inner.loss=kl_guide_linear
weights.rule=iad: reads the guide on x', which needs guide=frozen | weights.rule=iad
weights.rule=saad: reads the guide on x', which needs guide=frozen | weights.rule=saad
outer.soft: reads the guide on x', which needs guide=frozen | outer.soft.adversarial=1 MOVED
outer.soft: reads the guide on x', which needs guide=frozen | outer.soft.gradient=1
outer.soft.gradient: needs inner.steps above 0 | guide=frozen outer.soft.gradient=1 inner.steps=0
awp.objective.soft: there is no guide | awp.gamma=0.01 awp.objective.soft.natural=1
awp.objective.soft.gradient: is a term of outer alone | guide=frozen SOFT awp.objective.soft.gradient=1
batch_norm.target: list mirrored, which outer forwards | guide=frozen GRADIENT batch_norm.target=[adversarial]
weights.terms=kl: needs outer.beta above 0 | weights.rule=mail weights.terms=kl
inner.steps: no term uses the adversarial examples; set 0 | outer.adversarial=none outer.soft.natural=1
""".strip().splitlines()
SHORT = {
    "NATURAL": "outer.natural_ce=true outer.adversarial=none",
    "MOVED": "outer.soft.at=adversarial",
    "SOFT": "outer.soft.adversarial=1 awp.gamma=0.01",
    "GRADIENT": "outer.soft.gradient=1",
    "PROXY": "awp.gamma=0.01 awp.objective.natural_ce=true awp.objective.adversarial=none",
}


def plain(*overrides: str) -> Recipe:
    """Adversarial training on the cross entropy, with a few choices changed."""
    values: dict[str, Any] = {
        "inner": dict(ATTACK),
        "outer": {"adversarial": "ce"},
        "schedule": dict(SCHEDULE),
    }
    for override in overrides:
        path, _, text = override.partition("=")
        *heads, last = path.split(".")
        section = values
        for head in heads:
            section = section.setdefault(head, {})
        section[last] = yaml.safe_load(text)
    return Recipe(**values)


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradictory_recipe_is_refused_with_the_reason(case: str) -> None:
    reason, text = case.split(" | ")
    for short, long in SHORT.items():
        text = text.replace(short, long)
    with pytest.raises(ValidationError) as caught:
        plain(*text.split())
    assert ": ".join(describe(caught.value)).startswith(reason)


def reads(objective: dict[str, Any]) -> set[str]:
    """What the terms of an objective look at: truth, label, attacked image, the guide's logits."""
    terms = {"truth"} if objective["natural_ce"] else set()
    adversarial = {"none": set(), "ce": {"x'", "label"}, "bce": {"x'", "label"}, "mse": {"x'", "guide"}}
    terms |= adversarial[objective["adversarial"]]
    if objective["beta"]:
        terms |= {"x'", "kl"} | ({"label"} if objective["kl"] == "mart" else set())
    return terms


def makes_sense(labels: str, inner: Any, outer: Any, weights: Any, awp: Any) -> bool:
    """An independent statement of what the five choices must have in common."""
    learnt, attacked, weighted = reads(outer), inner["steps"] > 0, weights["rule"] != "uniform"
    ascended = reads(awp["objective"]) if awp else set()
    guide = labels == "guide" or inner["loss"] == "ce_dynamic" or "guide" in learnt
    demands = [
        learnt,  # there is something to learn
        outer["kl"] == "plain" or "kl" in learnt,  # a weighted KL is there
        labels == "truth" or "label" in learnt or (weighted and weights["against"] == "label"),
        "x'" in learnt or not weighted,  # weights have a robust term to weight
        attacked or weights["rule"] != "gairat",  # GAIRAT counts steps
        attacked or "kl" not in learnt | ascended,  # a KL compares two different images
        not attacked or "x'" in learnt | ascended,  # an attack is used
    ]
    if awp:
        demands += [
            ascended,
            awp["objective"]["kl"] == "plain" or "kl" in ascended,
            guide or "guide" not in ascended,
            awp["labels"] == "truth" or (guide and "label" in ascended),
        ]
    return all(demands)


KINDS = itertools.product([False, True], ["none", "ce", "bce", "mse"], [0, 6], ["plain", "mart"])
OBJECTIVES = [dict(zip(("natural_ce", "adversarial", "beta", "kl"), kind, strict=True)) for kind in KINDS]
CHOICES = list(
    itertools.product(
        ["truth", "guide"],
        [{**ATTACK, "loss": loss, "steps": n} for loss in ("ce", "kl", "ce_dynamic") for n in (0, 2)],
        OBJECTIVES,
        [{"rule": r, "against": a} for r in ("uniform", "gairat", "mail") for a in ("label", "truth")],
        [
            None,
            *({"gamma": 0.01, "labels": x, "objective": o} for x in ("truth", "guide") for o in OBJECTIVES),
        ],
    )
)


def accepted(labels: str, inner: Any, outer: Any, weights: Any, awp: Any) -> Recipe | None:
    try:
        return Recipe(labels=labels, inner=inner, outer=outer, weights=weights, awp=awp, schedule=SCHEDULE)
    except ValidationError:
        return None


def test_exactly_the_combinations_that_make_sense_are_accepted() -> None:
    sensible = [choice for choice in CHOICES if makes_sense(*choice)]
    generator = random.Random(0)
    for choice in generator.sample(CHOICES, 3000) + generator.sample(sensible, 3000):
        assert (accepted(*choice) is not None) == makes_sense(*choice), choice


def test_any_combination_that_makes_sense_trains() -> None:
    images, truth, start = random_images(0).float(), random_labels(1), random_images(2).float()
    generator = random.Random(1)
    for choice in generator.sample([choice for choice in CHOICES if makes_sense(*choice)], 20):
        recipe = accepted(*choice)
        assert recipe is not None
        engine = Engine(recipe, Tiny(0).float(), Tiny(1).float() if recipe.needs_guide else None)
        before = [p.clone() for p in engine.target.parameters()]
        engine.set_epoch(1)
        assert torch.isfinite(engine.step(Batch(images, truth, start, None)).target_loss), choice
        after = list(engine.target.parameters())
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)), choice


FULL = plain(
    "inner.noise=0.001", "inner.stop.noise=0.002", "inner.stop.budget.0=0", "inner.stop.budget.50=1",
    "inner.stop.ramp_until=80", "awp.gamma=0.01", "awp.begin=10", "awp.objective={}", "weights.rule=mail",
    "weights.begin=75", "schedule.first_epoch_lr=0.02", "schedule.drops.75=0.1", "schedule.drops.90=0.01",
)  # fmt: skip


def test_a_study_without_numbers_of_its_own_leaves_every_recipe_as_it_is() -> None:
    assert rescale(FULL, Train()) == FULL
    bare = [
        name
        for name, study in PARAMS.study.items()
        if all(getattr(study.train, key) is None for key in TRAIN_NUMBERS)
    ]
    assert {"cifar10_wrn34_10", "cifar100_wrn34_10"} <= set(bare)
    for setting, (name, recipe) in itertools.product(bare, PARAMS.recipes.items()):
        if setting not in recipe.per_study:
            assert PARAMS.recipe(setting, name) == recipe.model_copy(update={"per_study": {}})


TRAIN_NUMBERS = ("epsilon", "epochs", "lr", "weight_decay", "steps")


def test_epsilon_scales_step_and_noise() -> None:
    inner = rescale(FULL, Train(epsilon=0.157)).inner
    assert inner.stop is not None
    found = [inner.epsilon, inner.step, inner.noise, inner.stop.noise]
    assert found == pytest.approx([0.157, 0.157 / 4, 0.157 * 0.001 * 255 / 8, 0.157 * 0.002 * 255 / 8])


@settings(deadline=None)
@given(st.floats(1e-6, 1), st.floats(1e-3, 1), st.floats(1e-6, 1))
@example(own=0.15, share=1.0, other=0.7)  # 0.15 * (0.7 / 0.15) > 0.7
def test_any_epsilon_keeps_a_step_inside_the_ball(own: float, share: float, other: float) -> None:
    recipe = plain(f"inner.epsilon={own!r}", f"inner.step={own * share!r}")
    inner = rescale(recipe, Train(epsilon=other)).inner
    assert inner.step <= inner.epsilon == other
    assert rescale(recipe, Train(epsilon=own)) == recipe


def test_epochs_scale_everything_that_happens_at_an_epoch() -> None:
    half = rescale(FULL, Train(epochs=50))
    assert (half.schedule.epochs, half.schedule.drops) == (50, {37: 0.1, 45: 0.01})
    assert half.inner.stop is not None
    assert (half.inner.stop.budget, half.inner.stop.ramp_until) == ({0: 0, 25: 1}, 40)
    assert half.awp is not None
    assert (half.awp.begin, half.weights.begin) == (5, 37)


@given(st.integers(1, 3000))
def test_any_number_of_epochs_keeps_every_drop_within_the_training_and_after_its_start(epochs: int) -> None:
    drops = rescale(FULL, Train(epochs=epochs)).schedule.drops
    assert all(0 < epoch < epochs for epoch in drops)
    assert epochs == 1 or drops[max(drops)] == 0.01


def test_lr_scales_the_first_epoch_and_the_rest_is_taken_as_it_is() -> None:
    found = rescale(FULL, Train(lr=0.05, weight_decay=1e-4, steps=3))
    schedule = found.schedule
    assert (schedule.lr, schedule.first_epoch_lr, schedule.weight_decay) == (0.05, 0.01, 1e-4)
    assert (found.inner.steps, found.inner.step, schedule.drops) == (3, FULL.inner.step, FULL.schedule.drops)


def test_a_recipe_without_an_attack_gets_none_from_the_study() -> None:
    assert PARAMS.recipe("digits", "natural").inner.steps == 0
    natural = plain("inner.steps=0")
    assert rescale(natural, Train(steps=5, epsilon=0.1)).inner.steps == 0


def params(**changes: Any) -> Params:
    values = PARAMS.model_dump()
    values["recipes"]["dynat"]["per_study"] = {
        "cifar10_wrn34_10": {"alpha": 0.2, "inner": {"step": 2 / 255}, "schedule": {"drops": {60: 0.5}}}
    }
    return Params(**values | changes)


def test_per_study_changes_its_own_keys_in_its_own_setting_alone() -> None:
    own, found = PARAMS.recipes["dynat"], params().recipe("cifar10_wrn34_10", "dynat")
    expected = own.model_dump()
    expected["alpha"], expected["inner"]["step"], expected["schedule"]["drops"] = 0.2, 2 / 255, {60: 0.5}
    assert found == Recipe(**expected)
    assert params().recipe("cifar100_wrn34_10", "dynat") == PARAMS.recipe("cifar100_wrn34_10", "dynat")


def test_alpha_overrides_the_variants_and_nothing_else() -> None:
    usual, swept = params(variants=["dynat"]), params(variants=["dynat"], alpha=0.7)
    for setting, name in itertools.product(swept.study, swept.recipes):
        expected = usual.recipe(setting, name).model_copy(update={"alpha": 0.7} if name == "dynat" else {})
        assert swept.recipe(setting, name) == expected
