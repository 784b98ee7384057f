"""What only the stored outputs can prove: a witness of every broken sample, attacks and steps repeated.

Imports torch, as no other module of the audit does: to be imported after the CPU is pinned.
"""

import random
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from dynat.audit.link import Link, absent, broken, good
from dynat.audit.printed import Printed, Source, epsilon_of, kind_and_run
from dynat.config.attack import Attack
from dynat.data.splits import load, to_unit
from dynat.errors import UserError
from dynat.evaluation import whitebox
from dynat.evaluation.checkpoints import TRAIN
from dynat.evaluation.verdicts import decode
from dynat.methods import attacks
from dynat.methods.setup import is_compiled, set_up
from dynat.networks.weights import load_network, load_weights
from dynat.runtime.files import read_csv, read_json, sha256
from dynat.runtime.machine import convolutions, device_of, fingerprint
from dynat.runtime.stage import Run

FLOAT = 1e-6  # of the ball and of [0,1]
MARGIN = 1e-4  # of logits: other hardware rounds differently, and an attack stops as soon as it succeeds
SAMPLES = 20  # robust verdicts that are attacked again
REFUTED = 0.1  # the share of them that rounding does not explain
TOLERANCE = 1e-3  # relative, of a replayed loss on another kind of machine
FILES = {"best": "target.safetensors", "last": "target.last.safetensors", "ema": "target.ema.safetensors"}
FILES |= {TRAIN: FILES["last"]}


@dataclass
class Stored:
    """The network, images and evidence behind one source."""

    network: nn.Module
    images: Tensor  # uint8 [n,C,H,W]
    labels: Tensor  # int64 [n]
    robust: Tensor  # bool [n]
    indices: Tensor  # int64 [b]: samples with an adversarial image
    adversarial: Tensor  # float32 [b,C,H,W]


def witness(printed: Printed, source: Source) -> list[Link]:
    """Every verdict of a source against the stored weights and adversarial images.

    Raises :class:`UserError` if weights, data or witness are not here or unreadable.
    """
    kind, run = kind_and_run(source)
    study = printed.params.study[run.split("/")[0]]
    judged = getattr(study, kind)  # APGD-CE of AutoAttack is repeated as the attack of that name
    epsilon = epsilon_of(judged, source)
    if epsilon is None:
        raise UserError(f"{source['attack']}: params.yaml does not ask for this radius; run dvc repro")
    spec = study.attack.model_copy(update={"epsilon": epsilon, "seed": judged.seed})
    stored = _stored(printed, source, device_of(study.machine, f"study.{run.split('/')[0]}.machine"))
    about = f"{source['file'].removesuffix('.json')} {source['checkpoint']}/{source['attack']}"
    if faults := _faults(stored, spec.epsilon):
        again = "run dvc repro -f of the attack, or restore witness and verdicts with dvc checkout"
        return [broken("evidence", f"witness {about}", fault, again) for fault in faults]
    count = len(stored.indices)
    text = (
        f"{count} of {count} adversarial images lie in the ball of {spec.epsilon:.6g} and in [0,1] and fool "
        f"the stored weights, which err on {int((~stored.robust).sum()) - count} clean ones"
    )
    links = [good("evidence", f"witness {about}", text)]
    if not source["attack"].startswith("clean") and stored.robust.any():
        name = source["attack"] if kind == "attack" else "apgd-ce"
        links.append(_attack_again(stored, name, spec, f"robust {about}"))
    return links


def _stored(printed: Printed, source: Source, device: torch.device) -> Stored:
    _, run = kind_and_run(source)
    checkpoint, attack = source["checkpoint"], source["attack"]
    best, weights = (f"models/{run}/{FILES[each]}" for each in ("best", checkpoint))
    data = f"data/{run.split('/')[0]}.safetensors"
    images = source["verdicts"].replace(".verdicts.json", ".witness.safetensors")
    root = _needed(printed, weights, data, images)
    if sha256(root / best) != (read_json(root, source["file"]) or {}).get("model_sha256"):
        raise ValueError(f"{source['file']} is of other weights than {weights}")
    verdicts = (read_json(root, source["verdicts"]) or {})[checkpoint][attack]
    robust = torch.tensor(decode(verdicts["robust"], verdicts["n"]), device=device)
    splits, (network, _) = load(root / data, device), load_network(root / weights, device)
    natural, labels = splits[:2] if checkpoint == TRAIN else (splits.test_images, splits.test_labels)
    natural, labels = natural[: len(robust)], labels[: len(robust)]
    tensors, _ = load_weights(root / images)
    indices = tensors.get(f"{checkpoint}/{attack}/indices", torch.zeros(0, dtype=torch.long))
    adversarial = tensors.get(f"{checkpoint}/{attack}/images", torch.zeros(0, *natural.shape[1:]))
    return Stored(network, natural, labels, robust, indices.to(device), adversarial.to(device))


def _needed(printed: Printed, *names: str) -> Path:
    """The repository, if these files are there."""
    if missing := [name for name in names if not (printed.root / name).exists()]:
        raise UserError(f"{', '.join(missing)} not here; run dvc repro, or dvc pull from your remote")
    return printed.root


@torch.no_grad()
def _faults(stored: Stored, epsilon: float) -> list[str]:
    """What does not fit, counted; what is not a number is beyond every bound."""
    robust, indices, adversarial = stored.robust, stored.indices, stored.adversarial
    natural = to_unit(stored.images)
    images, labels = torch.cat([natural, adversarial]), torch.cat([stored.labels, stored.labels[indices]])
    with convolutions("fp32"):  # a training that was replayed before may have left TF32 on
        logits = torch.cat([stored.network(part) for part in images.split(500)])
    clean, attacked = attacks.margins(logits, labels).split([len(robust), len(indices)])
    has_witness = torch.zeros_like(robust)
    has_witness[indices] = True
    distance = (adversarial - natural[indices]).abs().flatten(1).amax(1)
    beyond = (adversarial - adversarial.clamp(0, 1)).abs().flatten(1).amax(1)
    counted = {
        f"adversarial images lie outside the ball of {epsilon:.6g}": ~(distance <= epsilon + FLOAT),
        "adversarial images leave [0,1]": ~(beyond <= FLOAT),
        "adversarial images are classified right by the stored weights": ~(attacked >= -MARGIN),
        "samples are called robust and have a witness": has_witness & robust,
        "samples are called broken without a witness": ~robust & ~has_witness & (clean < -MARGIN),
        "samples are called robust, but err already when clean": robust & (clean > MARGIN),
    }
    return [f"{int(flags.sum())} {what}" for what, flags in counted.items() if flags.any()]


def _attack_again(stored: Stored, name: str, spec: Attack, subject: str) -> Link:
    """Repeat an attack on a few robust samples, as the evaluation made it."""
    survivors = stored.robust.nonzero().squeeze(1).tolist()
    chosen = torch.tensor(random.sample(survivors, min(SAMPLES, len(survivors))), device=stored.robust.device)
    images, labels = stored.images[chosen], stored.labels[chosen]
    attack = "pgd" if name.startswith("pgd") else name
    found = whitebox.evaluate(stored.network, images, labels, spec, [attack], indices=chosen)[name]
    fallen, count = int((~found.robust).sum()), len(chosen)
    text = f"{count - fallen} of {count} random robust samples withstand {name} again"
    if fallen > max(1, REFUTED * count):
        return broken("evidence", subject, text, "their verdicts are wrong; run dvc repro -f of the attack")
    if fallen:
        return absent("evidence", subject, f"{text}; rounding or chance explains so few")
    return good("evidence", subject, text)


def replay(printed: Printed, run: str, steps: int) -> list[Link]:
    """The first training steps of ``run`` (``setting/method/seed``) against its recorded losses.

    Raises :class:`UserError` if data or ``trace.csv`` are not here.
    """
    setting, method, seed = run.split("/")
    trace, subject = f"models/{run}/trace.csv", f"replay {run}"
    if method in printed.params.checkpoint:
        return [absent("replay", subject, "weights trained elsewhere: no step of theirs can be repeated")]
    root = _needed(printed, trace, f"data/{setting}.safetensors")
    record = read_json(root, f"metrics/runs/train/{run}.json") or {}
    if (processes := record.get("processes", 1)) > 1:  # each had batch statistics of its own
        return [absent("replay", subject, f"not repeated: {processes} processes trained it, here is one")]
    study = printed.params.study[setting]
    recorded = read_csv(root, trace)[:steps]
    now = _losses(Run(setting, method, int(seed), printed.params), len(recorded))
    pairs = [(float(row[n]), losses[n]) for row, losses in zip(recorded, now, strict=True) for n in losses]
    gaps = [abs(one - two) / max(abs(two), 1e-12) for one, two in pairs]
    device = device_of(study.machine, f"study.{setting}.machine")
    machine = fingerprint(device).items()
    compiled = is_compiled(study, printed.params.recipe(setting, method), device.type)
    same = machine <= record.get("hardware", {}).items() and not compiled
    kind = "on the same kind of machine" if same else f"compiled anew or elsewhere, tolerance {TOLERANCE:g}"
    first = f"the first {len(recorded)} steps"
    worst = max(gaps, default=0.0)
    if not gaps or not all(gap <= (0 if same else TOLERANCE) for gap in gaps):
        text = f"the losses of {first} differ by up to {worst:.2g} {kind}"
        advice = "these code, data, parameters and seed did not train it; run dvc repro -f of the training"
        return [broken("replay", subject, text, advice)]
    how = f"within {worst:.2g}" if worst else "to the bit"
    return [good("replay", subject, f"{first} give the recorded losses {how}, {kind}")]


def _losses(run: Run, steps: int) -> list[dict[str, float]]:
    """Losses of the first steps of a training, as ``trace.csv`` names them."""
    training, _, _ = set_up(run)
    losses: list[dict[str, float]] = []
    for epoch in range(training.recipe.schedule.epochs):
        for number, batch in enumerate(islice(training.batches(epoch), steps - len(losses))):
            training.begin(epoch, number)
            done = training.engine.step(batch)
            losses.append({"target_loss": done.target_loss.item(), "guide_loss": done.guide_loss.item()})
    return losses
