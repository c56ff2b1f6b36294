"""timm's RandAugment by its string, and its random draws by a seed; PyTorch is imported once it is made."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from emcl.errors import UserError


def rand_augment(name: str) -> Any:
    """timm's RandAugment of a string, as `Augmentation`: a function of a PIL image.

    Raises:
        UserError: timm does not accept the string.
    """
    from timm.data.auto_augment import rand_augment_transform

    try:
        return rand_augment_transform(name, {"translate_const": 100})
    except Exception as error:
        reason = f": {error}" if str(error) else ""
        raise UserError(f"data.augment={name} is neither `none` nor a timm RandAugment string{reason}") from None


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """`random` and NumPy's global generator seeded so within; both states are restored afterwards."""
    state, numpy_state = random.getstate(), np.random.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
