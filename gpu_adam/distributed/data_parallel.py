"""Replicated training: every rank has all variables and slots, and steps by the mean of all ranks' gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gpu_adam.adam import Adam
from gpu_adam.autodiff_seam import refuse_in_loss
from gpu_adam.communicators import Communicator
from gpu_adam.distributed.agreement import agree, check_communicator, described
from gpu_adam.distributed.gathered import GatheredGradients
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.rules import truth_value
from gpu_adam.state.atomic_file import PathOrFile
from gpu_adam.state.pending_save import PendingSave
from gpu_adam.step import request as requests
from gpu_adam.step.gradients import Incoming
from gpu_adam.step.guard import checked_scale


class DataParallelAdam(Adam):
    """Adam on several ranks, each of which has all variables and computes gradients of its own part of a batch.

    A step is Adam's by the mean of the ranks' gradients::

        g    = (g of rank 0 + g of rank 1 + ...) (1 / ranks)       with accumulation="sum" without the division

    The slices of an IndexedSlices are joined in the order of ranks, and divided by their number. What Adam does with
    gradients, clipping first, it does with the mean. Variables must begin equal in all ranks
    (``communicator.broadcast(variable.value).wait()``), and every rank makes the same calls, with gradients for the
    same variables, in the same order; they stay equal then, to the bit.

    Args:
        communicator: of the ranks. It stays the caller's, to be closed after the last step.
        *arguments: Adam's.
        deterministic: whether gradients are added in the order of ranks: then N ranks have the bits of one `Adam` that
            accumulates N gradients in that order. Numbers of 16 bits always are. Else the sum is the engine's, whose
            order may depend on the number of ranks: an element of it is off by up to about
            (ranks - 1) 2^-24 (sum of the absolute values) in float32. For `deterministic`, a rank needs memory for a
            ranks-th of each bucket, ranks times, and for the bucket itself.
        **keywords: Adam's.

    Attributes:
        communicator: as above.
    """

    def __init__(self, communicator: Any, *arguments: Any, deterministic: bool = False, **keywords: Any) -> None:
        check_communicator(communicator)
        ordered = truth_value("deterministic", deterministic)
        super().__init__(*arguments, **keywords)
        self.communicator: Communicator = communicator
        self._gathered = GatheredGradients(communicator, ordered=ordered)
        self._agreed = False

    def apply_gradients(
        self,
        grads_and_vars: Iterable[Any] | None = None,
        name: str | None = None,
        experimental_aggregate_gradients: bool = True,
        grad_scale: Any = None,
    ) -> int | None:
        """Add the gradients of all ranks and update variables by the mean. Arguments and results are Adam's.

        The first step compares what the ranks train. With `Mpi` the host waits for the other ranks in every step.

        Raises:
            DistributedError: the first step finds that a rank trains something else; the engine failed.
            And as Adam. What a gradient of this rank raises, before anything is sent, must end the job:
            ``with communicator:``.
        """
        refuse_in_loss("apply_gradients")
        if grads_and_vars is None:
            return self._apply_accumulated(grad_scale)
        self._state.raise_error_of_save()
        scale = None if grad_scale is None else checked_scale(grad_scale)
        return self._step_together(grads_and_vars, scale, Incoming(scale, None, self._averaged))

    def _apply_accumulated(self, grad_scale: Any) -> int | None:
        if grad_scale is not None:
            rule = "must be left out with accumulated gradients, which are divided already"
            raise ArgumentValueError("grad_scale", rule, "one", "pass it to accumulate")
        sums = self._accumulator.now()
        pairs, own = sums.sums(), sums.taken(mean=self._flavour.accumulation == "mean")
        return self._step_together(pairs, None, Incoming(None, None, own.calls * self._averaged, own.taken))

    @property
    def _averaged(self) -> int:
        """By how many ranks the sum is divided: all, or with ``accumulation="sum"`` one."""
        return self.communicator.size if self._flavour.accumulation == "mean" else 1

    def _step_together(self, pairs: Iterable[Any], scale: Any, incoming: Incoming) -> int | None:
        pairs = requests.listed(pairs)
        request = requests.read(pairs, self._state.registry)
        if self.communicator.device.is_capturing():
            raise ArgumentValueError(
                *("a step captured in a graph", "must not take gradients of several ranks"),
                *("such a step", "step outside of graphs"),
            )
        if not self._agreed:
            agree(self.communicator, [*described(self), *_described_pairs(request)])
            self._agreed = True
        # With the pairs that have none, of which the step warns.
        gathered = [*self._gathered.pairs(request), *(pair for pair in pairs if pair[0] is None)]
        rule = self._rule(1.0 if scale is None and incoming.calls > 1 else scale)
        return self._controller.step(gathered, rule, self._hyper, self._clip, incoming)

    def save(self, path: PathOrFile, **options: Any) -> PendingSave | None:
        """As `Adam.save`, by rank 0 alone, for all ranks have the same state. Every rank may call it.

        Args:
            path: as of `Adam.save`.
            **options: as of `Adam.save`.

        Returns:
            What `Adam.save` does, on rank 0; None on the others.
        """
        return super().save(path, **options) if self.communicator.rank == 0 else None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Adam:
        """Refused: a configuration has no communicator.

        Raises:
            ArgumentTypeError: always.
        """
        remedy = "pass DataParallelAdam(communicator, **config)"
        raise ArgumentTypeError("from_config", "must have a communicator", "a configuration alone", remedy)


def _described_pairs(request: requests.Request) -> list[str]:
    kinds = zip(request.variables, request.sparse, request.gradient_dtypes, strict=True)
    return [
        f"{v.name}: {v.dtype.name} {v.shape} with {'slices' if sparse else 'a gradient'} of {dtype.name}"
        for v, sparse, dtype in kinds
    ] + [f"{name}: without gradient" for name in request.without]
