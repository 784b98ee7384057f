"""Every shipped recipe and some altered ones, each beside its published step written out plainly."""

from pathlib import Path
from typing import Any

import torch
import yaml
from helpers import Tiny, random_images, random_labels, stream
from published_distillation import (
    adaad,
    ard,
    dynat_robust_guide,
    iad,
    rslad,
    saad,
    soft_labels_of_a_trained_guide,
)
from published_steps import (
    Step,
    dynat,
    dynat_fat,
    dynat_gairat,
    dynat_mail,
    fat,
    gairat,
    lbgat,
    mail,
    mart,
    natural,
    rice,
    sat,
    trades,
    trades_awp,
)

from dynat.config.recipe import Recipe
from dynat.methods.batches import Batch

PARAMS = yaml.safe_load((Path(__file__).parents[1] / "params.yaml").read_text())
LBGAT = {
    "epochs": 100,
    "lr": 0.1,
    "first_epoch_lr": 0.02,
    "drops": {75: 0.1, 90: 0.01},
    "weight_decay": 2e-4,
}
LONG = {"epochs": 120, "lr": 0.01, "drops": {75: 0.1, 90: 0.01, 100: 0.001}, "weight_decay": 3.5e-3}
STRONG = {"epsilon": 0.2, "step": 0.05}  # so that kappa and the early stop differ between samples


def shipped(name: str, **changes: Any) -> Recipe:
    return Recipe(**PARAMS["recipes"][name] | changes)


def recipe(inner: dict[str, Any], outer: dict[str, Any], target: list[str], **more: Any) -> Recipe:
    schedule = more.pop("schedule", LONG)
    forwards = {"target": target, "guide": more.pop("guide", 1)}
    return Recipe(inner=inner, outer=outer, batch_norm=forwards, schedule=schedule, **more)


KL, CE = {"loss": "kl", "start": "gaussian"}, {"loss": "ce", "start": "gaussian"}
MSE_KL = {"adversarial": "mse", "beta": 6}
AWP_GUIDE = {"gamma": 0.005, "labels": "guide", "objective": {"adversarial": "ce"}}
GAIRAT = {"rule": "gairat", "begin": 60}
FRIENDLY = STRONG | {"start": "uniform", "stop": {"budget": {0: 0, 50: 1, 90: 2}, "noise": 0.001}}

# name: (recipe, published step, {epoch: learning rate})
CASES: dict[str, tuple[Recipe, Step, dict[int, float]]] = {
    "natural": (shipped("natural"), natural, {0: 0.1, 90: 0.001}),
    "pgd_at": (shipped("pgd_at"), rice(awp=False, loss_check=True), {0: 0.1, 100: 0.01}),
    "trades": (shipped("trades"), trades, {0: 0.1, 74: 0.01}),
    "at_awp": (shipped("at_awp"), rice(awp=True, loss_check=True), {0: 0.1, 1: 0.1}),
    "trades_awp": (shipped("trades_awp"), trades_awp, {8: 0.1, 9: 0.1}),
    "dynat": (shipped("dynat"), dynat("kl"), {0: 0.02, 1: 0.1}),
    "dynat_inner": (shipped("dynat_inner"), dynat("dynamic"), {0: 0.02, 1: 0.1}),
    "dynat_inner_alpha": (
        shipped("dynat_inner", alpha=0.2),
        dynat("dynamic", alpha=0.2),
        {0: 0.02, 75: 0.01},
    ),
    "dynat_ordinary_pgd": (
        shipped("dynat", inner=CE, batch_norm={"target": ["adversarial", "natural"]}),
        dynat("ce"),
        {0: 0.02, 90: 0.001},
    ),
    "dynat_awp_b0": (shipped("dynat_awp_b0"), dynat("kl", awp=True, guide=2), {8: 0.1, 9: 0.1}),
    "dynat_awp": (shipped("dynat_awp"), dynat("kl", beta=1, awp=True, guide=2), {8: 0.1, 9: 0.1}),
    "dynat_awp_cifar100": (
        shipped("dynat_awp", alpha=0.2),
        dynat("kl", alpha=0.2, beta=1, awp=True, guide=2),
        {10: 0.1, 11: 0.1},
    ),
    "dynat_inner_awp": (
        shipped("dynat_inner_awp"),
        dynat("dynamic", beta=1, awp=True, guide=2),
        {8: 0.1, 9: 0.1},
    ),
    "mart": (
        shipped("mart", outer={"adversarial": "bce", "beta": 5, "kl": "mart"}),
        mart,
        {0: 0.1, 74: 0.01},
    ),
    "fat": (
        shipped("fat", inner=PARAMS["recipes"]["fat"]["inner"] | STRONG),
        fat,
        {49: 0.1, 50: 0.1},
    ),
    "gairat": (
        shipped("gairat", inner=PARAMS["recipes"]["gairat"]["inner"] | STRONG),
        gairat(59, dynamic=False),
        {58: 0.1, 59: 0.01},
    ),
    "lbgat0": (shipped("lbgat0"), lbgat(0), {0: 0.02, 1: 0.1}),
    "lbgat6": (shipped("lbgat6"), lbgat(6), {0: 0.02, 75: 0.01}),
    "mail_at": (shipped("mail_at"), mail("ce", 76), {75: 0.001, 76: 0.001}),
    "mail_trades": (shipped("mail_trades"), mail("kl", 76), {75: 0.001, 76: 0.001}),
    "sat": (shipped("sat"), sat, {10: 0.1, 40: 0.1}),
    "mail_mse": (shipped("mail_mse"), dynat_mail(False, mse=True), {75: 0.001, 76: 0.001}),
    "dynat_modern": (  # the last step of the epochs 49 and 99
        shipped("dynat_modern"),
        dynat("kl", smoothing=0.1),
        {49: 0.05, 99: 0.0},
    ),
    "dynat_at_mail": (shipped("dynat_at_mail"), dynat_mail(False), {75: 0.001, 76: 0.001}),
    "dynat_mail_inner": (shipped("dynat_mail_inner"), dynat_mail(True), {75: 0.001, 76: 0.001}),
    "dynat_gairat": (
        shipped("dynat_gairat", inner=PARAMS["recipes"]["dynat_gairat"]["inner"] | STRONG),
        dynat_gairat(False),
        {69: 0.01, 70: 0.01},
    ),
    "dynat_inner_gairat": (
        shipped("dynat_inner_gairat", inner=PARAMS["recipes"]["dynat_inner_gairat"]["inner"] | STRONG),
        dynat_gairat(True),
        {69: 0.01, 70: 0.01},
    ),
    "lbgat_awp_on_dynamic_labels": (
        recipe(KL, MSE_KL, ["adversarial", "natural"], awp=AWP_GUIDE, schedule=LBGAT),
        lbgat(6, awp="label"),
        {0: 0.02, 1: 0.1},
    ),
    "lbgat_awp": (shipped("lbgat_awp"), lbgat(6, awp="trades"), {8: 0.1, 9: 0.1}),
    "ard": (shipped("ard"), ard, {0: 0.1, 150: 0.01}),
    "rslad": (shipped("rslad"), rslad, {0: 0.1, 285: 0.0001}),
    "iad": (shipped("iad"), iad, {60: 0.1, 150: 0.01}),
    "adaad": (shipped("adaad"), adaad, {0: 0.1, 150: 0.001}),
    "saad": (shipped("saad"), saad, {0: 0.1, 150: 0.001}),
    "dynat_robust_guide": (shipped("dynat_robust_guide"), dynat_robust_guide, {0: 0.02, 1: 0.1}),
    "soft_labels_of_a_trained_guide": (
        recipe(
            {"loss": "kl_guide", "start": "uniform"},
            {"natural_ce": 0.7, "adversarial": "none", "soft": {"adversarial": 1, "temperature": 2}},
            ["natural", "adversarial"],
            alpha=0.3,
        ),
        soft_labels_of_a_trained_guide,
        {0: 0.01, 75: 0.001},
    ),
    "dynat_inner_gairat_kappa_of_truth": (
        recipe(
            {"loss": "ce_dynamic", "start": "uniform"} | STRONG,
            {"adversarial": "ce"},
            ["adversarial"],
            labels="guide",
            weights=GAIRAT | {"against": "truth"},
            guide=2,
        ),
        gairat(60, dynamic=True, count_truth=True),
        {60: 0.01, 61: 0.01},
    ),
    "dynat_fat": (
        recipe(FRIENDLY | {"loss": "ce_dynamic"}, {"adversarial": "ce"}, ["adversarial"], labels="guide"),
        dynat_fat,
        {49: 0.01, 50: 0.01},
    ),
}


def draw(choice: Recipe, seed: int, count: int = 6) -> Batch:
    images = random_images(seed, count)
    sample = torch.rand if choice.inner.start == "uniform" else torch.randn
    start = sample(images.shape, generator=stream(seed), dtype=torch.float64)
    jitter = torch.randn((choice.inner.steps, *images.shape), generator=stream(seed + 1), dtype=torch.float64)
    return Batch(images, random_labels(seed, count), start, jitter if choice.inner.stop else None)


def networks() -> tuple[Tiny, Tiny]:
    """Target and guide, with statistics that have seen something."""
    target, guide = Tiny(0), Tiny(1, width=5)
    with torch.no_grad():
        for network in (target, guide):
            network(random_images(50))
    return target, guide
