"""scikit-learn's digits become one deterministic file, split as promised."""

from pathlib import Path

import numpy as np
import pytest
from source_helpers import prepared, refused


def test_digits_are_scikit_learns_scaled_to_bytes_and_rounded(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    found = prepared(tmp_path, source="digits", classes=10, test=500, validation=100)
    whole = load_digits()
    expected = np.floor(whole.images * (255 / 16) + 0.5).astype(np.uint8)  # 0 -> 0, 8 -> 128, 16 -> 255
    pairs = sorted((image.tobytes(), int(label)) for image, label in zip(expected, whole.target, strict=True))
    splits = [
        (image.tobytes(), int(label))
        for split in ("train", "validation", "test")
        for image, label in zip(found[f"{split}_images"], found[f"{split}_labels"], strict=True)
    ]
    assert sorted(splits) == pairs  # every digit in exactly one split, with its label
    assert found["train_images"].shape == (1197, 1, 8, 8)
    assert found["test_images"].dtype == np.uint8


@pytest.mark.parametrize("split", ["validation", "test"])
def test_digit_splits_hold_every_class_in_proportion(tmp_path: Path, split: str) -> None:
    found = prepared(tmp_path, source="digits", classes=10, test=500, validation=100)
    labels = found[f"{split}_labels"]
    whole = np.bincount(np.concatenate([found[f"{name}_labels"] for name in ("train", "validation", "test")]))
    assert len(labels) == {"validation": 100, "test": 500}[split]
    assert np.all(np.abs(np.bincount(labels) - whole * len(labels) / 1797) <= 1.5)


def test_split_seed_moves_validation_but_never_the_test_set(tmp_path: Path) -> None:
    spec = {"source": "digits", "classes": 10, "test": 500, "validation": 100}
    first, other = (prepared(tmp_path, **spec, split_seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(first["test_images"], other["test_images"])
    assert not np.array_equal(first["validation_images"], other["validation_images"])


def test_the_test_set_is_the_one_that_the_committed_numbers_are_of(tmp_path: Path) -> None:
    found = prepared(tmp_path, source="digits", classes=10, test=400, validation=100)
    assert found["test_labels"][:12].tolist() == [1, 4, 8, 6, 5, 9, 9, 1, 3, 2, 2, 2]


def test_impossible_validation_split_is_refused_by_its_key(tmp_path: Path) -> None:
    message = refused(tmp_path, source="digits", classes=10, test=500, validation=5)
    assert message.startswith("data.validation: 5 of 1297")
