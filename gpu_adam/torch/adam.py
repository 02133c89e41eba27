"""Adam and AdamW as optimizers of torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from gpu_adam.devices import Device, find_device
from gpu_adam.devices.native_tensors import pairs_with_gradients
from gpu_adam.errors import ArgumentTypeError, ArgumentValueError
from gpu_adam.hyperparameters import NO_CLIPPING, PLAIN
from gpu_adam.interop.torch import SLOTS, numbers_of
from gpu_adam.kernels import UpdateRule
from gpu_adam.state.adam_state import AdamState
from gpu_adam.step.controller import Controller
from gpu_adam.step.gradients import AS_THEY_ARE, Incoming
from gpu_adam.step.guard import checked_scale
from gpu_adam.torch.groups import Group
from gpu_adam.torch.numbers import check
from gpu_adam.torch.orders import Orders
from gpu_adam.torch.states import States, check_shapes, has_moments
from gpu_adam.variables import IndexedSlices

_NO_NUMBERS = dict.fromkeys(("learning_rate", "beta_1", "beta_2", "epsilon", "decay", "weight_decay", "l2"), 0.0)
"""The optimizer's own numbers, which nothing takes: every parameter is in a cohort."""


class Adam(torch.optim.Optimizer):  # type: ignore[misc]
    r"""torch.optim.Adam, with all parameters of a dtype and device updated by one launch, on CUDA and on the CPU.

    Step t of a parameter θ with gradient g; t counts the steps in which θ had a gradient::

        g    = -g                                             maximize
        g    = g + weight_decay θ                             with decoupled_weight_decay not; instead
        θ    = θ (1 - lr weight_decay)                        with decoupled_weight_decay, as AdamW
        m    = m + (g - m) (1 - β1)                           exp_avg
        v    = v + (g² - v) (1 - β2)                          exp_avg_sq; max_exp_avg_sq = max(max_exp_avg_sq, v)
        θ    = θ - lr m' / (√v' + eps)                        m' = m / (1 - β1^t), v' = v / (1 - β2^t)

    Complex parameters are updated as two real ones, those of 16 bits in float32, in which their moments are too. Sparse
    gradients give the bits of the same gradient written out.

    `param_groups`, hooks, closures, schedulers and `state_dict` are torch's, and a `state_dict` fits the class of torch
    as it fits this one. The tensors of `state` share the memory of what steps read and write. Parameters of groups with
    and without `amsgrad` take two launches, and are two steps where one of them fails.

    torch.amp.GradScaler leaves it to `step` to divide by the scale and to do nothing where a gradient is not finite, as
    with torch's `fused`: the device does both, the host does not wait, and `grad` stays as it is. The host waits for
    earlier steps that may have been left out where other parameters have gradients than in these, and where `state` is
    read. It waits at every step where the parameters lie on several devices, or some groups alone have `amsgrad`.

    Args:
        params: parameters, (name, parameter) pairs or dicts of groups; float32, float64, float16, bfloat16 or complex;
            without gaps in memory, in any order: also channels_last, or a transpose of what is contiguous.
        lr: learning rate, >= 0 and finite. A number, or a tensor with one element, which is read at every step; one on
            a CUDA device makes the host wait then.
        betas: decay of the means of g and g², each in [0, 1); numbers or such tensors.
        eps: added to the root, >= 0.
        weight_decay: >= 0; see above.
        amsgrad: whether to divide by the root of the maximum of v over the past.
        foreach, capturable, fused: accepted, and make no difference: `state[p]["step"]` is a tensor in host memory also
            where torch has it on the device, to which loading moves it; a step cannot be captured in a CUDA graph.
        maximize: whether to go uphill.
        differentiable: must be False.
        decoupled_weight_decay: see above.

    Raises:
        ArgumentTypeError, ArgumentValueError: a number of the wrong kind, or outside its range.
        What torch.optim.Optimizer raises about `params`.

    References:
        https://docs.pytorch.org/docs/stable/generated/torch.optim.Adam.html; the papers that gpu_adam.Adam names.
    """

    _step_supports_amp_scaling = True  # which GradScaler looks at

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[Any, Any] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,  # as torch has it, whose groups show it
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        check(defaults)
        super().__init__(params, defaults)
        self._begin()

    def _begin(self) -> None:
        """Have no slots, and take the first step's moments from `state`."""
        self._core = AdamState(type(self).__name__, "real_imag")
        self._controller = Controller(self._core, PLAIN)
        self._orders = Orders()
        self._states = States(self._core, self._orders)
        self._groups: list[Group] = []
        self._layout: Any = None
        self._places: list[torch.device] = []
        self._devices: list[Device] = []
        self._has_odd = False  # whether there was a gradient that the core does not take as it is

    @property
    def state(self) -> Any:
        """What is known of each parameter, as torch has it. Waits until it is known which steps the device left out."""
        self._controller.guards.settle()
        return self._entries

    @state.setter
    def state(self, entries: Any) -> None:
        self.__dict__["state"] = entries

    @property
    def _entries(self) -> Any:
        """The same, with counts of steps that may be too large yet."""
        return self.__dict__["state"]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        self._begin()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` of this class or of torch's gave; moments in the dtype that they have there.

        Args:
            state_dict: of an optimizer with as many groups and parameters.

        Raises:
            ValueError: another number of groups or parameters.
        """
        given: dict[str, Any] = {}

        def read(_: Any, present: dict[str, Any]) -> None:
            given.update(present)

        # The last hook before the work sees what the others have put in its place, the first one after it is seen by
        # the others.
        before = self.register_load_state_dict_pre_hook(read)
        after = self.register_load_state_dict_post_hook(lambda _: self._keep_moments(given), prepend=True)
        with before, after:
            super().load_state_dict(state_dict)

    def _keep_moments(self, state_dict: dict[str, Any]) -> None:
        """Take the moments of parameters of 16 bits, to which torch has rounded them, as they were."""
        params = [param for group in self.param_groups for param in group["params"]]
        for number, param in zip(numbers_of(state_dict), params, strict=True):
            if param.is_floating_point() and param.itemsize == 2:
                entry = state_dict["state"].get(number, {})
                moments = {name: entry[name].to(param.device, copy=True) for name in SLOTS if name in entry}
                self.state[param].update(moments)

    # As torch's own optimizers: torch.compiler.disable would import a second's worth of modules with this one.
    @torch._disable_dynamo  # type: ignore[untyped-decorator]
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, in place.

        Args:
            closure: evaluates the model again, with gradients, and returns the loss.

        Returns:
            What the closure returns, or None.

        Raises:
            ArgumentTypeError, ArgumentValueError: a number of a group outside its range; a parameter with gaps in
                memory, or of a dtype that is not computed with; a gradient that does not fit. No parameter has changed
                then (see the class about `amsgrad`). A CUDA graph is captured.
            ConcurrentStepError: another step of this optimizer is at work.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad(), ExitStack() as stack:
            is_known = self._is_known()
            if not is_known:
                self._find_devices()
            for device in self._devices:
                stack.enter_context(device.on_stream_of(torch))
                _refuse_capture(device)
            if not is_known:
                self._follow()
            plain = [group for group in self._groups if not group.group["amsgrad"]]
            amsgrads = [group for group in self._groups if group.group["amsgrad"]]
            incoming = self._incoming(is_one_step=not (plain and amsgrads) and len(self._places) == 1)
            if incoming is not None:
                self._update(plain, False, incoming)
                self._update(amsgrads, True, incoming)
        return loss

    def _incoming(self, *, is_one_step: bool) -> Incoming | None:
        """What GradScaler has said of the gradients; None where the step is to be left out.

        Args:
            is_one_step: whether the device can decide for all parameters at once, so that the host need not wait.
        """
        scale, flag = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scale is None and flag is None:
            return AS_THEY_ARE
        if is_one_step and all(number is None or torch.is_tensor(number) for number in (scale, flag)):
            return Incoming(self._placed(scale), self._placed(flag))
        if flag is not None and float(flag):
            return None
        return Incoming(None if scale is None else checked_scale(float(scale)))

    def _placed(self, number: torch.Tensor | None) -> torch.Tensor | None:
        """A tensor with one element as a 0-d one beside the parameters; None for none."""
        return None if number is None else number.detach().to(self._places[0]).reshape(())

    def _update(self, groups: Sequence[Group], amsgrad: bool, incoming: Incoming) -> None:
        """Step the parameters of groups."""
        try:
            self._step(groups, amsgrad, incoming)
        except ArgumentValueError:  # which has changed nothing: of a parameter that has been reordered since, say
            if not any(self._orders.lack(param) for group in groups for param in group.params):
                raise
            self._follow()
            self._step(groups, amsgrad, incoming)

    def _step(self, groups: Sequence[Group], amsgrad: bool, incoming: Incoming) -> None:
        pairs: list[Any] = []
        new: list[Any] = []
        stepped: list[Group] = []
        for group in groups:
            own = pairs_with_gradients(torch, group.params)
            if own:
                pairs += own
                new += group.prepare(len(own))
                stepped.append(group)
        if not stepped:
            return
        rule = _rule(
            amsgrad,
            any(group.numbers.adjusts for group in stepped),
            incoming.scale is not None,
            torch.is_tensor(incoming.scale) or torch.is_tensor(incoming.found_inf),
        )
        if new:
            params, cohorts = zip(*new, strict=True)
            self._controller.set_cohorts([self._orders.target(param) for param in params], rule, cohorts)
            for group in stepped:
                group.note_told()
        pairs = self._orders.pairs(pairs)
        if self._has_odd:
            pairs = _readable(pairs)
        try:
            self._controller.step(pairs, rule, _NO_NUMBERS, NO_CLIPPING, incoming)
        except ArgumentTypeError:
            if self._has_odd or not _are_odd(pairs):
                raise
            self._has_odd = True  # from now on all are looked at first
            self._controller.step(_readable(pairs), rule, _NO_NUMBERS, NO_CLIPPING, incoming)
        if self._layout is not self._core.layout:
            self._show()

    def _show(self) -> None:
        """Let `state` show all slots of parameters that have been updated."""
        for group in self._groups:
            self._states.show(group, self._entries)
        self._states.see(self._entries)
        self._layout = self._core.layout

    def _is_known(self) -> bool:
        """Whether groups and state are those that the last step left."""
        groups = self._groups
        return (
            len(groups) == len(self.param_groups)
            and all(known.is_of(group) for known, group in zip(groups, self.param_groups, strict=True))
            and self._states.are_seen(self._entries)
            and self._orders.are_current()
        )

    def _follow(self) -> None:
        """Take over groups, parameters and moments that others have put in their places."""
        old = {id(group.group): group for group in self._groups}
        entries = self.state
        self._orders.follow(param for group in self.param_groups for param in group["params"])
        for target in self._states.forgotten(entries):
            self._controller.forget(target)
        groups = []
        for each in self.param_groups:
            group = old.get(id(each))
            groups.append(group if group is not None and group.is_of(each) else Group(each))
        for group in groups:
            found = [(param, entries[param]) for param in group.params if has_moments(entries.get(param, {}))]
            foreign = [(param, entry) for param, entry in found if self._states.is_foreign(param, entry)]
            for param, entry in foreign:
                check_shapes(param, entry)
            for amsgrad in (False, True):
                some = [self._orders.target(p) for p, entry in foreign if ("max_exp_avg_sq" in entry) == amsgrad]
                self._controller.build(some, _rule(amsgrad, False, False, False))
            for param, entry in foreign:
                self._states.read(param, entry)
            group.begin_anew({id(param): float(entry.get("step", 0)) for param, entry in found})
        self._groups = groups
        self._show()

    def _find_devices(self) -> None:
        """Note where parameters lie."""
        self._places = list({param.device for group in self.param_groups for param in group["params"]})
        self._devices = [find_device(str(place)) for place in self._places if place.type == "cuda"]


class AdamW(Adam):
    r"""torch.optim.AdamW: `Adam` with decoupled_weight_decay, θ = θ (1 - lr weight_decay), of 0.01 by default.

    Arguments and errors are those of `Adam`.

    References:
        Loshchilov & Hutter, ICLR 2019, https://arxiv.org/abs/1711.05101
        https://docs.pytorch.org/docs/stable/generated/torch.optim.AdamW.html
    """

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: tuple[Any, Any] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True  # as torch does, whose older files do not say


def _refuse_capture(device: Device) -> None:
    """Raise ArgumentValueError where a graph is captured, all replays of which would be the same step t."""
    if device.is_capturing():
        rule, got = "must not be captured in a graph, for the host counts the steps of each parameter", "a capture"
        remedy = "use torch.optim.Adam(capturable=True), or gpu_adam.Adam and its capture"
        raise ArgumentValueError("a step of gpu_adam.torch", rule, got, remedy)


def _are_odd(pairs: list[Any]) -> bool:
    """Whether some gradients of a step are sparse, or require a gradient themselves."""
    return any(gradient.is_sparse or gradient.requires_grad for gradient, _ in pairs)


def _readable(pairs: list[Any]) -> list[Any]:
    """The pairs of gradients and parameters as the core takes them, whatever the gradients are."""
    return [(_gradient(gradient), param) for gradient, param in pairs]


def _gradient(gradient: torch.Tensor) -> Any:
    gradient = gradient.detach()
    if not gradient.is_sparse:
        return gradient
    if gradient.sparse_dim() != 1:
        return gradient.to_dense()
    return IndexedSlices(gradient._values().contiguous(), gradient._indices()[0].contiguous())


@functools.cache
def _rule(amsgrad: bool, adjusts: bool, scaled: bool, guarded: bool) -> UpdateRule:
    return UpdateRule("real_imag", amsgrad, adjusts=adjusts, scaled=scaled, guarded=guarded)
