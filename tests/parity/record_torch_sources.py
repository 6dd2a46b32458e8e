"""Records each kind of checkpoint of torch and timm, for the tests that run without them.

python -m tests.parity.record_torch_sources
"""

import json
from typing import Any

import numpy as np
import torch

from tests.compat.sources import RECORDINGS, encode
from tests.parity.torch_sources import KINDS, stopped


def main():
    """Writes ``torch_sources.npz`` and ``.json``."""
    arrays: list[np.ndarray] = []
    facts = {}
    for name, kind in KINDS.items():
        theirs, at, checkpoint, grads = stopped(kind)
        then = {key: x[-1] for key, x in theirs.run(grads).items()}
        tensors = {
            key: {k: torch.from_numpy(np.array(x)) for k, x in tree.items()}
            for key, tree in (("at", at), ("then", then))
        }
        options = {"module": kind.module, "names": kind.names, "order": kind.order, "frozen": list(kind.frozen)}
        facts[name] = encode({"checkpoint": checkpoint, **tensors, **options}, arrays)
    numbered: Any = {str(i): x for i, x in enumerate(arrays)}
    np.savez_compressed(RECORDINGS / "torch_sources.npz", **numbered)
    (RECORDINGS / "torch_sources.json").write_text(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
