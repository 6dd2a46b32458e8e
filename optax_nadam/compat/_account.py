"""The account of a source: rules that all of it is held against while a reader makes a record of it.

What does not balance is a ValueError that names the entries and the way out:

========= ============================================================================================
entries   each entry of the state belongs to a parameter, each parameter has one or never stepped
numbers   steps are whole and not negative, products in [0, 1], moments finite, second ones not negative
class     the optimizer is a Nadam, or the Adam that was asked for, where the source tells
one       the source holds one optimizer, or the caller chooses one
names     names that are given agree with those that are stored
order     nothing is put in order by a name that something else in the source has too
schedule  a schedule that is read gives the learning rate that is stored
arrival   ``to_params`` puts each number of the moments into the params, unchanged
========= ============================================================================================

The last is checked once there is a ``to_params``, in :mod:`optax_nadam.compat._match`.
"""

from collections.abc import Collection, Hashable, Sequence
from typing import Any

import numpy as np

from optax_nadam.compat._checkpoint import Parameter
from optax_nadam.compat._common import as_numpy, listed

_IMPOSSIBLE = "{what} must be {rule}, got {got}. The source is damaged, or of another kind."
_ORPHANS = (
    "source has state of {orphans}, but its parameters are {known}: the two belong to different optimizers, or the keys"
    " were changed when it was written. Pass what {optimizer} saved, unchanged."
)
_TWICE = "source has {label!r} as a parameter more than once; each parameter has one place in one group."


def check_entries(optimizer: str, entries: Collection[Hashable], parameters: Sequence[Hashable]) -> None:
    """Rejects state that belongs to no parameter, and a parameter in two places."""
    known = set(parameters)
    if len(known) < len(parameters):
        raise ValueError(_TWICE.format(label=next(x for x in parameters if parameters.count(x) > 1)))
    orphans = [entry for entry in entries if entry not in known]
    if orphans:
        shown = listed(parameters) or "none"
        raise ValueError(_ORPHANS.format(orphans=listed(orphans), known=shown, optimizer=optimizer))


def parse_number(what: str, value: Any) -> float:
    """A number in an array of one element, or as it is."""
    array = as_numpy(value)
    if array.size != 1 or array.dtype == object or not np.isreal(array).all():
        raise ValueError(_IMPOSSIBLE.format(what=what, rule="a number", got=f"{value!r:.60}"))
    try:
        return float(array.item())
    except ValueError:
        raise ValueError(_IMPOSSIBLE.format(what=what, rule="a number", got=f"{value!r:.60}")) from None


def parse_steps(what: str, value: Any) -> int:
    """A number of steps: whole and not negative."""
    number = parse_number(what, value)
    if not (number >= 0 and number.is_integer()):
        raise ValueError(_IMPOSSIBLE.format(what=what, rule="whole and not negative", got=number))
    return int(number)


def check_parameter(label: Any, p: Parameter) -> None:
    """Rejects numbers that no Adam or Nadam has."""
    if p.product is not None and not 0 <= p.product <= 1:
        raise ValueError(
            _IMPOSSIBLE.format(what=f"the product of the momenta of {label!r}", rule="in [0, 1]", got=p.product)
        )
    if p.m.shape != p.v.shape:
        what = f"the second moment of {label!r}"
        raise ValueError(_IMPOSSIBLE.format(what=what, rule=f"of shape {p.m.shape}, as the first", got=p.v.shape))
    for name, x, rule, is_right in (
        ("first", p.m, "finite", np.isfinite(p.m)),
        ("second", p.v, "finite and not negative", np.isfinite(p.v) & (np.real(p.v) >= 0) & (np.imag(p.v) >= 0)),
    ):
        if not np.all(is_right):
            got = np.asarray(x)[~np.asarray(is_right)].flat[0]
            raise ValueError(_IMPOSSIBLE.format(what=f"the {name} moment of {label!r}", rule=rule, got=got))
