"""What a record must look like to be read, as far as tables, sweeps and resumed runs read it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# JSON has neither NaN nor infinity: records write "nan", "inf" and "-inf".
Number = Annotated[float, Field(strict=False)]
Real = Annotated[float, Field(allow_inf_nan=False)]
Whole = Annotated[int, Field(ge=-(2**62), le=2**62)]
# As a pattern is written, in one word: also one of a kind that this installation does not know.
Sparsity = Annotated[str, Field(pattern=r"^[^\s/]{1,80}$")]


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Layer(_Form):
    name: str
    block: Whole
    shape: Annotated[list[Whole], Field(min_length=2, max_length=2)]
    sparsity_target: Real
    relative_loss: Number | None = None
    held_out_loss: Number | None = None
    iterations: Real = 0


class _Evaluation(_Form):
    dataset: str
    metric: str
    value: Number
    stderr: Number | None = None
    better: Literal["lower", "higher"] | None = None
    unit: str | None = None
    shown: bool = True
    partial: bool = False
    windows: Whole | None = None
    total_windows: Whole | None = None
    seqlen: Whole | None = None
    samples: Whole | None = None
    total_samples: Whole | None = None

    @model_validator(mode="after")
    def _sizes(self):
        sizes = (self.windows, self.seqlen) if "windows" in self.model_fields_set else ()
        if self.partial:
            sizes += (self.total_windows,) if sizes else (self.samples, self.total_samples)
        if None in sizes:
            raise ValueError("its windows or samples are not counted")
        return self


class _Summary(_Form):
    sparsity: Real | None = None
    mean_relative_loss: Number | None = None


class _Config(_Form):
    model: dict | None = None
    data: dict | None = None
    method: dict | None = None
    eval: dict = {}
    layers: dict | None = None
    refit: str | None = None
    propagate: str | None = None


class _Environment(_Form):
    code: str | None = None
    dtype: str | None = None
    device: str | None = None
    threads: Whole | None = None
    git_commit: str | None = None
    versions: dict[str, str | None] | None = None
    inputs: dict[str, str] | None = None


class _Error(_Form):
    type: str
    message: str


class _Look(_Form):
    step: Whole
    loss: Number | None = None
    held_out: Number | None = None


class _Training(_Form):
    tokens: Whole
    curve: list[_Look]
    block: Whole | None = None


class _Finish(_Form):
    blocks: list[_Training] = []
    distil: _Training | None = None


class RecordForm(_Form):
    """A record as plain values; it may hold more."""

    status: Literal["running", "complete", "failed"]
    model: str
    method: str
    sparsity: Sparsity
    seed: Whole
    config: _Config = _Config()
    config_hash: str = ""
    calibration: dict[str, Any] | None = None
    layers: list[_Layer] | None = None
    summary: _Summary
    phases: dict[str, Real | None]
    evaluations: list[_Evaluation]
    environment: _Environment | None = None
    error: _Error | None = None
    drift: list[dict[str, dict[str, Number]]] | None = None
    cached_passes: list[str] = []
    finish: _Finish | None = None
    training: _Training | None = None
    started: str = ""

    @model_validator(mode="after")
    def _whole(self):
        if self.calibration and not self.calibration.keys() >= {"windows", "seqlen", "dataset"}:
            raise ValueError("its calibration is not described")
        if self.layers and self.summary.sparsity is None:
            raise ValueError("its summary has no sparsity")
        return self
