"""Optimiser for a low-precision model with float32 master weights: Muon for matrices, AdamW for everything else."""

from collections import defaultdict
from concurrent.futures import Executor

import torch
from torch import Tensor, nn

# Coefficients of the quintic Newton-Schulz iteration (Jordan et al. 2024, "Muon").
_A, _B, _C = 3.4445, -4.7750, 2.0315


def working_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, except on a CPU that has no instructions for it and would be thirty times slower than in float32."""
    native = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def orthogonalise(stack: Tensor, *, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices of a stack (n, rows, columns), by Newton-Schulz in the stack's precision."""
    tall = stack.shape[1] > stack.shape[2]
    x = stack.transpose(1, 2).contiguous() if tall else stack
    x = x / (x.float().flatten(1).norm(dim=1)[:, None, None] + 1e-7).to(x.dtype)
    for _ in range(steps):
        gram = torch.bmm(x, x.transpose(1, 2))
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.transpose(1, 2) if tall else x


class MasterWeightOptimiser:
    """Muon on the 2-D weights inside the towers, AdamW on embeddings, norms, biases and the logit scale.

    The model may be in bfloat16: updates are applied to float32 master copies and rounded back. Muon's step is scaled
    to the root mean square of an AdamW step (factor 0.2 sqrt(max(rows, columns))), matrices of equal shape are
    orthogonalised in one batched call.

    Args:
        model: Model whose `.grad` fields are read and whose parameters are written.
        muon_lr: Peak learning rate of the matrices.
        adam_lr: Peak learning rate of the rest.
        weight_decay: Decoupled decay of the matrices.
        pool: Threads among which the matrices are shared out.
        workers: Number of those threads.
        slow: Beginnings of parameter names that train at `slow_factor` times the rates.
        slow_factor: Share of the rates for parameters that start from trained values.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        muon_lr: float,
        adam_lr: float,
        weight_decay: float = 0.02,
        pool: Executor,
        workers: int,
        slow: tuple[str, ...] = (),
        slow_factor: float = 1.0,
    ) -> None:
        self.pool, self.workers = pool, workers
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters = {name: p.detach().float().clone() for name, p in self.parameters.items()}
        self.muon_lr, self.adam_lr, self.weight_decay = muon_lr, adam_lr, weight_decay
        factors = {name: slow_factor if name.startswith(slow) else 1.0 for name in self.masters}
        matrices = [name for name, p in self.masters.items() if p.ndim == 2 and "embed" not in name]
        self.groups: dict[tuple[tuple[int, ...], float], list[str]] = defaultdict(list)
        for name in matrices:
            self.groups[tuple(self.masters[name].shape), factors[name]].append(name)
        self.momentum = {name: torch.zeros_like(self.masters[name]) for name in matrices}
        rest: dict[float, list[Tensor]] = defaultdict(list)
        for name, master in self.masters.items():
            if name not in self.momentum:
                rest[factors[name]].append(master.requires_grad_(True))
        groups = [{"params": tensors, "factor": factor} for factor, tensors in rest.items()]
        self.adam = torch.optim.AdamW(groups, lr=adam_lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)

    @torch.no_grad()
    def _step_matrices(self, lr: float, momentum: float, names: list[str]) -> None:
        """Muon's update of some matrices of equal shape."""
        grads = [self.parameters[name].grad.float() for name in names]
        buffers = [self.momentum[name] for name in names]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        torch._foreach_lerp_(grads, buffers, momentum)
        updates = orthogonalise(torch.stack(grads).to(self.parameters[names[0]].dtype)).float()
        scale = 0.2 * max(updates.shape[1:]) ** 0.5
        for name, update in zip(names, updates, strict=True):
            self.masters[name].mul_(1 - lr * self.weight_decay).add_(update, alpha=-lr * scale)

    @torch.no_grad()
    def step(self, factor: float, *, momentum: float = 0.95) -> None:
        """One update at `factor` times the peak learning rates; clears the gradients."""
        shares = [
            (self.muon_lr * factor * group_factor, names[worker :: self.workers])
            for (_, group_factor), names in self.groups.items()
            for worker in range(self.workers)
            if names[worker :: self.workers]
        ]
        list(self.pool.map(lambda share: self._step_matrices(share[0], momentum, share[1]), shares))
        for name, master in self.masters.items():
            if name not in self.momentum:
                master.grad = self.parameters[name].grad.float()
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * factor * group["factor"]
        self.adam.step()
        if "logit_scale" in self.masters:
            self.masters["logit_scale"].clamp_(0, 4.6052)
        torch._foreach_copy_(list(self.parameters.values()), [self.masters[name] for name in self.parameters])
        for parameter in self.parameters.values():
            parameter.grad = None

    def state_dict(self) -> dict:
        """Everything needed to go on exactly."""
        masters = {name: tensor.detach() for name, tensor in self.masters.items()}
        return {"masters": masters, "momentum": self.momentum, "adam": self.adam.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Restore masters, momenta and the model's own (rounded) parameters."""
        for name, master in self.masters.items():
            master.copy_(state["masters"][name])
            self.parameters[name].copy_(master)
        for name, buffer in self.momentum.items():
            buffer.copy_(state["momentum"][name])
        self.adam.load_state_dict(state["adam"])
