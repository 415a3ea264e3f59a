# %% [markdown]
# # Watch a fine-tuning
# Runs on a small random checkpoint; give your own folder or hub id to `load` instead.

# %%
import sys
import tempfile

import torch

from gptoss_opt import (
    load,
    monitor_of,
    with_chunked_loss,
    with_flash_attention,
    with_lora,
    with_monitor,
    with_mxfp4_experts,
)
from gptoss_opt.testing import random_checkpoint

path = random_checkpoint(tempfile.mkdtemp(), "small")
model = load(
    path, with_mxfp4_experts(), with_flash_attention(), with_lora(), with_chunked_loss(), with_monitor(every=2)
)

# %%
optimizer = torch.optim.AdamW([one for one in model.train().parameters() if one.requires_grad], lr=2e-3)
generator = torch.Generator().manual_seed(0)
rows = torch.randint(2, 4000, (1, 128), generator=generator)
for _ in range(60):
    model(rows, labels=rows).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

# %%
monitor = monitor_of(model)
print(monitor.report(last=5))
monitor.plot(*sys.argv[1:])  # a file to save it in; a notebook shows it
