# %% [markdown]
# # Two streams side by side
# Runs on a small random checkpoint; give your own folder or hub id to `load` instead. In a notebook, paste the cells,
# and write `tokens = await both()` in the last one.

# %%
import asyncio
import tempfile

from gptoss_opt import ContinuousBatcher, load, with_flash_attention, with_mxfp4_experts
from gptoss_opt.testing import random_checkpoint

path = random_checkpoint(tempfile.mkdtemp(), "small")
model = load(path, with_mxfp4_experts(), with_flash_attention())


# %% [markdown]
# Each request is an asynchronous iterator: tokens of both arrive as they are made, in the same forwards of the model.


# %%
async def show(name, request):
    async for token in request:
        print(f"{name}: {token}")
    print(f"{name}: {request.finish_reason} after {len(request.tokens)} tokens")


async def both():
    with ContinuousBatcher(model) as batcher:
        greedy = batcher.submit([1, 2, 3, 4], max_new_tokens=12, do_sample=False)
        sampled = batcher.submit([1, 2, 3, 4], max_new_tokens=8, temperature=0.8, top_p=0.9, seed=1)
        await asyncio.gather(show("greedy", greedy), show("sampled", sampled))
        print(batcher.stats())
    return greedy.tokens, sampled.tokens


# %%
tokens = asyncio.run(both())
