"""Adam: what a user constructs, steps, configures and saves. The surface of tf.keras.optimizers.Adam."""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from gpu_adam import schedules
from gpu_adam.autodiff_seam import current_tracer, refuse_in_loss
from gpu_adam.devices import find_device
from gpu_adam.devices.torch_tensors import written_calls
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError, ConcurrentStepError
from gpu_adam.hyperparameters import (
    DEFAULT_EPSILON,
    NO_CLIPPING,
    ClipAttribute,
    Flavour,
    Hyperparameter,
    Settings,
    as_number,
    check_deferrable,
    checked,
    checked_flavour,
    checked_patterns,
    evaluated,
)
from gpu_adam.kernels import COMPLEX_MODES, UpdateRule
from gpu_adam.loss_scale import CurrentLossScale
from gpu_adam.rules import is_whole, one_of, shown, truth_value
from gpu_adam.schedules import LearningRateSchedule
from gpu_adam.state import checkpoint, saving
from gpu_adam.state.adam_state import AdamState
from gpu_adam.state.atomic_file import PathOrFile, name_of
from gpu_adam.state.counter import checked_count
from gpu_adam.state.pending_save import PendingSave
from gpu_adam.state.registry import News
from gpu_adam.state.slots import initialized
from gpu_adam.state.transaction import Transaction
from gpu_adam.step.accumulation import Accumulator
from gpu_adam.step.controller import Controller
from gpu_adam.step.gradients import AS_THEY_ARE, Incoming
from gpu_adam.step.guard import Telemetry, checked_scale
from gpu_adam.step.replays import Configuration, Replayable, captured, refuse_in_capture
from gpu_adam.uninterrupted import make_all
from gpu_adam.variables import Variable, as_dtype, as_shape

KEYWORDS = (
    *("clipnorm", "clipvalue", "global_clipnorm", "lr", "decay", "complex_mode", "weight_decay", "l2"),
    *Flavour._fields,
)
"""What the constructor takes by keyword alone."""


class Adam:
    r"""The Adam optimizer, and AMSGrad.

    Step t, for every variable θ with gradient g (each operation rounded in the variable's dtype)::

        m    = m + (g - m) (1 - beta_1)
        v    = v + (g² - v) (1 - beta_2)             AMSGrad: vhat = max(vhat, v) takes the place of v below
        θ    = θ - α_t m / (√v + epsilon)            α_t = learning_rate √(1 - beta_2^t) / (1 - beta_1^t)

    What the keywords add, in this order::

        g    = g (1 / scale)                         grad_scale of apply_gradients, loss_scale
        g    = clipped g, by value, then by norm     clipvalue, then clipnorm or global_clipnorm
        g    = -g                                    maximize
        g    = g + l2 θ                              l2: torch.optim.Adam's weight_decay
        m, v as above
        θ    = θ (1 - learning_rate weight_decay)    weight_decay: AdamW
        θ    as above; with epsilon_form="paper"     θ = θ - learning_rate m' / (√v' + epsilon), where
                                                     m' = m / (1 - beta_1^t), v' = v / (1 - beta_2^t)
        average = ema_momentum average + (1 - ema_momentum) θ

    Args:
        learning_rate: finite; a number, a 0-d array or variable, a callable without arguments, or a schedule.
        beta_1: in [0, 1); decay of the mean of gradients. A number, 0-d array, variable or callable.
        beta_2: in [0, 1); decay of the mean of squared gradients. As beta_1.
        epsilon: >= 0; added to the root, "epsilon hat" of the paper. As beta_1. None and 0 mean 1e-7.
        amsgrad: whether to divide by the maximum of v over the past.
        name: begins the names of the slots. Default "Adam".
        **kwargs: ``clipvalue`` > 0 bounds every element of a gradient; ``clipnorm`` > 0 then bounds each gradient's L2
            norm, or ``global_clipnorm`` > 0 the L2 norm over all of them; ``decay`` >= 0 divides the learning rate by
            1 + decay (t - 1); ``lr`` >= 0 is an old name of learning_rate and wins over it; ``complex_mode`` is how
            complex variables are updated: "abs2" (default) with real v following |g|², so that rotating the phase of
            all gradients rotates the steps, or "real_imag", the real and the imaginary part each as a real element;
            ``weight_decay`` >= 0 and ``l2`` >= 0, None for none; ``maximize``; ``epsilon_form`` "hat" (default) or
            "paper"; ``use_ema`` keeps each variable's moving average in the slot "average", which begins at the
            variable's value, with ``ema_momentum`` in [0, 1] (0.99), and ``ema_overwrite_frequency``: after so many
            steps, not counting those left out, the updated variables are overwritten by their averages. For variables
            of 16 bits, float16 and bfloat16, which are computed with in float32 and rounded once, when they are stored:
            ``master_weights`` keeps them unrounded in the slot "master", from which each step goes on; or
            ``stochastic_rounding`` rounds those of bfloat16 to one of two neighbours, so that the mean is right, by
            noise that depends on ``seed`` in [0, 2^64) (0), t, the variable's place in order of its slots and the
            element's index alone.
            ``slot_dtype="bfloat16"`` halves the slots m, v and vhat, which are float32 otherwise; it needs variables of
            16 bits or float32. ``skip_nonfinite`` leaves a step out, t and all, whose gradients are not all finite;
            ``loss_scale``, a `LossScale`, does so too, and divides all gradients by a scale that follows: see
            `loss_scale`; ``telemetry`` has each step's numbers measured: see `read_telemetry`. The last three want a
            step's variables on one device. ``accumulation`` "mean" (default) or "sum" is what becomes of
            gradients that were accumulated: see `accumulate`. ``sparse_update`` "dense" (default) moves all rows of a
            variable with a gradient of `IndexedSlices` at once; "deferred" moves the others when somebody reads or
            writes them, with the same bits (cuda/deferred.md): the variable must be a `Variable`, of this optimizer
            alone, and there is no ``telemetry``. ``max_deferral`` in [1, 2^20) (65536): after so many steps all rows
            are brought up to date. ``replay`` "exact" (default) or "closed_form", in which v takes missed steps in one
            product, a few units in the last place beside.

    Callables are evaluated once per step, and schedules, which get t - 1: with ``skip_nonfinite`` or ``loss_scale``
    for every t that the step may turn out to have.

    Raises:
        ArgumentTypeError: an argument of the wrong kind, or an unknown keyword.
        ArgumentValueError: a value outside its range; ``clipnorm`` together with ``global_clipnorm``, or
            ``master_weights`` with ``stochastic_rounding``.

    References:
        Kingma & Ba, ICLR 2015, https://arxiv.org/abs/1412.6980; Reddi, Kale & Kumar, ICLR 2018,
        https://arxiv.org/abs/1904.09237; Loshchilov & Hutter, ICLR 2019, https://arxiv.org/abs/1711.05101; https://www.tensorflow.org/versions/r2.0/api_docs/python/tf/keras/optimizers/Adam
    """

    def __init__(
        self,
        learning_rate: Any = 0.001,
        beta_1: Any = 0.9,
        beta_2: Any = 0.999,
        epsilon: Any = DEFAULT_EPSILON,
        amsgrad: Any = False,
        name: str | None = "Adam",
        **kwargs: Any,
    ) -> None:
        for keyword in kwargs:
            if keyword not in KEYWORDS:
                known = ", ".join(KEYWORDS)
                raise ArgumentTypeError(
                    f"keyword {keyword!r}", f"must be one of {known}", "another", "correct or drop it"
                )
        if name is not None and not isinstance(name, str):
            raise ArgumentTypeError("name", "must be a str", type(name).__name__, "pass a str or None")
        if kwargs.get("lr") is not None:
            warnings.warn("lr is an old name: use learning_rate", DeprecationWarning, stacklevel=2)
            learning_rate = kwargs["lr"]
            if not callable(learning_rate) and as_number("learning_rate", learning_rate) < 0:
                raise ArgumentValueError("lr", "must be >= 0", learning_rate, "use learning_rate for a negative rate")
        decay = kwargs.get("decay", 0.0)
        self._hyper: dict[str, Any] = {
            "learning_rate": checked("learning_rate", learning_rate),
            "beta_1": checked("beta_1", beta_1),
            "beta_2": checked("beta_2", beta_2),
            "epsilon": DEFAULT_EPSILON if epsilon is None or _is_zero(epsilon) else checked("epsilon", epsilon),
            "decay": checked("decay", decay),
            **{
                name: 0.0 if kwargs.get(name) is None else checked(name, kwargs[name])
                for name in ("weight_decay", "l2")
            },
        }
        self._flavour = flavour = checked_flavour(kwargs)
        self._is_guarded = flavour.skips or flavour.telemetry
        self._amsgrad = truth_value("amsgrad", amsgrad)
        self._clip = NO_CLIPPING
        for keyword in ("clipvalue", "clipnorm", "global_clipnorm"):
            setattr(self, keyword, kwargs.get(keyword))
        self._complex_mode = one_of("complex_mode", kwargs.get("complex_mode", COMPLEX_MODES[0]), COMPLEX_MODES)
        self._state = AdamState(
            *(name or type(self).__name__, self._complex_mode, flavour.slot_dtype),
            *(flavour.sparse_update, flavour.max_deferral, flavour.replay),
        )
        self._begin()

    def _begin(self) -> None:
        """Have what belongs to this process."""
        self._rules: dict[Any, UpdateRule] = {}
        self._controller, self._accumulator = self._new_controller(), Accumulator(self._state)

    def _new_controller(self) -> Controller:
        # A weak reference: an optimizer that its owner lets go is given back at once.
        return Controller(self._state, self._flavour, weakref.WeakMethod(self._configuration))

    def _configuration(self) -> Configuration:
        return self._rule(), self._hyper, self._clip

    @property
    def amsgrad(self) -> bool:
        """Whether the update divides by the maximum of v over the past; may be assigned at any time."""
        return self._amsgrad

    @amsgrad.setter
    def amsgrad(self, value: Any) -> None:
        self._amsgrad = truth_value("amsgrad", value)

    # Stepping.

    def apply_gradients(
        self,
        grads_and_vars: Iterable[Any] | None = None,
        name: str | None = None,
        experimental_aggregate_gradients: bool = True,
        grad_scale: Any = None,
    ) -> int | None:
        """Update variables by their gradients, in place.

        Everything is enqueued on the current stream; the host does not wait for the device.

        Args:
            grads_and_vars: (gradient, variable) pairs. A variable is a Variable, or a writeable C-contiguous array of a
                device (NumPy, CuPy, or anything with DLPack or an array interface), which is recognised again by its
                memory. A gradient has its variable's shape, dtype and device, or is an IndexedSlices, or None: then its
                variable stays as it is, with a UserWarning. Gradients of float32, float16 and bfloat16 may belong to
                variables of either. A variable that comes twice is updated twice, in order, with the same t. A variable
                with a constraint comes once, and not with an IndexedSlices. None: the gradients that were accumulated.
            name: ignored, for compatibility with Keras.
            experimental_aggregate_gradients: ignored, for compatibility with Keras: there is one replica.
            grad_scale: what the loss was multiplied by, > 0: a number, or a 0-d array of float16, float32 or float64,
                of the variables' device or in host memory. Gradients, the values of slices each, are multiplied by
                1 / grad_scale, a float64 quotient rounded to the dtype of the variable's real numbers, before anything
                else. None: the optimizer's own loss scale, or 1. Not with accumulated gradients.

        Returns:
            The steps done, this one included. None where the device may have left out this step or an earlier one, as
            it may with ``skip_nonfinite`` or ``loss_scale``: then `iterations` waits for the number. A step that is
            left out changes no variable, slot or average; constraints are applied to what is there. In a function that
            `capture` calls: as in the function's first replay.

        Raises:
            ArgumentTypeError: no pairs, or not of arrays; a `grad_scale` that is no number.
            ArgumentValueError: no gradients at all; a shape, dtype or device that does not fit; variables that overlap;
                a hyperparameter's value outside its range.
            ConcurrentStepError: another call of this optimizer is at work.
            SparseIndexError: on the host, an index outside its variable. (On CUDA see `check_errors`.)
            Whatever the step itself raises, nothing has changed. What a variable's constraint raises comes after a step
            that is done and counted, with that variable and those after it not constrained yet. A KeyboardInterrupt
            comes either before anything has changed, or after the step is done and counted; `iterations` tells which.
        """
        if current_tracer.get() is not None:
            refuse_in_loss("apply_gradients")
        if self._state.pending is not None:
            self._state.raise_error_of_save()
        if grads_and_vars is None:
            return self._apply_accumulated(grad_scale)
        scale = None if grad_scale is None else checked_scale(grad_scale)
        incoming = AS_THEY_ARE if scale is None else Incoming(scale)
        return self._controller.step(grads_and_vars, self._rule(scale), self._hyper, self._clip, incoming)

    def check_gradients(self, grads_and_vars: Iterable[Any]) -> None:
        """Raise what `apply_gradients` or `accumulate` would raise of these pairs, and change nothing.

        Of gradients that change in place this says that they fit, once for all; of IndexedSlices on the host also that
        the indices of now do.

        Args:
            grads_and_vars: as for `apply_gradients`.
        """
        self._controller.check(grads_and_vars, self._rule())

    def accumulate(self, grads_and_vars: Iterable[Any], grad_scale: float | None = None) -> int:
        """Add gradients to sums, which `apply_gradients()` without pairs uses.

        So a batch may come in several parts::

            for part in batch:
                adam.accumulate(gradients(part))
            adam.apply_gradients()

        Sums are kept beside the optimizer's slots, in float32 for gradients of 16 bits, and begin anew after each such
        step; a variable that a call has no gradient for has a gradient of 0 there. The step uses their mean over the
        calls, or with ``accumulation="sum"`` the sums. They are no part of `weights` and copies, and `save`
        refuses to leave them out. Everything is enqueued on the current stream, in one launch for each dtype and device
        and one for each IndexedSlices.

        Args:
            grads_and_vars: as for `apply_gradients`; new variables are registered as by `build`.
            grad_scale: by which the gradients are divided, a number > 0. With ``loss_scale`` it is left out: the scale
                stays until the step, which divides.

        Returns:
            Over how many calls the sums go.

        Raises:
            As `apply_gradients`; ArgumentValueError for a scale beside ``loss_scale``, and in a graph that is captured
            by other means than `capture`. Nothing has changed then.
        """
        refuse_in_loss("accumulate")
        scale = None
        if grad_scale is not None:
            scale = checked_scale(grad_scale)
            if type(scale) is not float:
                rule = "must be a number where gradients are accumulated"
                raise ArgumentTypeError("grad_scale", rule, type(scale).__name__, "pass float(scale), which waits")
            if self._flavour.loss_scale is not None:
                rule = "must be left out with loss_scale, by which the step divides"
                raise ArgumentValueError("grad_scale", rule, scale, "leave it out")
        return self._accumulator.now().add(
            grads_and_vars, scale, lambda targets: self._controller.build(targets, self._rule())
        )

    def discard_accumulated(self) -> None:
        """Forget the gradients that were accumulated since the last step."""
        refuse_in_loss("discard_accumulated")
        self._accumulator.now().clear_call()()

    def _apply_accumulated(self, grad_scale: Any) -> int | None:
        if grad_scale is not None:
            rule = "must be left out with accumulated gradients, which are divided already"
            raise ArgumentValueError("grad_scale", rule, shown(grad_scale), "pass it to accumulate")
        sums = self._accumulator.now()
        pairs, incoming = sums.sums(), sums.taken(mean=self._flavour.accumulation == "mean")
        update = self._rule(1.0 if incoming.calls > 1 else None)
        return self._controller.step(pairs, update, self._hyper, self._clip, incoming)

    def _rule(self, scale: Any = None, *, is_guarded: bool = False) -> UpdateRule:
        """Which update the present configuration asks for; the same object for the same configuration.

        Args:
            scale: of the gradients: a number, an array on a device, or None.
            is_guarded: whether the device decides for another reason than the configuration.
        """
        clip, flavour, hyper = self._clip, self._flavour, self._hyper
        adjusts = flavour.maximize or hyper["weight_decay"] or hyper["l2"] or self._state.settings_decay
        searched = self._is_guarded
        scaled = scale is not None or flavour.loss_scale is not None
        guarded = searched or is_guarded or not (scale is None or type(scale) is float)
        key = self._amsgrad, clip.clipvalue is None, clip.norm, bool(adjusts), scaled, guarded
        rule = self._rules.get(key)
        if rule is None:
            rule = self._rules[key] = _update_rule(
                *(self._complex_mode, self._amsgrad, clip.clipvalue is not None, clip.norm, flavour.use_ema),
                *(bool(adjusts), *flavour.halves, scaled, guarded, searched),
                measured=flavour.telemetry,
                overwrites=flavour.ema_overwrite_frequency is not None,
            )
        return rule

    def minimize(
        self,
        loss: Callable[[], Any] | None,
        var_list: Any,
        grad_loss: Any = None,
        name: str | None = None,
        *,
        grad_fn: Callable[[], Sequence[Any]] | None = None,
    ) -> int | None:
        """Differentiate a loss and update variables by its gradients.

        Args:
            loss: a function without arguments that computes with variables by NumPy or CuPy calls, or by PyTorch's or
                JAX's; called once, while the device of the variables is CuPy's current one, unless `var_list` is a
                function or they lie on several. What it returns is summed.
            var_list: a Variable; any nesting of lists, tuples, dicts (in the order of their keys), generators and views
                of dicts' values; or a function that returns such and is called after the loss.
            grad_loss: multiplies the gradient: a number, or an array of the loss's shape; None is 1. Not with
                `grad_fn`.
            name: ignored, for compatibility with Keras.
            grad_fn: a function without arguments that returns the gradients of the variables in their order, computed
                by other means; then the loss is not called and may be None.

        With ``loss_scale`` the gradient is multiplied by the scale from the start; `grad_fn` returns gradients of a
        loss that was multiplied by it already.

        Returns:
            As `apply_gradients`.

        Raises:
            ArgumentTypeError: the loss is not callable, or returns no numbers; `grad_fn` is not, or returns no list.
            ArgumentValueError: as `apply_gradients`; something else than Variables in `var_list`; no variable that the
                loss depends on. Nothing has changed then.
            NotImplementedError: the loss uses an operation whose derivative is not known.
        """
        var_list = _flat(var_list)
        if grad_fn is None:
            with _device_of_all(var_list):
                _, pairs = _autodiff().gradients(loss, var_list, self._scaled(grad_loss))
        else:
            gradients = _given_gradients(grad_fn, grad_loss)
            variables = _flat(var_list()) if callable(var_list) else var_list
            if len(gradients) != len(variables):
                rule = f"must return one gradient for each of the {len(variables)} variables"
                raise ArgumentValueError("grad_fn", rule, len(gradients), "return None where there is no gradient")
            pairs = list(zip(gradients, variables, strict=True))
        return self.apply_gradients(pairs, name)

    def _scaled(self, grad_loss: Any) -> Any:
        """`grad_loss` times the loss scale, if there is one."""
        scale = self.loss_scale
        if scale is None:
            return grad_loss
        if isinstance(grad_loss, (list, tuple)):
            return [self._scaled(each) for each in grad_loss]
        return scale.array if grad_loss is None else grad_loss * scale.array

    def get_gradients(self, loss: Callable[[], Any], params: Any) -> list[Any]:
        """The gradients of a loss, unclipped, in the order of the variables; no state changes.

        Args:
            loss: as for `minimize`.
            params: as `var_list` of `minimize`.

        Raises:
            ArgumentValueError: the loss does not depend on one of the variables.
            And as `minimize`.
        """
        return [gradient for gradient, _ in _all_gradients(loss, params)]

    def get_updates(self, loss: Callable[[], Any], params: Any) -> list[int | None]:
        """Differentiate a loss and update every variable: a list of the one result of `apply_gradients`.

        Raises:
            As `get_gradients` and `apply_gradients`.
        """
        return [self.apply_gradients(_all_gradients(loss, params, self._scaled(None)))]

    def capture(self, function: Callable[[], object]) -> Replayable:
        """Capture a function with its steps in a CUDA graph, whose replays cost one launch.

        No step is done: variables, slots and `iterations` are as before. (Slots that are missing are created, as by
        `build`.) Where nothing can be captured, on the host, the function is not called, and each replay calls it. ::

            graph = adam.capture(lambda: adam.minimize(loss, variables))
            for _ in range(1000):
                graph.replay()

        A replay goes on where the last step ended, whether that was eager or a replay, with the bits of a call of the
        function: the hyperparameters are those of the time of the replay, schedules and callables evaluated for its
        step. A step of the function is one kernel of the graph for each dtype and device, and those of a norm. Several
        functions may be captured, and other optimizers may step in the function: a replay stages and counts the steps
        of all of them.

        Steps that the device may leave out (``skip_nonfinite``, ``loss_scale``), that are measured (``telemetry``) or
        whose ``grad_scale`` lies on the device are replayed too: a replay stages the scalars of every number of steps
        that may be done by then. It has room for 64 numbers; where more are possible, so far is the device behind, the
        replay waits for the device. A function makes one such step of an optimizer. Callable hyperparameters are called
        before the graph is launched: the `iterations` of another optimizer whose such step is in the same function are
        those from before the replay.

        Gradients may be accumulated in the function: it has sums of its own, which it begins and must use, by as many
        calls of `accumulate` as the captured call of it makes. Sums from outside wait for a step outside.

        Args:
            function: without arguments; it computes gradients by CuPy, or by a loss, and calls `apply_gradients` or
                `minimize`. Call it once before, for what is compiled or looked up at the first call. On CUDA it is
                called once here, while CuPy's current stream is one under capture (in the mode "relaxed"), and must not
                wait for the device. What it allocates lives as long as the graph, in memory of the graph's own, and is
                written anew by each replay; what it reads, a batch, say, is read where it lies: copy the next one there
                (``batch[...] = ...``). PyTorch's own functions are captured by ``torch.cuda.graph``.

        Returns:
            An object with `replay()`, which enqueues everything on the current stream and returns the steps done, or
            None as `apply_gradients` does. It keeps alive what it needs. Averages that overwrite variables
            (`ema_overwrite_frequency`) do so at the end of a replay, or of a step that the device decides about.

        Raises:
            ArgumentTypeError: `function` is not callable; a gradient in host memory.
            ArgumentValueError: the function makes no step of this optimizer, waits, steps variables of another device,
                makes two steps where one is allowed (see above, and `ema_overwrite_frequency`), or does not use what it
                accumulates; a call inside of a capture. `replay` says the same of a function that the host calls. With
                deferred rows: their first step, a dense gradient behind an `IndexedSlices` in one function, a look at
                the variable otherwise than by `gather`.
            And whatever the function raises. Nothing has changed then.
        """
        refuse_in_loss("capture")
        return captured(function, self._controller.stepper())

    def stage(self) -> int | None:
        """Let the steps in graphs that were captured by other means than `capture` be the next step.

        Such a graph (``torch.cuda.graph``, ``stream.begin_capture``) repeats the step with the count and the
        hyperparameters that it had at the capture, until `stage` is called before each launch, on the same stream. ::

            with torch.cuda.graph(graph):
                loss.backward()
                adam.apply_gradients([(p.grad, p) for p in parameters])
            for _ in range(1000):
                adam.stage()
                graph.replay()

        The hyperparameters are those of now, schedules and callables evaluated once, as in a step of `apply_gradients`.
        They are written to where all graphs of this optimizer read them; a graph should have one step of it. A graph
        that is launched again repeats its step, which is counted once. The host waits for nothing, but where 64 steps
        or more may have been left out of which it has not heard. A capture counts its step, though nothing of it runs:
        the first `stage` after it begins with that step, if no other step came in between.

        Of steps that the device may leave out (``skip_nonfinite``, ``loss_scale``) `stage` sends the scalars of each
        that may be the next one. They count from `stage` on, until a later step shows that nobody has launched them.
        Such a step is captured when it is known how many are done: read `iterations` before, which waits.

        Returns:
            The steps done, the one included that the launch does; None where the host does not know, as by
            `apply_gradients`.

        Raises:
            ArgumentTypeError, ArgumentValueError: no step has been captured; as `apply_gradients` for hyperparameters;
                as `capture`'s replay where a graph does not fit the optimizer any more; a step that
                `ema_overwrite_frequency` lets overwrite variables; graphs of several devices that decide about their
                steps; a call inside of a capture. Nothing has changed then.
            ConcurrentStepError: another call of this optimizer is at work.
        """
        refuse_in_loss("stage")
        return self._controller.stage()

    def build(self, var_list: Iterable[Any]) -> None:
        """Create the slots of variables ahead of their first step, so that `set_weights` and `load` fit.

        Args:
            var_list: variables as in `apply_gradients`, or one alone.

        Raises:
            ArgumentTypeError, ArgumentValueError: what is no variable, or cannot be updated; nothing has changed then.
        """
        self._controller.build(var_list, self._rule())

    def synchronize(self) -> None:
        """Wait until all steps are done."""
        self._controller.guards.ask()
        for device in {weight.device for weight in self._state.weights}:
            device.synchronize()

    def check_errors(self) -> None:
        """Wait for the device and raise what it could not say earlier.

        Raises:
            SparseIndexError: on CUDA, an index outside its variable since the last check; such rows were left out.
        """
        with self._state.alone():
            self._controller.check_errors()
        self._accumulator.check_errors()

    # Hyperparameters: each reads as its present value and may be assigned at any time.

    @property
    def name(self) -> str:
        """The optimizer's name."""
        return self._state.name

    learning_rate = Hyperparameter(
        "learning_rate",
        "The learning rate: a float, the schedule, the 0-d array or variable, or what a callable returns now.",
    )
    lr = Hyperparameter("learning_rate", "Another name of learning_rate.")
    beta_1 = Hyperparameter("beta_1", "Decay of the mean of gradients, in [0, 1).")
    beta_2 = Hyperparameter("beta_2", "Decay of the mean of squared gradients, in [0, 1).")
    epsilon = Hyperparameter("epsilon", "Added to the root of v, >= 0. Assigned here, 0 is 0.")
    decay = Hyperparameter("decay", "The learning rate is divided by 1 + decay (t - 1); >= 0.")
    weight_decay = Hyperparameter("weight_decay", "Each step scales variables by 1 - learning_rate weight_decay; >= 0.")
    l2 = Hyperparameter("l2", "So many times the variable is added to its gradient; >= 0.")
    clipvalue = ClipAttribute("clipvalue", "Bound of every gradient element's absolute value, > 0, or None.")
    clipnorm = ClipAttribute("clipnorm", "Bound of each gradient's L2 norm, > 0, or None. Applied after clipvalue.")
    global_clipnorm = ClipAttribute(
        "global_clipnorm", "Bound of the L2 norm over all gradients of a step, > 0, or None. Applied after clipvalue."
    )

    @property
    def complex_mode(self) -> str:
        """How complex variables are updated: "abs2" or "real_imag"."""
        return self._complex_mode

    @property
    def flavour(self) -> Flavour:
        """What the optimizer does besides plain Adam: maximize, epsilon_form, use_ema and its numbers, and so on."""
        return self._flavour

    @property
    def loss_scale(self) -> CurrentLossScale | None:
        """The loss scale, or None: multiply a loss by its `array`, and every step divides the gradients by it.

        After a step that was left out it is halved, after ``growth_interval`` good ones in a row doubled, on the
        device. It is part of `weights`, with the number of good steps. `minimize` multiplies by it itself.
        """
        settings = self._flavour.loss_scale
        return None if settings is None else CurrentLossScale(self._controller.loss_scale(), settings)

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out since the optimizer was made, loaded or copied. Waits for the device."""
        return self._controller.guards.skipped()

    def read_telemetry(self) -> Telemetry | None:
        """The numbers of the last step that the device has finished; None before there is one. Never waits.

        Raises:
            ArgumentValueError: the optimizer was made without ``telemetry``.
        """
        if not self._flavour.telemetry:
            remedy = "construct the optimizer with telemetry=True"
            raise ArgumentValueError("telemetry", "must be True for its numbers to be read", False, remedy)
        return self._controller.guards.telemetry()

    def set_group(self, variables: Iterable[Any], **settings: Any) -> None:
        """Give some variables numbers of their own; any number of groups takes one launch. Called again, it adds to it.

        Args:
            variables: those of the group, or one alone; new ones are registered as by `build`.
            **settings: ``learning_rate_multiplier``, ``weight_decay``, ``beta_1``, ``beta_2``, ``epsilon``: numbers, or
                None for the optimizer's own; ``sparse_update``: "dense", "deferred" or None.

        Raises:
            ArgumentTypeError, ArgumentValueError: what is no variable; an unknown name; a number outside its range.
                Nothing has changed then.
        """
        if settings.get("sparse_update") == "deferred":
            check_deferrable(self._flavour)
        self._controller.set_group(variables, self._rule(), settings)

    def get_group(self, variable: Any) -> Settings:
        """What the updates of a variable take in place of the optimizer's numbers; None where they take those.

        Raises:
            ArgumentTypeError: no variable.
        """
        settings = self._state.settings_of(self._state.registry.find(variable, "variable", News()))
        assert isinstance(settings, Settings)
        return settings

    def exclude_from_weight_decay(
        self, var_list: Iterable[Any] | None = None, var_names: Iterable[str] | None = None
    ) -> None:
        """Let the weights of some variables not decay, whatever `weight_decay` and their group say.

        Args:
            var_list: variables, or one alone; new ones are registered as by `build`.
            var_names: regular expressions, searched for in the names of variables, also of those that come later.

        Raises:
            ArgumentTypeError, ArgumentValueError: what is no variable, or no regular expression. Nothing has changed
                then.
        """
        patterns = checked_patterns(var_names)
        self._controller.never_decay([] if var_list is None else var_list, self._rule(), patterns)

    def overwrite_by_averages(self, var_list: Iterable[Any] | None = None) -> None:
        """Overwrite variables by their moving averages, as at the end of a training.

        Args:
            var_list: which, or one alone; default: all that have an average.

        Raises:
            ArgumentTypeError, ArgumentValueError, SlotNotFoundError: what is no variable of the optimizer, or has no
                average; a call inside a loss that is being differentiated. Nothing has changed then.
        """
        refuse_in_loss("overwrite_by_averages")
        self._controller.overwrite_by_averages(var_list)

    finalize_variable_values = overwrite_by_averages
    """Keras's name."""

    # State.

    @property
    def iterations(self) -> Variable:
        """The counter of steps done, an int64 Variable on the host. Assigning an int sets it.

        With ``skip_nonfinite`` or ``loss_scale`` reading this attribute waits for the device; the Variable by itself
        holds the largest number of steps that may be done.
        """
        self._controller.guards.settle()
        if not self._state.counts:
            # A step that is at work, which a callable learning rate may be part of, does so itself.
            busy, alone = contextlib.suppress(ConcurrentStepError), self._state.alone
            with busy, alone(is_brief=True), Transaction(self._state) as change:
                change.ensure_counter()
        return self._state.counter

    @iterations.setter
    def iterations(self, value: Any) -> None:
        counter = self._state.counter
        if value is counter:
            return  # `adam.iterations += 1` has changed it in place
        if isinstance(value, Variable):
            self._count_in(value)
            return
        if not is_whole(value):
            raise ArgumentTypeError(
                "iterations", "must be an int", type(value).__name__, "pass the number of steps done"
            )
        refuse_in_loss("iterations")
        count = checked_count(value, "iterations")
        with self._state.alone(), Transaction(self._state) as change:
            self._controller.guards.settle_inside()
            counter = change.ensure_counter()
            make_all([functools.partial(counter.value.fill, count), *change.commit])
            self._controller.staged.forget()

    def _count_in(self, counter: Variable) -> None:
        """Count in the user's variable; only before the counter exists."""
        if self._state.counts:
            rule = "must be set before the counter exists"
            raise ArgumentValueError("iterations", rule, repr(counter), "assign an int, which sets the counter")
        if counter.shape != () or counter.dtype != np.int64 or counter.device.name != "host":
            rule = "must be an int64 scalar on the host"
            raise ArgumentValueError("iterations", rule, repr(counter), "assign an int, which sets the counter")
        checked_count(counter, "iterations")
        with self._state.alone(), Transaction(self._state) as change:
            change.set_counter(counter)

    @property
    def weights(self) -> list[Variable]:
        """The live list of iterations and slots, in order of creation. Waits as `iterations` does."""
        self._controller.guards.settle()
        return self._state.weights

    def variables(self) -> list[Variable]:
        """The same list as `weights`."""
        return self.weights

    def get_slot_names(self) -> list[str]:
        """Names of the slots in order of first creation."""
        return self._state.names

    def get_slot(self, var: Any, slot_name: str) -> Variable:
        """The slot of a variable.

        Raises:
            SlotNotFoundError: the variable has no such slot.
            ArgumentTypeError: `var` is no variable.
        """
        return self._state.slot(self._state.registry.find(var, "var", News()), slot_name)

    def add_slot(self, var: Any, slot_name: str, initializer: Any = "zeros", shape: Any = None) -> Variable:
        """Create a slot of a variable, or return it where it exists.

        Args:
            var: the variable.
            slot_name: "m", "v" and "vhat" are what steps use; others are the caller's.
            initializer: "zeros", "ones", a callable(shape=, dtype=) or the value itself, which has a shape of its own.
            shape: an int or a tuple, of a slot of the caller's; default: the variable's.

        Raises:
            ArgumentTypeError, ArgumentValueError: what is no variable, no initializer, or no shape.
        """
        return self._controller.add_slot(var, slot_name, initializer, None if shape is None else as_shape(shape))

    def forget(self, variable: Any) -> None:
        """Drop the slots of a variable, and everything that stands for it; a later step begins with new slots.

        Args:
            variable: a variable that was stepped or built.

        Raises:
            ArgumentTypeError: no variable.
            ArgumentValueError: a variable that the optimizer does not know. Nothing has changed then.
        """
        self._controller.forget(variable)

    def replace(self, old: Any, new: Any, index: Any = None) -> None:
        """Hand the slots of a variable, or rows of them, over to another variable: what is grown, pruned or swapped.

        Args:
            old: a variable with slots; the optimizer forgets it.
            new: a variable that the optimizer does not know yet, of the same dtype and device. Its slots stand in
                `weights` where those of `old` stood.
            index: whole numbers [n], which rows of `old` the rows of `new` continue, in [0, rows of `old`), as often as
                wanted: then `new` has the shape [n, ...row]. None: `new` has the shape of `old`. Slots of another shape
                than the variable's, which only `add_slot` makes, are handed over as they are.

        Raises:
            ArgumentTypeError, ArgumentValueError: no variables; `old` has no slots, or `new` has; another shape, dtype
                or device.
            SparseIndexError: a row out of range.
            Whatever is raised, nothing has changed.
        """
        self._controller.replace(old, new, index)

    def add_weight(
        self,
        name: str,
        shape: Any,
        dtype: Any = None,
        initializer: Any = "zeros",
        trainable: bool | None = None,
        synchronization: str = "auto",
        aggregation: str = "none",
    ) -> Variable:
        """Create a variable on the default device; it is not part of `weights`.

        Args:
            name: its name.
            shape: an int or a tuple.
            dtype: default float32.
            initializer: as in `add_slot`; a value must have that shape.
            trainable: default True, with synchronization "on_read" False.
            synchronization: "auto", "none", "on_write" or "on_read": TensorFlow's, only "on_read" has a meaning here.
            aggregation: ignored, for compatibility with Keras.

        Raises:
            ArgumentValueError: "on_read" for a trainable variable; another shape.
        """
        on_read = str(synchronization).lower().endswith("on_read")
        is_trainable = not on_read if trainable is None else truth_value("trainable", trainable)
        if on_read and is_trainable:
            rule = "must be 'auto', 'none' or 'on_write' for a trainable variable"
            raise ArgumentValueError("synchronization", rule, synchronization, "pass trainable=False")
        shape = as_shape(shape)
        array = initialized(initializer, shape, as_dtype("float32" if dtype is None else dtype), find_device(None))
        if tuple(array.shape) != shape:
            raise ArgumentValueError("initializer", f"must give shape {shape}", tuple(array.shape), "reshape it")
        return Variable.over(array, find_device(None), name, is_trainable)

    def get_weights(self) -> list[Any]:
        """NumPy copies of `weights`, the first a np.int64. Waits for the device; raises as `check_errors`."""
        return [array[()] for array in self.export().values()]

    def export(self) -> dict[str, np.ndarray]:
        """NumPy copies of `weights` by name: "iterations", and "<variable>/<slot>" for each slot, such as "w/m".

        Of several variables with one name the second is called "<variable>_1", and so on, in order of their first slot.
        Waits for the device; raises as `check_errors`.
        """
        with self._state.alone():
            self._controller.check_errors()
            self._controller.guards.settle_inside()
            return self._state.export()

    def set_weights(self, weights: Iterable[Any]) -> None:
        """Overwrite `weights` by arrays of the same shapes, cast to their dtypes: all of them or, on an error, none.

        Args:
            weights: as many arrays as there are weights, in their order: see `build`. The list of an AMSGrad optimizer
                (3n + 1 arrays for n variables) also fits the same optimizer without AMSGrad. Live arrays of the
                optimizer count as they are before the call.

        Raises:
            ArgumentTypeError, ArgumentValueError: another number of arrays, other shapes, no numbers, or a first array
                that is no number of steps; nothing has changed then.
        """
        refuse_in_loss("set_weights")
        with self._state.alone():
            self._controller.guards.settle_inside()
            arrays, count = list(weights), len(self.weights)
            variables, others = len(self._state.variables), 1 + len(self._state.own)
            if count == 2 * variables + others and len(arrays) == 3 * variables + others:
                arrays = arrays[:count]
            if len(arrays) != count:
                rule = f"must hold {count} arrays for optimizer {self.name!r}"
                raise ArgumentValueError(
                    "weights", rule, f"{len(arrays)}", "call build(variables) first, or pass the full list"
                )
            by_name = dict(zip(self._state.weight_names(), arrays, strict=True))
            self._state.restore(by_name, lambda number: f"weights[{number}]")

    def restore(self, arrays: Any) -> None:
        """Overwrite the state by arrays of the same shapes, cast to the slots' dtypes: all of it or, on an error, none.

        Args:
            arrays: a mapping with one array for each name that `export` gives. Live arrays of the optimizer count as
                they are before the call.

        Raises:
            ArgumentTypeError, ArgumentValueError: an array is missing, left over, of another shape, holds no numbers,
                or is "iterations" and no number of steps; nothing has changed then.
        """
        refuse_in_loss("restore")
        if not isinstance(arrays, Mapping):
            rule = "must be a mapping from names to arrays"
            raise ArgumentTypeError("arrays", rule, type(arrays).__name__, "pass what export() returned")
        with self._state.alone():
            self._controller.guards.settle_inside()
            self._state.restore(arrays, lambda number: f"arrays[{self._state.weight_names()[number]!r}]")

    def save(
        self,
        path: PathOrFile,
        *,
        variables: bool = False,
        asynchronous: bool = False,
        on_busy: str = "wait",
        user: Mapping[str, Any] | None = None,
    ) -> PendingSave | None:
        """Write iterations, slots and configuration to one file, replaced atomically; its format: state/README.md.

        Args:
            path: a file: `.safetensors` for that container, any other suffix for NumPy's
                `.npz`. Or a binary file object.
            variables: whether to write the variables too, those that were stepped or built.
            asynchronous: whether to return at once. The state is copied in the order of the current stream, where it
                comes before the next step, and a thread writes the file. The host waits for the device with
                ``skip_nonfinite`` and ``loss_scale`` alone, and `check_errors` is left to the caller.
            on_busy: what to do while an earlier asynchronous save of this optimizer is at work: "wait" or "error".
            user: what else the file is to tell, an epoch say, as JSON has it; `load` leaves it to
                ``gpu_adam.state.checkpoint.read(path)[1]["user"]``.

        Returns:
            With `asynchronous` a `PendingSave`, whose `wait()` returns when the file is there and raises what has
            prevented it; so does, where nobody waits, the next save or step. The interpreter's exit waits, too.

        Raises:
            ArgumentTypeError, ArgumentValueError: a name or a dtype (complex128 in `.safetensors`) that the container
                cannot hold, a missing library; a `user` that JSON cannot hold; accumulated gradients that wait for
                their step, of which no file tells; a call while a graph is captured.
            ConcurrentStepError: another save is at work, with ``on_busy="error"``; another call is.
            OSError: the file system refuses; the old file is as it was.
            SparseIndexError: as `check_errors`.
        """
        state = self._state
        state.end_pending_save(one_of("on_busy", on_busy, ("wait", "error")))
        for device in {weight.device for weight in state.weights}:
            refuse_in_capture(device, "save")
        if self._accumulator.calls:
            rule, got = "must come before gradients are accumulated", f"{self._accumulator.calls} calls of accumulate"
            raise ArgumentValueError("save", rule, got, "call apply_gradients() first")
        if variables:
            self._controller.follow_memory()
        with state.alone():
            if not asynchronous:
                self._controller.check_errors()
            self._controller.guards.settle_inside()
            note = saving.note_of(state, self._flavour, self.get_config(), user)
            write = saving.writing(path, state, note, variables=variables, lasting=asynchronous)
            if not asynchronous:
                write()
                return None
            state.pending = pending = PendingSave(write)
            return pending

    def load(self, path: PathOrFile, *, variables: bool = False) -> None:
        """Read by name what `save` wrote, in this or an earlier version; the slots must exist: see `build`.

        Hyperparameters and groups stay as they are: ``gpu_adam.state.checkpoint.read(path)[1]`` has those of the file.
        Gradients that were accumulated are dropped. A save that is at work is waited for.

        Args:
            path: the file, or a binary file object.
            variables: whether to read the variables too, which the file must have then. Otherwise they stay.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: no whole checkpoint of Adam, or one of other variables, shapes, dtypes or another
                `complex_mode`; nothing has changed then.
        """
        refuse_in_loss("load")
        state = self._state
        if state.pending is not None:
            state.pending.join()
        contents = checkpoint.read(path)
        if variables:
            self._controller.follow_memory()
        with state.alone():
            self._controller.guards.settle_inside()
            written = written_calls(state.registry.arrays(state.variables)) if variables else []
            also = [self._accumulator.clear_call(), *written]
            saving.restoring(name_of(path), state, contents, variables=variables, also=also)()

    # Configuration.

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments as JSON-serialisable values; a callable counts as what it returns now."""
        clips = {"clipnorm": self.clipnorm, "clipvalue": self.clipvalue, "global_clipnorm": self.global_clipnorm}
        return {
            "name": self.name,
            **{name: bound for name, bound in clips.items() if bound is not None},
            **{
                name: _serialized(name, self._hyper[name])
                for name in ("learning_rate", "decay", "beta_1", "beta_2", "epsilon")
            },
            "amsgrad": self.amsgrad,
            **({} if self.complex_mode == COMPLEX_MODES[0] else {"complex_mode": self.complex_mode}),
            **{name: self._hyper[name] for name in ("weight_decay", "l2") if self._hyper[name]},
            **self._flavour.config(),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], custom_objects: Mapping[str, Any] | None = None) -> Adam:
        """An optimizer with this configuration, without its state. The config is left as it is.

        Args:
            config: what `get_config` returns.
            custom_objects: schedule classes of the caller's own, by name.

        Raises:
            ArgumentTypeError, ArgumentValueError: as the constructor; a schedule of unknown name.
        """
        arguments = dict(config)
        if "lr" in arguments:
            arguments["learning_rate"] = arguments.pop("lr")
        if isinstance(arguments.get("learning_rate"), Mapping):
            arguments["learning_rate"] = schedules.deserialize(arguments["learning_rate"], custom_objects)
        return cls(**arguments)

    # Copies: everything reachable is copied, variables included, by pickle and deepcopy alike. A twin over the same
    # variables is made by from_config, build and set_weights.

    def __getstate__(self) -> dict[str, Any]:
        self._controller.follow_memory()
        self._controller.guards.settle()
        state = dict(self.__dict__)
        del state["_controller"], state["_accumulator"], state["_rules"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()


_update_rule = functools.cache(UpdateRule)


def _autodiff() -> Any:
    """The package of derivatives, imported with the first loss: a process that brings its gradients starts faster."""
    return importlib.import_module("gpu_adam.autodiff")


def _flat(variables: Any) -> Any:
    """The variables of a nesting in a list, in which they can be gone through again; a function stays as it is."""
    return variables if callable(variables) else _autodiff().flatten(variables)


def _device_of_all(variables: Any) -> AbstractContextManager[Any]:
    """A context in which the variables' device is current; nothing where they are not known yet, or on several."""
    devices = set() if callable(variables) else {variable.device for variable in variables}
    return devices.pop().activate() if len(devices) == 1 else nullcontext()


def _given_gradients(grad_fn: Any, grad_loss: Any) -> list[Any]:
    """What `grad_fn` returns, checked to be a list or tuple: an array is one gradient, not one for each of its rows."""
    if not callable(grad_fn):
        got = type(grad_fn).__name__
        raise ArgumentTypeError("grad_fn", "must be a callable without arguments", got, "pass a function")
    if grad_loss is not None:
        rule = "must be left out together with grad_fn"
        raise ArgumentValueError("grad_loss", rule, type(grad_loss).__name__, "multiply the gradients by it yourself")
    gradients = grad_fn()
    if not isinstance(gradients, (list, tuple)):
        got = type(gradients).__name__
        raise ArgumentTypeError("grad_fn()", "must return a list or tuple of gradients", got, "return them in a list")
    return list(gradients)


def _all_gradients(loss: Callable[[], Any], params: Any, grad_loss: Any = None) -> list[tuple[Any, Variable]]:
    """(gradient, variable) pairs; raises where a variable has no gradient."""
    params = _flat(params)
    with _device_of_all(params):
        _, pairs = _autodiff().gradients(loss, params, grad_loss)
    without = [variable.name for gradient, variable in pairs if gradient is None]
    if without:
        rule = "must be differentiable with respect to every variable"
        raise ArgumentValueError("loss", rule, f"no gradient for {without}", "leave those variables out of params")
    return list(pairs)


def _is_zero(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and value == 0


def _serialized(name: str, value: Any) -> Any:
    if isinstance(value, LearningRateSchedule):
        return schedules.serialize(value)
    return value if type(value) is float else evaluated(name, value)
