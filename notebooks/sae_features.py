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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/polylens/polylens/blob/main/notebooks/sae_features.ipynb)
#
# # SAE features as directions
# An SAE's decoder row is a direction that a layer can write, and its active features are writers that a layer reads. Here a
# tiny SAE is trained in the notebook, so that it runs anywhere; one of SAELens goes in its place as it is.

# %% tags=["skip-execution"]
# On Colab, these two lines install it; elsewhere it is installed already.
# !git clone -q https://github.com/polylens/polylens
# !pip install -q ./polylens

# %%
from types import SimpleNamespace

import torch

import polylens
from polylens import analysis, demo

model = demo.load_bridge()
training, held_out = demo.texts()
tokens = polylens.tokenize(training[:40_000], model)
text = polylens.tokenize(held_out[:12_000], model)
lens = polylens.attach(model, tokens)

# %% [markdown]
# A TopK SAE of 256 features on the residual stream in front of layer 3's MLP.

# %%
HOOK, LAYER = "blocks.3.hook_resid_mid", 3
with torch.no_grad():
    _, cache = model.run_with_cache(tokens, names_filter=HOOK)
x = cache[HOOK].flatten(0, 1)


class SAE(torch.nn.Module):
    def __init__(self, d_in, d_sae, k):
        super().__init__()
        self.cfg = SimpleNamespace(hook_name=HOOK)
        self.k = k
        self.W_dec = torch.nn.Parameter(
            torch.nn.functional.normalize(torch.randn(d_sae, d_in), dim=1)
        )
        self.W_enc = torch.nn.Parameter(self.W_dec.T.detach().clone())
        self.b_dec = torch.nn.Parameter(torch.zeros(d_in))

    def encode(self, x):
        values, where = ((x - self.b_dec) @ self.W_enc).relu().topk(self.k, dim=-1)
        return torch.zeros(*x.shape[:-1], len(self.W_dec)).scatter(-1, where, values)

    def decode(self, features):
        return features @ self.W_dec + self.b_dec


torch.manual_seed(0)
sae = SAE(x.shape[1], 256, 16)
sae.b_dec.data = x.mean(0)
optimizer = torch.optim.Adam(sae.parameters(), lr=2e-3)
for _ in range(300):
    batch = x[torch.randint(len(x), (1024,))]
    loss = (sae.decode(sae.encode(batch)) - batch).square().sum(-1).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    sae.W_dec.data = torch.nn.functional.normalize(sae.W_dec.data, dim=1)
print(f"unexplained: {loss / (x - x.mean(0)).square().sum(-1).mean():.1%}")

# %% [markdown]
# ## What makes the layer below write a feature?
# The decoder row of the feature that is active most often is a direction of layer 2's output; the layer's polynomial along it is
# a quadratic form, whose eigenvectors are what it reads.

# %%
with torch.no_grad():
    feature = int((sae.encode(x) > 0).float().sum(0).argmax())
u = sae.W_dec[feature].detach()
features = analysis.eigenfeatures(lens[2], u, 3, metric="covariance")
analysis.examples(lens, {2: features}, text, k=2)[2]

# %% [markdown]
# Steered along the feature, and with the feature's direction taken out of what layer 2 writes:

# %%
edits = {
    "steered": analysis.Edit(2, u, by=4.0),
    "without features": analysis.Edit(2, features.part(0)),
}
analysis.intervene(lens, text, edits)

# %% [markdown]
# ## Which features interact through the next MLP?
# The active features at one position as writers of layer 3's input; what they do to the lead of the model's first guess, alone
# and in pairs, sums to the layer's output.

# %%
prompt = demo.encode("The expression is evalua")[None]
with torch.no_grad():
    logits, cache = model.run_with_cache(prompt)
    first, second = logits[0, -1].topk(2).indices.tolist()
    (u,) = analysis.logit_gradient(lens, prompt, LAYER, first, second)
    writers, names = analysis.residual_writers(lens, cache, LAYER, prompt.shape[1] - 1, sae=sae)
title = f"layer {LAYER} behind 'evalua': logit of {chr(first)!r} over {chr(second)!r}"
found = analysis.interactions(lens[LAYER], writers, u, names, title=title)
found

# %%
found.plot(10)
