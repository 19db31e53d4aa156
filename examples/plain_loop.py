"""A Mamba in a training loop of PyTorch's: `python examples/plain_loop.py`."""

import torch
from crossover import build

torch.manual_seed(0)
text = torch.tensor(list(b"the cat sat on the mat, and the dog sat on the log. " * 40))
lm = build("mamba", d_model=64, n_layers=2, vocab_size=256)
optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3)

losses = []
for _ in range(40):
    begins = torch.randint(len(text) - 65, (8,))
    window = torch.stack([text[i : i + 65] for i in begins])
    out = lm(window[:, :-1], targets=window[:, 1:])
    (out.loss + out.aux_loss).backward()
    torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(out.loss.item())

print(f"{lm.n_params:,} parameters: loss {losses[0]:.2f} -> {losses[-1]:.2f} nats per byte in {len(losses)} steps")
new = lm.eval().generate([list(b"the cat")], 13, temperature=0)[0]
print(bytes(new.tolist()))
