# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/polylens/polylens/blob/main/notebooks/explain_a_prompt.ipynb)
#
# # One prompt explained
# What does a layer do at one position: which features of it are active, which writers act together, and does the model agree
# when they are taken out?

# %% tags=["skip-execution"]
# On Colab, these two lines install it; elsewhere it is installed already.
# !git clone -q https://github.com/polylens/polylens
# !pip install -q ./polylens

# %%
import torch

import polylens
from polylens import analysis, demo

model = demo.load_bridge()
training, held_out = demo.texts()
tokens = polylens.tokenize(training[:40_000], model)
text = polylens.tokenize(held_out[:12_000], model)
lens = polylens.attach(model, tokens)

# %% [markdown]
# The prompt, and the model's two best guesses for what comes next:

# %%
prompt = demo.encode("The expression is evalua")[None]
logits, cache = model.run_with_cache(prompt)
first, second = logits[0, -1].topk(2).indices.tolist()
print(
    f"{chr(first)!r} over {chr(second)!r}: {logits[0, -1, first] - logits[0, -1, second]:.2f} in logits"
)

# %% [markdown]
# ## What layer 3 has to do with it
# A direction: the gradient of this lead by what the layer writes. Then the layer's quadratic features along it, each with the
# places in a text where it is most active.

# %%
LAYER = 3
(u,) = analysis.logit_gradient(lens, prompt, LAYER, first, second)
features = analysis.eigenfeatures(lens[LAYER], u, 4, metric="covariance")
analysis.examples(lens, {LAYER: features}, text, k=2)[LAYER]

# %% [markdown]
# ## Who acts together
# The layer's output along u at this position, split over what wrote its input: embeddings, heads, earlier MLPs. Terms of one
# writer and of two sum to it exactly.

# %%
writers, names = analysis.residual_writers(lens, cache, LAYER, position=prompt.shape[1] - 1)
title = f"layer {LAYER} behind 'evalua': logit of {chr(first)!r} over {chr(second)!r}"
found = analysis.interactions(lens[LAYER], writers, u, names, title=title)
found

# %%
found.plot(10)

# %% [markdown]
# ## Does the model agree?
# The prediction is about the polynomial. Take the four strongest pairs out of what the *true* layer writes and see whether the
# lead moves as predicted.

# %%
pairs = [(a, b, value) for a, b, value in found.top(30) if b and a != b][:4]
a = torch.tensor([names.index(a) for a, _, _ in pairs])
b = torch.tensor([names.index(b) for _, b, _ in pairs])
differences = analysis.second_differences(lens[LAYER].weights, writers, a, b)
edits = {f"{x} × {y}": analysis.Edit(LAYER, d, at=-1) for (x, y, _), d in zip(pairs, differences)}
effects = analysis.intervene(lens, prompt, edits)
for (x, y, predicted), effect in zip(pairs, effects):
    lead = float(effect.logits[first] - effect.logits[second])
    print(f"without {effect.name:<40} predicted {-predicted:+.3f}  model {lead:+.3f}")

# %% [markdown]
# And the layer as a whole, on held-out text: what does the model lose without its part of each degree?

# %%
parts = {f"degree {k}": analysis.Edit(LAYER, lens[LAYER].part(k)) for k in (1, 2, 3)}
analysis.intervene(lens, text, parts)
