"""What the control plane's answers have, as JSON."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue


class Failure(BaseModel):
    """Why something was not done."""

    error: str = Field(description="The exception's class, as the same call raises it in Python.")
    argument: str = Field(description="Which argument or object is meant.")
    rule: str = Field(description="What must hold.")
    got: str = Field(description="What was found instead.")
    remedy: str = Field(description="What to do.")
    message: str = Field(description="All of it, as a sentence.")


class Health(BaseModel):
    """That the service is there."""

    status: Literal["live", "ready"]


class StepNumbers(BaseModel):
    """Numbers of a step, of an optimizer with `telemetry`; null where one is not finite."""

    step: int = Field(description="How many steps were done after it.")
    grad_norm: float | None = Field(None, description="The L2 norm over all gradients.")
    nonfinite: int = Field(description="How many elements of the gradients were not finite.")
    skipped: int = Field(description="How many steps were left out so far.")
    loss_scale: float | None = Field(None, description="What the gradients were divided by.")
    update_norm: float | None = Field(None, description="The L2 norm of the change of all variables.")
    param_norm: float | None = Field(None, description="The L2 norm over all variables.")


class Optimizer(BaseModel):
    """An optimizer, at this moment."""

    name: str
    policy: str = Field(description="When pushes become steps: on_push, all_of=N or every=SECONDS.")
    steps: int = Field(description="Steps done.")
    pushes: int = Field(description="Pushes that have become part of steps since the service was started.")
    paused: bool
    waiting: int = Field(description="Pushes whose step has not come yet.")
    steps_per_second: float = Field(description="Over the last 100 steps; 0 where there was none for a while.")
    step_seconds: float | None = Field(description="The longest time that one of the last 100 steps took the host.")
    staleness: int | None = Field(description="The largest one of the last 100 pushes that told, in steps.")
    loss: float | None = Field(description="What the last client said that did; null where it is not finite.")
    learning_rate: float = Field(description="Of the next step.")
    parameter_bytes: int
    checkpoint_age_seconds: float | None = Field(description="Since the newest one was written, or was restored.")
    nonfinite_steps: int | None = Field(description="Steps whose gradients were not all finite; null: nobody looks.")
    telemetry: StepNumbers | None = Field(description="Of an optimizer made with telemetry.")
    clients: list[str] = Field(description="Names of the clients that use it.")


class Variable(BaseModel):
    """A variable of an optimizer."""

    name: str
    shape: list[int]
    dtype: str


class Hyperparameter(BaseModel):
    """A hyperparameter."""

    name: str
    value: JsonValue = Field(description="A number, a truth value, null, or a schedule's configuration.")


class Assignment(BaseModel):
    """What a hyperparameter is to be."""

    model_config = ConfigDict(extra="forbid")
    value: Any = Field(
        description="A number; a truth value for amsgrad; null for no clipping; a schedule's configuration.",
        json_schema_extra={"type": ["number", "boolean", "null", "object"]},
    )


class Checkpoint(BaseModel):
    """A checkpoint that was written."""

    path: str = Field(description="Of its file, on the service's machine.")


class Gpu(BaseModel):
    """What NVML says of the GPU; null where it says nothing."""

    watts: float | None
    sm_mhz: int | None
    memory_mhz: int | None
    celsius: int | None
    throttles: list[str] = Field(description="Why its clocks are lower than they could be.")


class Service(BaseModel):
    """The service, at this moment."""

    version: str
    device: str
    clients: list[str]
    client_bytes: int = Field(description="Memory of clients' gradients, all together.")
    gpu: Gpu | None = Field(description="null on the host, and without NVML.")


class Overview(BaseModel):
    """The service and its optimizers; what each event has."""

    service: Service
    optimizers: list[Optimizer]
