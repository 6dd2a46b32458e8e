"""Each kind of checkpoint of docs/sources.md, continued here and there, and back."""

import contextlib

import numpy as np
import pytest
import torch

from optax_nadam import compat
from tests.compat.sources import continued, distance, from_params
from tests.compat.test_torch_sources import WARNS
from tests.parity.problem import gap
from tests.parity.record_torch import Theirs
from tests.parity.torch_sources import KINDS, LR, stopped

# After 8 further steps at lr = 0.01, in units of lr: measured at most 7e-5.
BOUND = 2e-4


@pytest.mark.parametrize("name", KINDS)
def test_a_checkpoint_is_continued_and_given_back(name, record_property):
    kind = KINDS[name]
    theirs, at, checkpoint, grads = stopped(kind)
    options = {"names": kind.names, "weights": at if kind.frozen else None}
    with pytest.warns(UserWarning, match=WARNS[name]) if name in WARNS else contextlib.nullcontext():
        end, state = continued(kind.module, checkpoint, at, grads, **options)
    expected = {key: x[-1] for key, x in theirs.run(grads).items()}
    record_property("there to here", distance(end, expected))
    assert distance(end, expected) < BOUND

    back = Theirs(expected, kind.make)

    def weights(params):
        arrays = from_params(params)
        return [arrays[key] for key in kind.order] if kind.order else arrays

    dumped = getattr(compat, kind.module).dump_state(
        state,
        weights,
        param_groups=back.optimizer.state_dict()["param_groups"],
        as_tensor=lambda x: torch.from_numpy(np.array(x)),
    )
    back.optimizer.load_state_dict(dumped)
    returned = gap(back.run(grads), theirs.run(grads), LR)
    record_property("back", returned)
    assert returned < BOUND
