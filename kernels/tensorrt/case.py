"""`Case`: one plugin with its tensors, its attributes and the range of its dynamic dimensions, and launches for all of
the range."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tilewright.kernels.device import Device
from tilewright.kernels.kernel import Argument, Kernel, Launch
from tilewright.kernels.problem import Config, Problem
from tilewright.kernels.tensorrt.expressions import Number, Sizes, evaluate
from tilewright.kernels.tensorrt.operation import PluginVariant, Tensor
from tilewright.tuning_db.errors import ProblemError, UnsupportedError

DESCRIPTORS_SINCE = 90
"""The arch from which on tensor descriptors lie in memory; on earlier ones they are arithmetic."""


@dataclass(frozen=True)
class Profile:
    """The values of every dynamic dimension: TensorRT's optimisation profile."""

    min: Mapping[tuple[str, int], int]
    opt: Mapping[tuple[str, int], int]
    max: Mapping[tuple[str, int], int]

    @property
    def general(self) -> Sizes:
        """Odd sizes of at least 3, beyond all in the range or the last of it. Tiles are powers of two, so what divides
        a product with these divides it with any: code compiled for them takes every size of the range."""
        return {place: max(3, size | 1) for place, size in self.max.items()}


@dataclass(frozen=True)
class Case:
    """One plugin in one place of a network."""

    variant: PluginVariant
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    attributes: Mapping[str, Any]
    profile: Profile

    @property
    def kernel(self) -> Kernel[Any, Any]:
        """The kernel behind it."""
        return self.variant.operation.kernel

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The inputs by name, with dimensions that may be expressions."""
        return {tensor.name: tensor for tensor in self.inputs}

    def check(self, *, ahead: bool = True) -> None:
        """Does nothing for a case that makes a problem over all of its range, and one kind of problem if one kernel,
        compiled ahead of time, is to serve it.

        Raises:
            ProblemError, UsageError: it does not; the message says why.
        """
        self.variant.operation.check_static(self.tensors, self.attributes)
        for sizes in (self.profile.min, self.profile.opt, self.profile.max):
            problem = self.problem(sizes)
            for tensor in self.outputs:
                output = problem.outputs().get(tensor.name)
                if output is None or output.dtype != tensor.dtype:
                    raise ProblemError(f"{self.variant.name} {problem} has no output {tensor.name} of {tensor.dtype}")
        # A dynamic dimension is at least 2 in the largest shape: what is 1 there is so everywhere.
        largest = self.variant.operation.broadcasts(self.problem(self.profile.max))
        for which, sizes in (("min", self.profile.min), ("opt", self.profile.opt), ("max", self.profile.max)):
            differing = self._misread(sizes, ahead=ahead)
            if ahead:
                found = self.variant.operation.broadcasts(self.problem(sizes))
                differing += [name for name, value in found.items() if value is not None and value != largest[name]]
            if differing:
                raise ProblemError(
                    f"{self.variant.name}: at the {which} of the profile a 1 is broadcast which is no 1 at its max "
                    f"({', '.join(differing)}): make that dimension a static 1, or its least size more than 1"
                )

    def _misread(self, sizes: Sizes, *, ahead: bool) -> list[str]:
        """Outputs, and sizes that are passed, which come out of the expressions of dynamic dimensions otherwise than
        of the dimensions' values."""
        operation = self.variant.operation
        known = {tensor.name: tensor.at(sizes) for tensor in self.inputs}
        results = operation.outputs(known, self.attributes)
        found = [
            tensor.name
            for tensor, result in zip(self.outputs, results, strict=True)
            if tensor.at(sizes).dims != result.dims
        ]
        if ahead:
            wanted = operation.scalars(known, self.attributes)
            passed = operation.scalars(self.tensors, self.attributes)
            found += [name for name, number in passed.items() if evaluate(number, sizes) != wanted[name]]
        return found

    @property
    def general(self) -> Sizes:
        """`Profile.general`, with dimensions that follow from others, as those of a residual do, as they make them."""
        sizes = dict(self.profile.general)
        followers = self.variant.operation.followers(self.tensors, self.outputs, self.attributes)
        found = {place: evaluate(number, sizes) for place, number in followers.items() if place in sizes}
        return sizes | found

    def problem(self, sizes: Sizes) -> Problem:
        """The problem for given sizes of the dynamic dimensions.

        Raises:
            ProblemError, UsageError: tensors of these sizes don't make a valid one.
        """
        return self.variant.operation.problem(
            {tensor.name: tensor.at(sizes) for tensor in self.inputs}, self.attributes
        )

    def grid(self, config: Config) -> Number:
        """Blocks along x, before `Launch.on`."""
        return self.variant.operation.grid(self.tensors, self.attributes, config)

    def launches(self, config: Config, sizes: Sizes) -> tuple[Launch, ...]:
        """The launches of the problem for given sizes, as a call from Python would have them."""
        constants = self.variant.operation.constants(self.tensors, self.attributes)
        return tuple(launch.with_constants(constants) for launch in self.kernel.launches(self.problem(sizes), config))

    def launch(self, config: Config) -> Launch:
        """The one launch that serves every size of the range, with the arguments that TensorRT passes.

        Raises:
            UnsupportedError: this configuration needs a second launch, or memory or arguments that TensorRT does not
                give.
        """
        launches = self.launches(config, self.general)
        if len(launches) > 1:
            raise UnsupportedError(f"{config} takes {len(launches)} launches, and TensorRT makes one")
        launch = self.variant.operation.generalized(launches[0], self.tensors)
        if launch.scratch:
            names = ", ".join(scratch.name for scratch in launch.scratch)
            raise UnsupportedError(f"{config} needs scratch memory ({names}), and TensorRT gives none")
        if launch.grid[1:] != (1, 1):
            raise UnsupportedError(f"{config} has the grid {launch.grid}, which plugins don't describe")
        present = [argument for argument in launch.arguments if argument.type is not None]
        passed = [f"{tensor.name}_ptr" for tensor in self.inputs]
        passed += [argument.name for argument in present if not argument.is_pointer]
        passed += [f"{tensor.name}_ptr" for tensor in self.outputs]
        wanted = [argument.name for argument in present]
        if wanted != passed:
            raise UnsupportedError(f"{config} takes {', '.join(wanted)}, and TensorRT passes {', '.join(passed)}")
        return launch

    def scalars(self, launch: Launch) -> tuple[tuple[str, Number], ...]:
        """The int32 arguments of the launch, by name, in order."""
        known = self.variant.operation.scalars(self.tensors, self.attributes)
        found = []
        for argument in launch.arguments:
            if is_scalar(argument):
                found.append((argument.name, known[argument.name]))
                value = evaluate(known[argument.name], self.general)
                if argument.type != "i32" or argument.value != value:
                    raise UnsupportedError(
                        f"{argument.name} is {argument.type} {argument.value}, not the {value} of int32"
                    )
        return tuple(found)

    def refusal(self, config: Config, device: Device) -> str | None:
        """None, or why the configuration can't serve all of the range by one launch; nothing is compiled."""
        if getattr(config, "TMA", False) and device.arch >= DESCRIPTORS_SINCE:
            return f"{config} makes tensor descriptors on the device, in scratch memory, and TensorRT gives none"
        try:
            for sizes in (self.profile.opt, self.profile.min, self.profile.max, self.general):
                reason = self.kernel.space.fits(self.problem(sizes), config, device)
                if reason is not None:
                    return reason
            self.scalars(self.launch(config))
        except (ProblemError, UnsupportedError) as error:  # of sizes that nobody gave, the problem may be none
            return str(error)
        return None


def is_scalar(argument: Argument) -> bool:
    """Whether it is a number that is passed."""
    return argument.type is not None and not argument.is_pointer
