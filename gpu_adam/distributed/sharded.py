"""ShardedAdam: one optimizer on several ranks, each of which has the slots of its share alone (ZeRO, stage 1)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gpu_adam import adam
from gpu_adam.autodiff_seam import refuse_in_loss
from gpu_adam.communicators import Communicator
from gpu_adam.distributed.agreement import agree, check_communicator, described, gathered
from gpu_adam.distributed.checkpoint import RankFiles, titles_of
from gpu_adam.distributed.layout import buckets_of, table_bucket
from gpu_adam.distributed.pending_shards import PendingShards
from gpu_adam.distributed.shards import ArrayShard, RepeatedGradients, Shard, Shards, TableShard, WholeShard
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, SlotNotFoundError
from gpu_adam.hyperparameters import OWN_SETTINGS, Settings, checked_patterns
from gpu_adam.kernels import UpdateRule
from gpu_adam.rules import is_whole, items_of, one_of, shown, truth_value
from gpu_adam.state import saving
from gpu_adam.state.atomic_file import PathOrFile
from gpu_adam.state.pending_save import second_save
from gpu_adam.step.gradients import Incoming, OtherDtypeError, as_array, check_shape, dtype_read, on_device
from gpu_adam.step.groups import SparseGroup
from gpu_adam.step.guard import checked_scale
from gpu_adam.step.plan import check_updatable
from gpu_adam.step.replays import refuse_in_capture
from gpu_adam.step.request import checked_pair, listed
from gpu_adam.variables import IndexedSlices, Variable

BUCKET_BYTES = 2**25
"""Of parameters: enough for a collective operation to run at full speed, few enough for several to be under way."""


_ONCE = "add them up, or call apply_gradients() where a step has failed that has its gradients"


def _described(variable: Variable) -> str:
    return f"{variable.name!r}, {variable.shape}, {variable.dtype.name}"


def _refused(what: str, remedy: str) -> Any:
    """A method that an optimizer on several ranks has not."""

    def method(self: ShardedAdam, *args: Any, **kwargs: Any) -> None:
        rule = "must be asked of an optimizer that has no other ranks"
        raise ArgumentValueError(what, rule, type(self).__name__, remedy)

    method.__doc__ = f"Refused: {remedy}."
    return method


class ShardedAdam(adam.Adam):
    r"""Adam on several ranks, each of which owns a share of every bucket of parameters, and the slots of that share.

    Every rank has all parameters, and makes the same calls in the same order, each with its own gradients::

        g        = sum over ranks of their g               reduce-scatter: each rank gets the sum for its share
        m, v, θ  as `Adam` with ``grad_scale`` times the number of ranks, of the share; with ``accumulation="sum"``
                 with ``grad_scale`` as it is
        θ        all-gather: each rank gets the others' shares

    A rank's memory, in bytes, for P of parameters, S of their slots, G of their gradients and W ranks::

        P + S / W + G + F / W         G, a copy of the gradients that travels, and F / W, the sum for the share, where
                                      F is G, or 2 G for gradients of 16 bits, which are added in float32
        while a bucket travels, once more its G where gradients are ordered or of 16 bits
        tables take P + S / W and the slices on their way; where norms are taken, those of all ranks on each
        a rank that is alone takes P + S: gradients are read where they lie

    Variables begin equal on all ranks (``communicator.broadcast(variable.value).wait()``), or a step mixes them. They
    are moved into flat arrays: what was taken as ``variable.value`` before is no part of them any more. Every variable
    gets a gradient at every step, an array or, a table, slices; ranks that disagree about variables are told so.

    With ``sparse_update="deferred"`` a table's rows stay with their owners until somebody reads them. So reading one
    (`value`, `numpy`, `gather`, an index) is done by all ranks at the same time, before the communicator is closed.

    Args:
        communicator: of the ranks; ``with communicator:`` around the program ends all ranks where one fails.
        *args, **kwargs: as `Adam`'s. Without ``telemetry``, ``stochastic_rounding`` and ``ema_overwrite_frequency``.
        deterministic: whether gradients are added in the order of ranks: then W ranks have the bits of one process that
            accumulates the ranks' gradients in this order (norms over several dtypes do after a single `build`). The
            same bytes travel. Otherwise the engine adds in its own order: two orders of W float32 numbers differ by
            about 2 (W - 1) 2^-24 (sum of the absolute values) at most.
        bucket_bytes: of parameters that are exchanged at once.

    Attributes:
        communicator: as above.

    Raises:
        As `Adam`; ArgumentValueError for what is named above.

    References:
        Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC 2020,
        https://arxiv.org/abs/1910.02054
    """

    def __init__(
        self,
        communicator: Communicator,
        *args: Any,
        deterministic: bool = False,
        bucket_bytes: int = BUCKET_BYTES,
        **kwargs: Any,
    ) -> None:
        check_communicator(communicator)
        super().__init__(*args, **kwargs)
        flavour = self.flavour
        for name in ("telemetry", "stochastic_rounding", "ema_overwrite_frequency"):
            if getattr(flavour, name):
                rule = "must be left out by an optimizer on several ranks"
                raise ArgumentValueError(name, rule, getattr(flavour, name), "leave it out")
        self.communicator: Communicator = communicator
        self._ordered = truth_value("deterministic", deterministic)
        if not is_whole(bucket_bytes) or bucket_bytes < 1:
            rule = "must be a whole number >= 1"
            raise ArgumentValueError("bucket_bytes", rule, shown(bucket_bytes), "pass 2**25, say, or leave it out")
        self._bucket_bytes = int(bucket_bytes)
        self._whole: list[Variable] = []  # by number
        self._numbers: dict[Variable, int] = {}
        self._bucket_numbers: list[int] = []  # of each variable
        self._shards = Shards(communicator, self._parts_of)
        self._state.exchange = self._shards
        self._repeated: RepeatedGradients | None = None
        self._pending: PendingShards | None = None

    def _parts_of(self, dtype: np.dtype) -> int:
        return UpdateRule(complex_mode=self.complex_mode).layout(dtype, dtype).parts

    # Which variables there are.

    def build(self, var_list: Iterable[Any], tables: Iterable[Any] = ()) -> None:
        """Lay new variables out in buckets, and create the slots of this rank's share. Every rank calls it alike.

        Args:
            var_list: `Variable`s of the communicator's device, or one alone.
            tables: those of them whose gradients are `IndexedSlices`: each rank owns rows. Without constraints.

        Raises:
            ArgumentTypeError, ArgumentValueError: something else; gradients for a step have been handed over.
            DistributedError: another rank builds other variables, or has another configuration.
        """
        variables, with_rows = self._variables(var_list, "var_list"), set(self._variables(tables, "tables"))
        self._check_tables(with_rows, variables)
        new = [variable for variable in dict.fromkeys(variables) if variable not in self._numbers]
        check_updatable([*self._whole, *new] if new else [], {}, self._rule())
        if new:
            self._check_between_steps("build")
        self._agree([f"{'table' if each in with_rows else 'variable'} {_described(each)}" for each in new])
        if not new:
            return
        groups: dict[Any, list[int]] = {}  # in the order in which one process updates them
        for variable in new:
            number = self._numbers[variable] = len(self._whole)
            self._whole.append(variable)
            self._bucket_numbers.append(-1)
            groups.setdefault(number if variable in with_rows else variable.dtype, []).append(number)
        pieces = list[Variable]()
        for key, numbers in groups.items():
            for shard in self._table(numbers[0]) if isinstance(key, int) else self._buckets(numbers):
                for number in shard.bucket.variables:
                    self._bucket_numbers[number] = len(self._shards.shards)
                self._shards.add(shard)
                pieces += shard.pieces
        self._repeated = None
        self._state.titles = titles_of(self._whole, self._shards.shards, self.communicator.rank)
        super().build(pieces)
        masters = self._state.slots.get("master", {})
        for variable in new:
            number = self._numbers[variable]
            shard = self._shard_of(number)
            piece = shard.piece_of(number)
            if piece in masters:
                shard.follow(number, variable, masters[piece])

    def _check_tables(self, tables: Iterable[Variable], variables: Iterable[Variable]) -> None:
        listed = set(variables)
        for variable in tables:
            got = f"{variable.name!r} of shape {variable.shape}"
            for is_wrong, rule, remedy in (
                (variable.ndim == 0, "must have rows", "leave it out of tables"),
                (variable not in listed, "must be one of var_list too", "name it there"),
                (variable.constraint is not None, "must do without a constraint, as with any slices", "leave one out"),
                (
                    variable in self._numbers and not isinstance(self._shard_of(self._numbers[variable]), TableShard),
                    "must be one from the first",
                    "name it in tables when it is built first",
                ),
            ):
                if is_wrong:
                    raise ArgumentValueError("a variable of tables", rule, got, remedy)

    def _variables(self, given: Any, argument: str) -> list[Variable]:
        listed = [given] if isinstance(given, Variable) else items_of(argument, given, "must be variables")
        for number, variable in enumerate(listed):
            self._check_variable(variable, f"{argument}[{number}]")
        return listed

    def _buckets(self, numbers: list[int]) -> list[Shard]:
        first = self._whole[numbers[0]]
        sizes = [self._whole[number].size for number in numbers]
        ranks = self.communicator.size
        buckets = buckets_of(sizes, first.dtype.itemsize, ranks, self._bucket_bytes, numbers)
        kind = WholeShard if ranks == 1 else ArrayShard
        return [kind(bucket, self._whole, self.communicator) for bucket in buckets]

    def _table(self, number: int) -> list[Shard]:
        variable, communicator = self._whole[number], self.communicator
        rows = len(variable)
        bucket = table_bucket(rows, variable.size // rows if rows else 0, communicator.size, number)
        defers = self.flavour.sparse_update == "deferred"
        return [TableShard(bucket, self._whole, communicator, self._state if defers else None)]

    def _check_variable(self, variable: Any, argument: str) -> None:
        if not isinstance(variable, Variable):
            got, remedy = type(variable).__name__, "wrap the array in gpu_adam.Variable, which can be moved"
            raise ArgumentTypeError(argument, "must be a gpu_adam.Variable", got, remedy)
        if variable.constraint is not None and self.flavour.master_weights:
            rule, got = "must do without a constraint, which changes no master", f"{variable.name!r} with one"
            raise ArgumentValueError(argument, rule, got, "leave master_weights out, or the constraint")
        if variable.device is not self.communicator.device:
            rule, remedy = f"must lie on the communicator's device, {self.communicator.device.name}", "create it there"
            raise ArgumentValueError(argument, rule, variable.device.name, remedy)

    def _agree(self, variables: Sequence[str]) -> None:
        """Raise DistributedError where other ranks build other variables, or have another configuration."""
        options = [f"deterministic = {self._ordered}", f"bucket_bytes = {self._bucket_bytes}"]
        agree(self.communicator, [*described(self), *options, *variables])

    def _number_of(self, variable: Any, argument: str) -> int:
        number = self._numbers.get(variable) if isinstance(variable, Variable) else None
        if number is None:
            self._check_variable(variable, argument)
            rule = f"must be a variable of optimizer {self.name!r}"
            raise ArgumentValueError(argument, rule, f"{variable.name!r}", "call build with all variables first")
        return number

    # Stepping.

    def push_gradient(self, variable: Variable, gradient: Any) -> None:
        """Hand over a gradient for the next step; a bucket whose gradients are all there begins to travel.

        All gradients of a step are handed over on one stream, on which the step is done.

        Args:
            variable: a variable that was built.
            gradient: an array of the variable's shape, as of `Adam.apply_gradients`. All of a bucket have the dtype of
                the first one. Nobody writes to it before `apply_gradients` has returned: a rank that is alone reads it
                then, where it lies. `IndexedSlices` of the rows that this rank has gradients for, none of them out of
                range, for a variable that was built as one of `tables`; for another one they are written out, unless
                gradients are clipped by norm.

        Raises:
            ArgumentTypeError, ArgumentValueError: what does not fit; a second gradient of the variable for one step.
        """
        refuse_in_loss("push_gradient")
        self._push([self._checked(gradient, variable, "variable")])

    def _check_place(self, number: int) -> None:
        variable = self._whole[number]
        if not self._shard_of(number).has(number, variable):
            rule, got = "must lie where this optimizer has put it", "one that another optimizer has moved since"
            raise ArgumentValueError(f"variable {variable.name!r}", rule, got, "let one optimizer have it")

    def _checked(self, gradient: Any, variable: Any, argument: str) -> tuple[int, Any]:
        """A variable's number, and its gradient ready to be handed over."""
        number = self._number_of(variable, argument)
        self._check_place(number)
        is_table = isinstance(self._shard_of(number), TableShard)
        if not is_table and isinstance(gradient, IndexedSlices) and self._clip.norm is None:
            gradient = gradient.dense(variable.shape)  # the norm would be another one: that of the slices
        if is_table is not isinstance(gradient, IndexedSlices):
            rule = f"must be {'IndexedSlices' if is_table else 'an array'}, as build was told"
            got, remedy = type(gradient).__name__, "name variables with rows in build(variables, tables=)"
            raise ArgumentValueError(f"the gradient of variable {variable.name!r}", rule, got, remedy)
        if is_table:
            return number, self._checked_slices(gradient, variable)
        dtype = dtype_read(gradient, variable)
        if variable.device.is_plain(gradient, dtype) and gradient.shape == variable.shape:
            return number, gradient
        try:
            array = as_array(gradient, variable, dtype)
        except OtherDtypeError:  # an object that does not tell its array's
            array = on_device(gradient, variable.device, f"gradient of variable {variable.name!r}", None)
        check_shape(array, variable.shape, variable)
        return number, array

    def _checked_slices(self, gradient: IndexedSlices, variable: Variable) -> IndexedSlices:
        """Slices as one process checks them."""
        dtype = dtype_read(gradient, variable)
        group = SparseGroup([variable], [0], UpdateRule(complex_mode=self.complex_mode), [OWN_SETTINGS], dtype)
        checked = group.check([(gradient, variable)], np.zeros(1, np.uint64))
        return IndexedSlices(checked.values, checked.indices)

    def _push(self, checked: Sequence[tuple[int, Any]]) -> None:
        seen, dtypes = set[int](), dict[Shard, np.dtype]()
        for number, gradient in checked:
            argument, shard = f"the gradient of variable {self._whole[number].name!r}", self._shard_of(number)
            if number in seen or number not in shard.lacks:
                raise ArgumentValueError(argument, "must come once for a step", "a second one", _ONCE)
            seen.add(number)
            dtype = getattr(gradient, "values", gradient).dtype
            wanted = dtypes.setdefault(shard, shard.gradient_dtype or dtype)
            if dtype != wanted:
                rule = f"must have dtype {wanted.name}, as the others with which it travels"
                raise ArgumentValueError(argument, rule, dtype.name, "cast it")
        given = dict[Shard, dict[int, Any]]()
        for number, gradient in checked:
            given.setdefault(self._shard_of(number), {})[number] = gradient
        for shard, gradients in given.items():
            shard.push(gradients)
        self._begin_complete()

    def _begin_complete(self) -> None:
        joins = self._clip.norm is not None or self.flavour.skips
        self._shards.begin_complete(ordered=self._ordered, joins=joins)

    def _shard_of(self, number: int) -> Shard:
        return self._shards.shards[self._bucket_numbers[number]]

    def _lacks(self) -> set[int]:
        """The variables without a gradient for the next step."""
        return {number for shard in self._shards.shards for number in shard.lacks}

    def apply_gradients(
        self,
        grads_and_vars: Iterable[Any] | None = None,
        name: str | None = None,
        experimental_aggregate_gradients: bool = True,
        grad_scale: Any = None,
    ) -> int | None:
        """Average the gradients of all ranks, or with ``accumulation="sum"`` add them, and update all variables.

        Args:
            grads_and_vars: (gradient, variable) pairs, one for each variable; at the first step they are built in this
                order. None: the gradients that were handed over by `push_gradient`.
            name: ignored, for compatibility with Keras.
            experimental_aggregate_gradients: ignored, for compatibility with Keras: see `push_gradient`.
            grad_scale: as of `Adam`, the same number on all ranks.

        Returns:
            As `Adam.apply_gradients`, on all ranks the same.

        Raises:
            As `Adam.apply_gradients`; ArgumentValueError where a variable has no gradient. Arguments are checked before
                any gradient is taken: then this rank may call again, and the others wait for it. What a callable
                hyperparameter raises comes after that: the gradients are there for a call without pairs.
            DistributedError: the other ranks do not answer. This, and a KeyboardInterrupt, may come in the midst of the
                step, with some variables updated: the job is to end, as by ``with communicator:``.
        """
        refuse_in_loss("apply_gradients")
        refuse_in_capture(self.communicator.device, "a step of several ranks")
        scale = None if grad_scale is None else checked_scale(grad_scale)
        given = [] if grads_and_vars is None else listed(grads_and_vars)
        if self._repeated is not None and self._repeated.take(given):
            self._begin_complete()
        else:
            found = map(checked_pair, given, itertools.count())
            self._take([(gradient, variable) for gradient, variable in found if gradient is not None])
        shards = self._shards.shards
        pairs = [pair for shard in shards for pair in zip(shard.gradients(), shard.pieces, strict=True)]
        calls = self.communicator.size if self.flavour.accumulation == "mean" else 1
        update = self._rule(1.0 if scale is None and calls > 1 else scale)
        incoming = Incoming(scale, calls=calls)
        done = self._controller.step(pairs, update, self._hyper, self._clip, incoming)
        self._shards.all_arrived()
        for variable in self._whole:
            variable.constrain()
        return done

    def _take(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        """Hand over the gradients that a step still lacks."""
        if pairs and not self._whole:
            self.build([v for _, v in pairs], [v for g, v in pairs if isinstance(g, IndexedSlices)])
        checked = [self._checked(g, v, f"grads_and_vars[{number}]") for number, (g, v) in enumerate(pairs)]
        missing = self._lacks() - {number for number, _ in checked}
        if missing or not self._whole:
            rule, names = "must come for every variable at each step", [self._whole[n].name for n in sorted(missing)]
            got = f"none for {names[:5]}" if missing else "none at all"
            raise ArgumentValueError("gradients", rule, got, "pass zeros where a variable has none")
        self._push(checked)
        if len(checked) == len(self._whole):
            self._repeated = RepeatedGradients.of(self._shards.shards, pairs, checked, self.communicator.device)

    # What is said of variables reaches the pieces of them that this rank owns.

    def _piece_of(self, variable: Any, argument: str) -> Variable | None:
        """What this rank owns of a variable."""
        number = self._number_of(variable, argument)
        return self._shard_of(number).piece_of(number)

    def _pieces_of(self, variables: Any, argument: str, call: str) -> list[Variable]:
        """What this rank owns of variables, for a call that all ranks make alike, or DistributedError."""
        listed = [] if variables is None else [variables] if isinstance(variables, Variable) else list(variables)
        self.build(listed)
        found = [self._piece_of(each, f"{argument}[{number}]") for number, each in enumerate(listed)]
        agree(self.communicator, [f"{call} of {None if variables is None else [each.name for each in listed]}"])
        return [piece for piece in found if piece is not None]

    def get_slot(self, var: Any, slot_name: str) -> Variable:
        """The slot of what this rank owns of a variable, one-dimensional.

        Raises:
            SlotNotFoundError: this rank owns nothing of it, or the variable has no such slot.
            ArgumentTypeError, ArgumentValueError: no variable of the optimizer.
        """
        piece = self._piece_of(var, "var")
        if piece is None:
            rank, remedy = self.communicator.rank, "ask the rank that does; save(gather=True) has all"
            got = f"nothing on rank {rank}"
            raise SlotNotFoundError(f"slot {slot_name!r} of variable {var.name!r}", "must be owned", got, remedy)
        return super().get_slot(piece, slot_name)

    def set_group(self, variables: Iterable[Any], **settings: Any) -> None:
        """As `Adam.set_group`, on all ranks alike. ``sparse_update`` is the optimizer's argument, for all tables.

        Raises:
            As `Adam.set_group`; DistributedError: another rank does otherwise.
        """
        if "sparse_update" in settings:
            rule, remedy = "must be the same for all tables of an optimizer on several ranks", "pass it to ShardedAdam"
            raise ArgumentValueError("sparse_update", rule, "one of a group", remedy)
        super().set_group(self._pieces_of(variables, "variables", f"set_group({settings})"), **settings)

    def get_group(self, variable: Any) -> Settings:
        """As `Adam.get_group`; of a variable of which this rank owns something.

        Raises:
            ArgumentTypeError, ArgumentValueError: no variable of the optimizer; one of other ranks alone.
        """
        piece = self._piece_of(variable, "variable")
        if piece is None:
            rule, got = "must be owned in part by this rank", f"{variable.name!r}, of other ranks"
            raise ArgumentValueError("variable", rule, got, "ask one of those")
        return super().get_group(piece)

    def exclude_from_weight_decay(
        self, var_list: Iterable[Any] | None = None, var_names: Iterable[str] | None = None
    ) -> None:
        """As `Adam.exclude_from_weight_decay`, on all ranks alike.

        Raises:
            As `Adam.exclude_from_weight_decay`; DistributedError: another rank does otherwise.
        """
        patterns = checked_patterns(var_names)
        pieces = self._pieces_of(var_list, "var_list", f"exclude_from_weight_decay(var_names={patterns})")
        super().exclude_from_weight_decay(pieces, patterns)

    def overwrite_by_averages(self, var_list: Iterable[Any] | None = None) -> None:
        """As `Adam.overwrite_by_averages`, on all ranks alike and at the same time.

        Raises:
            As `Adam.overwrite_by_averages`; DistributedError: another rank does otherwise.
        """
        pieces = self._pieces_of(var_list, "var_list", "overwrite_by_averages")
        super().overwrite_by_averages(None if var_list is None else pieces)
        self._hand_on()

    finalize_variable_values = overwrite_by_averages

    def _hand_on(self) -> None:
        """Give what this rank owns of the variables to the others."""
        for shard in self._shards.shards:
            shard.depart()
        for shard in self._shards.shards:
            shard.finish()

    # Files.

    def save(
        self,
        path: PathOrFile,
        *,
        variables: bool = False,
        asynchronous: bool = False,
        on_busy: str = "wait",
        user: Mapping[str, Any] | None = None,
        gather: bool = False,
    ) -> PendingShards | None:
        """Write iterations, slots and configuration into a directory, each rank what it owns: see README.md here.

        Every rank makes the call. A program that is killed at any moment leaves this save or the last one, never a
        part; a save that raises does so on all ranks.

        Args:
            path: a directory that all ranks see, which is made where it does not exist and has one checkpoint; with
                `gather` a file as of `Adam.save`, which rank 0 writes.
            variables: whether to write the variables too, each rank its part.
            asynchronous: whether to return while a thread of each rank writes. The state is copied in the order of the
                current stream, with `gather` to rank 0's host memory, and `check_errors` is left to the caller.
            on_busy: what to do while an earlier asynchronous save is at work on some rank: "wait" or "error".
            user: as of `Adam.save`; that of rank 0 counts.
            gather: whether to write one file, which a plain `Adam` loads too. Rank 0 takes host memory for all arrays,
                and device memory for an array of one bucket at a time.

        Returns:
            With `asynchronous` a `PendingShards`, whose `wait()` all ranks call: it returns when the checkpoint is
            there, and raises on all ranks what has prevented it. The next save waits, too, and raises it where nobody
            has waited; so does the end of ``with communicator:``, which does not raise. The checkpoint does not wait
            for these: it is there when all files are.

        Raises:
            ArgumentTypeError, ArgumentValueError: as `Adam.save`; gradients that were handed over wait for their step;
                a directory that not all ranks see.
            CheckpointError: another job has saved there meanwhile.
            DistributedError: another rank calls with other arguments than `path` and `user`.
            ConcurrentStepError: another save is at work, with ``on_busy="error"``, on all ranks.
            OSError: the file system refuses on some rank; what was saved before is still there.
            SparseIndexError: as `check_errors`, on all ranks.
        """
        one_of("on_busy", on_busy, ("wait", "error"))
        self._check_ready("save", variables)
        refuse_in_capture(self.communicator.device, "save")
        options = {"variables": variables, "asynchronous": asynchronous, "gather": gather, "on_busy": on_busy}
        agree(self.communicator, [f"save with {options}"])
        self._end_pending_save(on_busy)

        def note() -> dict[str, Any]:
            if not asynchronous:
                self._controller.check_errors()
            self._controller.guards.settle_inside()
            return saving.note_of(self._state, self.flavour, self.get_config(), user)

        with self._state.alone():
            files = self._files()
            write = files.gather if gather else files.save
            self._pending = write(path, note, variables=variables, asynchronous=asynchronous)
            return self._pending

    def _end_pending_save(self, on_busy: str) -> None:
        """As `AdamState.end_pending_save`, on all ranks alike."""
        pending = self._pending
        if pending is None:
            return
        if on_busy == "error" and not all(map(int, gathered(self.communicator, f"{pending.done:d}"))):
            raise second_save()
        self._pending = None
        pending.join()
        pending.raise_untold()

    def load(self, path: PathOrFile, *, variables: bool = False) -> None:
        """Read what `save` wrote, on any number of ranks, or a file of `Adam.save`; the slots must exist: see `build`.

        Every rank makes the call, reads what it owns, and gets the others' part of the variables from them. Where a
        rank finds that something is damaged or does not fit, all raise, and nothing has changed on any of them. A save
        that is at work is waited for.

        Args:
            path: the directory, or a file of version 2.
            variables: whether to read the variables too, which must have been saved then. Otherwise they stay.

        Raises:
            FileNotFoundError: there is no such file, or no finished save in the directory.
            ArgumentValueError: gradients that were handed over wait for their step.
            CheckpointError: as `Adam.load`; files of another save than the directory's manifest tells of.
            DistributedError: only some ranks read the variables, too.
        """
        refuse_in_loss("load")
        self._check_ready("load", variables)
        agree(self.communicator, [f"load with {{'variables': {variables}}}"])
        if self._pending is not None:
            self._pending.join()
        with self._state.alone():
            self._controller.guards.settle_inside()
            self._files().loading(path, variables=variables)()
            if variables:
                self._hand_on()

    def _files(self) -> RankFiles:
        return RankFiles(self.communicator, self._state, self._whole, self._shards.shards)

    def _check_ready(self, call: str, variables: bool) -> None:
        """Raise ArgumentValueError where a step has begun; if variables are saved or loaded, where one was moved."""
        for number in range(len(self._whole) if variables else 0):
            self._check_place(number)
        self._check_between_steps(call)

    def _check_between_steps(self, call: str) -> None:
        if len(self._lacks()) < len(self._whole):
            rule, got = "must come between steps", "a call after push_gradient"
            raise ArgumentValueError(call, rule, got, "call apply_gradients first")

    # What an optimizer that has a process to itself can do besides.

    accumulate = _refused("accumulate", "add up the gradients, and hand over the sums")
    capture = _refused("capture", "call the function: what ranks exchange waits for them")
    stage = _refused("stage", "call apply_gradients")
    add_slot = _refused("add_slot", "keep an array of your own beside the variable")
    forget = _refused("forget", "make an optimizer of the variables that stay")
    replace = _refused("replace", "make an optimizer of the new variables")
    __reduce_ex__ = _refused("a copy of the optimizer", "save(directory), and load it into another one")

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        custom_objects: Mapping[str, Any] | None = None,
        *,
        communicator: Communicator | None = None,
        **options: Any,
    ) -> ShardedAdam:
        """An optimizer with this configuration, without its state.

        Args:
            config: what `get_config` returns, of this class or of `Adam`.
            custom_objects: as of `Adam`.
            communicator: of the ranks.
            **options: ``deterministic``, ``bucket_bytes``.
        """
        made = super().from_config
        return made({**config, "communicator": communicator, **options}, custom_objects)  # type: ignore[return-value]
