"""The compressed model while it is trained: whole, in float32, with latent numbers behind its weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from srcr.models.topology import Topology
from srcr.numerics.compressed import CompressedWeight
from srcr.recovery.latent import LatentWeight


@dataclass(frozen=True, eq=False)
class PlainTensor:
    """A norm's weight or a bias that is trained: the parameter in the model, and its ``latent`` float32
    numbers, which are rounded to ``dtype`` there."""

    parameter: nn.Parameter
    latent: Tensor
    dtype: torch.dtype

    def write(self) -> None:
        """Put the rounded numbers into the model."""
        self.parameter.copy_(self.latent.to(self.dtype))


@dataclass(frozen=True, eq=False)
class Student:
    """A transformers ``model`` in float32 whose compressed linears hold what ``latents`` say, by name, and
    whose norms and biases what ``plain`` says, by parameter."""

    model: Any
    topology: Topology
    latents: Mapping[str, LatentWeight]
    plain: Mapping[str, PlainTensor]

    @classmethod
    def of(
        cls,
        model: Any,
        topology: Topology,
        latents: Mapping[str, LatentWeight],
        dtype_of: Callable[[str], torch.dtype],
    ) -> "Student":
        """The student of a model, ``dtype_of`` a parameter what it is stored in. Every vector is trained too;
        embeddings, and linears without latent numbers, stay as they are."""
        parameters = dict(model.named_parameters())
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        for name in latents:
            _own(parameters[topology.matrix(name).parameter])
        plain = {
            name: PlainTensor(parameter, parameter.detach().clone(), dtype_of(name))
            for name, parameter in parameters.items()
            if parameter.dim() == 1
        }
        for tensor in plain.values():
            _own(tensor.parameter)
        return cls(model, topology, latents, plain)

    def part(self, prefix: str) -> "Student":
        """The same model, of which only what lies in the module ``prefix`` is trained."""
        latents = {n: each for n, each in self.latents.items() if n.startswith(f"{prefix}.")}
        plain = {n: each for n, each in self.plain.items() if n.startswith(f"{prefix}.")}
        return replace(self, latents=latents, plain=plain)

    @torch.no_grad()
    def write(self) -> None:
        """Put what the latent numbers stand for into the model."""
        for name, latent in self.latents.items():
            latent.write(self._view(name, self._parameter(name).data))
        for tensor in self.plain.values():
            tensor.write()

    @torch.no_grad()
    def hold(self, weights: Mapping[str, CompressedWeight], plain: Mapping[str, Tensor]) -> None:
        """Put other weights into the model; the latent numbers stay as they are."""
        for name, weight in weights.items():
            self._view(name, self._parameter(name).data).copy_(weight.dequantize())
        for name, tensor in plain.items():
            self.plain[name].parameter.copy_(tensor)

    def gradients(self) -> list[Tensor]:
        """The gradient of everything that is trained, zeros where no token came through."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [p.grad for p in parameters if p.grad is not None]

    def drop_gradients(self) -> None:
        """Forget what a step has gathered so far."""
        self.model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Hand the gradients of the model's weights to the latent numbers; the model keeps none."""
        for name, latent in self.latents.items():
            parameter = self._parameter(name)
            gradient = parameter.grad
            if gradient is None:  # of an expert that no token of the batch reached
                gradient = torch.zeros_like(parameter)
            latent.gradients(self._view(name, gradient).contiguous())
            parameter.grad = None
        for tensor in self.plain.values():
            tensor.latent.grad, tensor.parameter.grad = tensor.parameter.grad, None

    def drop_latent_gradients(self) -> None:
        """Forget the gradients of a step that was made: the next one has its own."""
        for latent in self.latents.values():
            latent.steps.grad = latent.log_gain.grad = None
        for tensor in self.plain.values():
            tensor.latent.grad = None

    def clamp_(self) -> None:
        """Keep every latent number in reach of the codes."""
        for latent in self.latents.values():
            latent.clamp_()

    def results(self) -> dict[str, CompressedWeight]:
        """Every compressed weight as it stands now."""
        return {name: latent.result() for name, latent in self.latents.items()}

    def plain_results(self) -> dict[str, Tensor]:
        """Every other tensor that training changes, as it is stored."""
        return {name: t.latent.to(t.dtype, copy=True) for name, t in self.plain.items()}

    def _parameter(self, name: str) -> nn.Parameter:
        parameter: nn.Parameter = self.model.get_parameter(self.topology.matrix(name).parameter)
        return parameter

    def _view(self, name: str, tensor: Tensor) -> Tensor:
        return self.topology.matrix(name).view(tensor)


def _own(parameter: nn.Parameter) -> None:
    """Let a parameter be trained in memory of its own: that of a model in memory may be somebody's."""
    parameter.data = parameter.data.clone()
    parameter.requires_grad_(True)
