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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/polylens/polylens/blob/main/notebooks/over_training.ipynb)
#
# # Your own network over training
# Networks start out simple and grow more complex: R² of the linear polynomial rises early, and falls while higher degrees
# take over. Here on a classifier of scikit-learn's 8 × 8 digits, from a plain training loop.

# %% tags=["skip-execution"]
# On Colab, these two lines install it; elsewhere it is installed already.
# !git clone -q https://github.com/polylens/polylens
# !pip install -q ./polylens

# %%
import torch
from sklearn.datasets import load_digits

import polylens
from polylens import analysis

x, y = load_digits(return_X_y=True)
x, y = torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
train, test = order[:1347], order[1347:]

torch.manual_seed(0)
network = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))

# %% [markdown]
# A `Tracer` is called with the step and the model; it measures at steps 0, 1, 2, 4, 8, … and leaves the rest alone.

# %%
tracer = polylens.Tracer((x[train], x[test], y[test]), degree=3)
optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
for step in range(1025):
    tracer(step, network)
    batch = train[torch.randint(len(train), (64,))]
    loss = torch.nn.functional.cross_entropy(network(x[batch]), y[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
tracer.trace

# %%
tracer.trace.plot()

# %% [markdown]
# The trained network's polynomial, and what it reads to tell an eight from the others: eigenvectors of a quadratic form, as images.

# %%
lens = polylens.attach(network, x[train], method=polylens.TrueStream(estimator="gaussian"))
towards = torch.eye(10)[8] - 0.1
features = analysis.eigenfeatures(lens[0], towards, 8, metric="covariance")
features.plot((8, 8), title="What the logit of 8 reads")
