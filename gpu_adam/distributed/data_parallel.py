"""Replicated training: every rank has all variables and slots, and steps by the mean of all ranks' gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gpu_adam.adam import Adam
from gpu_adam.autodiff_seam import refuse_in_loss
from gpu_adam.communicators import Communicator
from gpu_adam.distributed.agreement import agree, check_communicator, described
from gpu_adam.distributed.gathered import GatheredGradients
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.hyperparameters import OWN_SETTINGS
from gpu_adam.rules import truth_value
from gpu_adam.state.adam_state import AdamState
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

        The first step compares what the ranks train, and so does a step by accumulated gradients, for which the host
        waits: their variables and, where they are divided by it, the number of calls. With `Mpi` the host waits for the
        other ranks in every step.

        Raises:
            DistributedError: a step that compares finds that a rank trains something else; the engine failed.
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
        pairs, is_mean = sums.sums(), self._flavour.accumulation == "mean"
        own = sums.taken(mean=is_mean)
        incoming = Incoming(None, None, own.calls * self._averaged, own.taken)
        what = f"the mean over {own.calls} calls of accumulate" if is_mean else "the sum of calls of accumulate"
        return self._step_together(pairs, None, incoming, [what])

    @property
    def _averaged(self) -> int:
        """By how many ranks the sum is divided: all, or with ``accumulation="sum"`` one."""
        return self.communicator.size if self._flavour.accumulation == "mean" else 1

    def _step_together(
        self, pairs: Iterable[Any], scale: Any, incoming: Incoming, compared: Sequence[str] = ()
    ) -> int | None:
        """A step; the ranks compare what it is, besides pairs, where that is given."""
        pairs = requests.listed(pairs)
        request = requests.read(pairs, self._state.registry)
        if self.communicator.device.is_capturing():
            raise ArgumentValueError(
                *("a step captured in a graph", "must not take gradients of several ranks"),
                *("such a step", "step outside of graphs"),
            )
        if compared or not self._agreed:
            whole = () if self._agreed else (*described(self), *_described_groups(self._state))
            agree(self.communicator, [*whole, *compared, *_described_pairs(request)])
            self._agreed = True
        # With the pairs that have none, of which the step warns.
        gathered = [*self._gathered.pairs(request), *(pair for pair in pairs if pair[0] is None)]
        rule = self._rule(1.0 if scale is None and incoming.calls > 1 else scale)
        return self._controller.step(gathered, rule, self._hyper, self._clip, incoming)

    def set_group(self, variables: Iterable[Any], **settings: Any) -> None:
        """As `Adam.set_group`, on all ranks alike: the next step compares the groups of the ranks."""
        super().set_group(variables, **settings)
        self._agreed = False

    def exclude_from_weight_decay(
        self, var_list: Iterable[Any] | None = None, var_names: Iterable[str] | None = None
    ) -> None:
        """As `Adam.exclude_from_weight_decay`, on all ranks alike: the next step compares."""
        super().exclude_from_weight_decay(var_list, var_names)
        self._agreed = False

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


def _described_groups(state: AdamState) -> list[str]:
    names = state.variable_names()
    groups = [f"{names[v]}: {each}" for v, each in state.settings.items() if each != OWN_SETTINGS]
    never = [f"{name}: weights do not decay" for variable, name in names.items() if variable in state.never_decayed]
    return [*sorted(groups), *never, f"weights with these names do not decay: {state.never_decayed_names}"]


def _described_pairs(request: requests.Request) -> list[str]:
    kinds = zip(request.variables, request.sparse, request.gradient_dtypes, strict=True)
    return [
        f"{v.name}: {v.dtype.name} {v.shape} with {'slices' if sparse else 'a gradient'} of {dtype.name}"
        for v, sparse, dtype in kinds
    ] + [f"{name}: without gradient" for name in request.without]
