"""SGD in both momentum forms of the paper (section 3), Nesterov or not, momentum correction (remark 2).

With g the gradient plus weight decay, m the momentum and η the learning rate:
  form 9    u ← m u + g            w ← w − η u       Nesterov: w ← w − η (g + m u)      torch.optim.SGD
  form 10   v ← m (η/η') v + η g   w ← w − v         Nesterov: w ← w − (η g + m v)
η' is the rate v is expressed in: that of the parameter's previous update. Without the correction the
factor η/η' is left out, and a change of η changes the effective momentum. With it v = η u always, so form
10 equals form 9 for every schedule. So `fused=True` keeps u, which is v in terms of the rate 1, and updates by torch's
fused kernel of form 9, in one pass. The plain form, of five passes (on CPUs over pieces that stay in a cache), is the
reference that it must equal to rounding, and whose bits the reproducible mode has.
"""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from hvd_lb.optim.by_group import ByGroup, in_pieces


class SGD(ByGroup):
    """Momentum SGD; every option may differ between parameter groups.

    Per-parameter state: `velocity` (u or v, shaped like the parameter) and, for form 10 with the
    correction, `reference_lr` (η', the last rate that was not zero: at η = 0 the weights stay, and v
    gathers gradients in terms of η'; with `fused` it is 1). States of both kinds can be loaded by either. Parameters
    without a gradient are skipped, as in torch.

    fused: whether to update by torch's fused kernel. Then gradients may be multiples of what they should be: if there
        is an attribute `grad_scale`, a tensor, they are divided by it first; where `found_inf`, another one, is not 0,
        nothing changes. So torch's fused optimizers have it for GradScaler, and no host waits to know.

    Raises `ValueError` for numbers out of range, for form 9 with `momentum_correction=False`, as form 9 has nothing to
    correct, and for form 10 without it where `fused`, as that kernel knows form 9 only.
    """

    _like_parameter = ("velocity",)

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        form: Literal[9, 10] = 10,
        momentum_correction: bool = True,
        fused: bool = False,
    ) -> None:
        self.fused = fused
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "nesterov": nesterov,
                "weight_decay": weight_decay,
                "form": form,
                "momentum_correction": momentum_correction,
            },
        )

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether it heeds `grad_scale` and `found_inf`: torch's word for it."""
        return self.fused

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "fused": self.fused}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        options = {**self.defaults, **param_group}
        check(options)
        if self.fused and not options["momentum_correction"]:
            raise ValueError(
                "fused=True is for form 9, and form 10 with the momentum correction, which equals it"
            )
        super().add_param_group(param_group)

    def _update(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            if "velocity" not in state:
                state["velocity"] = torch.zeros_like(p)
                if group["form"] == 10 and group["momentum_correction"]:
                    state["reference_lr"] = 1.0  # of a zero velocity, any rate is right
        if self.fused:
            self._update_fused(params, grads, states, group)
        else:
            self._update_plain(params, grads, states, group)

    def _update_fused(
        self, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]
    ) -> None:
        scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        for state in states:  # of a plain one that was loaded
            if "reference_lr" in state and state["reference_lr"] != 1:
                state["velocity"].div_(state["reference_lr"])
                state["reference_lr"] = 1.0
        velocities = [state["velocity"] for state in states]
        # The kernel goes through memory, whatever the strides.
        odd = {
            index
            for index, (p, grad, velocity) in enumerate(zip(params, grads, velocities, strict=True))
            if not p.stride() == grad.stride() == velocity.stride()
        }
        if odd:
            if found_inf is None or not found_inf.item():
                if scale is not None:
                    torch._foreach_div_([grads[index] for index in odd], float(scale))
                some = [[items[index] for index in odd] for items in (params, grads)]
                self._update_plain(some[0], some[1], [states[index] for index in odd], group)
            params, grads, velocities = (
                [item for index, item in enumerate(items) if index not in odd]
                for items in (params, grads, velocities)
            )
        lists: Any = [params, grads, velocities]
        alike = Optimizer._group_tensors_by_device_and_dtype(lists)
        for (device, _), (lists, _) in alike.items():
            torch._fused_sgd_(
                *lists if group["momentum"] else (*lists[:2], []),
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=float(group["lr"]),
                dampening=0.0,
                nesterov=group["nesterov"],
                maximize=False,
                is_first_step=False,
                grad_scale=None if scale is None else scale.to(device),
                found_inf=None if found_inf is None else found_inf.to(device),
            )

    def _update_plain(
        self, params: list[Tensor], grads: list[Tensor], states: list[dict[str, Any]], group: dict[str, Any]
    ) -> None:
        eta, m = float(group["lr"]), group["momentum"]
        rates, factors = [1.0] * len(params), [m] * len(params)
        if group["form"] == 10 and group["momentum_correction"]:
            rates = [state["reference_lr"] for state in states]
            if eta:
                factors = [m * eta / rate for rate in rates]
                for state in states:
                    state["reference_lr"] = eta
        for places, of_part in in_pieces(params, grads, [state["velocity"] for state in states]):
            some, slopes, velocities = of_part
            if group["weight_decay"]:
                slopes = list(torch._foreach_add(slopes, some, alpha=group["weight_decay"]))
            if group["form"] == 9:
                torch._foreach_mul_(velocities, m)
                torch._foreach_add_(velocities, slopes)
                step = torch._foreach_add(slopes, velocities, alpha=m) if group["nesterov"] else velocities
                torch._foreach_add_(some, step, alpha=-eta)
            elif eta == 0 and group["momentum_correction"]:
                torch._foreach_mul_(velocities, m)
                scaled = torch._foreach_mul(slopes, [rates[place] for place in places])
                torch._foreach_add_(velocities, scaled)
            else:
                torch._foreach_mul_(velocities, [factors[place] for place in places])
                torch._foreach_add_(velocities, slopes, alpha=eta)
                if group["nesterov"]:
                    torch._foreach_add_(some, slopes, alpha=-eta)
                    torch._foreach_add_(some, velocities, alpha=-m)
                else:
                    torch._foreach_sub_(some, velocities)


def check(options: dict[str, Any]) -> None:
    """Raises `ValueError` for options of a parameter group that are out of range or have no meaning."""
    for name in ("lr", "weight_decay"):
        if not options[name] >= 0:
            raise ValueError(f"SGD was given {name}={options[name]}; it must be at least 0")
    if not 0 <= options["momentum"] < 1:
        raise ValueError(f"SGD was given momentum={options['momentum']}; it must be in [0, 1)")
    if options["form"] not in (9, 10):
        raise ValueError(f"SGD was given form={options['form']}; it must be 9 or 10")
    if options["form"] == 9 and not options["momentum_correction"]:
        raise ValueError("momentum_correction=False has no meaning with form 9: use form=10 or leave it on")
