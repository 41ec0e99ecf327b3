"""Random streams for dropout: where ranks must agree, and where they must differ.

Outside tensor-parallel regions (after an all-reduce) the ranks of a tp group drop the same
elements; inside (attention probabilities of local heads) each drops its own. Both streams restart
at every iteration from (seed, iteration, place in the grid), so a resumed run drops what an
uninterrupted one would, and no generator state has to be saved.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import torch

from neox.parallel.groups import ProcessGroups


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that is a pure function of `parts`, the same in every process."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class DropoutStreams:
    """The shared stream is torch's default generator; `local()` swaps the local one in."""

    def __init__(self, seed: int, groups: ProcessGroups) -> None:
        self._seed = seed
        self._groups = groups
        self._local_state: torch.Tensor | None = None

    def start_iteration(self, iteration: int) -> None:
        place = self._groups.topology.coordinate(self._groups.rank)
        torch.manual_seed(derive_seed(self._seed, iteration, "local", place.pp, place.dp, place.tp))
        self._local_state = self._get_state()
        torch.manual_seed(derive_seed(self._seed, iteration, "shared", place.pp, place.dp))

    @contextlib.contextmanager
    def local(self) -> Iterator[None]:
        """Draw from this rank's own stream inside the block. A no-op at tp 1."""
        if self._groups.tp == 1 or self._local_state is None:
            yield
            return
        shared = self._get_state()
        self._set_state(self._local_state)
        try:
            yield
        finally:
            self._local_state = self._get_state()
            self._set_state(shared)

    def recompute_contexts(self) -> tuple[contextlib.AbstractContextManager, ...]:
        """For torch.utils.checkpoint's context_fn: recomputation sees the local stream of forward.

        torch saves and restores its default generator itself; this does the same for ours.
        """
        state = self._local_state
        return contextlib.nullcontext(), self._rewound(state)

    @contextlib.contextmanager
    def _rewound(self, state: torch.Tensor | None) -> Iterator[None]:
        current, self._local_state = self._local_state, state
        try:
            yield
        finally:
            self._local_state = current

    def _get_state(self) -> torch.Tensor:
        if self._groups.device.type == "cuda":
            return torch.cuda.get_rng_state(self._groups.device)
        return torch.get_rng_state()

    def _set_state(self, state: torch.Tensor) -> None:
        if self._groups.device.type == "cuda":
            torch.cuda.set_rng_state(state, self._groups.device)
        else:
            torch.set_rng_state(state)
