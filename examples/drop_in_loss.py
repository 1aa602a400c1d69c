"""The fused divergence in a training loop of your own: `hero_kernels` needs torch and nothing else.

    python examples/drop_in_loss.py

The loss takes hidden states and the lm_head in place of logits, which it makes a few hundred rows
at a time. Below: the same value and gradient as written out in plain torch with whole logits, then
a loop in which a damaged copy of a model is distilled back from the original.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hero_kernels import DivergenceOutput, explain, fused_linear_divergence

VOCAB, HIDDEN, ROWS, LENGTH = 2000, 64, 8, 32


class Trunk(nn.Module):
    """Stands for a decoder: ids [B, T] in, last hidden states [B, T, H] out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.layer = nn.GRU(HIDDEN, HIDDEN, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, _ = self.layer(self.embedding(ids))
        return hidden


def eager_jsd(student: Tensor, teacher: Tensor, head: Tensor, mask: Tensor) -> Tensor:
    """Jensen-Shannon divergence, beta 0.5, with whole logits: mean over the tokens of the mask."""
    log_s = torch.log_softmax(student @ head.T, dim=-1)
    log_t = torch.log_softmax(teacher @ head.T, dim=-1).detach()
    log_m = torch.log((log_s.exp() + log_t.exp()) / 2)
    per_token = 0.5 * (log_s.exp() * (log_s - log_m) + log_t.exp() * (log_t - log_m)).sum(dim=-1)
    return (per_token * mask).sum() / mask.sum()


def main() -> None:
    torch.manual_seed(0)
    head = torch.randn(VOCAB, HIDDEN)
    teacher, student = Trunk(), Trunk()
    student.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        for parameter in student.layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    ids = torch.randint(VOCAB, (ROWS, LENGTH))
    mask = (
        torch.rand(ROWS, LENGTH) < 0.4
    )  # action tokens; observations are dropped before any product
    print(explain(int(mask.sum()), HIDDEN, VOCAB, trainable_head=False))

    # The teacher has the same head, so teacher_weight is left out: the precise shared-head path.
    with torch.no_grad():
        target = teacher(ids)
    hidden = student(ids)
    fused = fused_linear_divergence(hidden, head, target, token_weights=mask)
    eager = eager_jsd(hidden, target, head, mask)
    assert isinstance(fused, Tensor)
    [gradient] = torch.autograd.grad(fused, hidden, retain_graph=True)
    [expected] = torch.autograd.grad(eager, hidden)
    error = float((gradient - expected).norm() / expected.norm())
    print(f"fused {fused.item():.7f}  eager {eager.item():.7f}  gradients differ by {error:.1e}")

    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for step in range(101):
        output = fused_linear_divergence(
            student(ids), head, target, token_weights=mask, target_ids=ids, return_stats=True
        )
        assert isinstance(output, DivergenceOutput)
        optimizer.zero_grad()
        output.loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % 25 == 0:
            assert output.top1_agreement is not None
            agreement = float(output.top1_agreement[mask].mean())
            print(
                f"step {step:3d}  loss {output.loss.item():.5f}  same first choice {agreement:.0%}"
            )


if __name__ == "__main__":
    main()
