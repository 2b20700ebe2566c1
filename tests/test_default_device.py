"""Nothing is made on the default device of the caller's, on which no tensor has values here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.public import IMAGES, PUBLIC, make_net, plain


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_function_gives_the_same_under_another_default_device(name):
    expected, net = plain(PUBLIC[name](make_net(), IMAGES)), make_net()
    with torch.device("meta"):
        found = PUBLIC[name](net, IMAGES)
    np.testing.assert_equal(plain(found), expected)
