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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/polylens/polylens/blob/main/notebooks/attach_report_replace.ipynb)
#
# # Attach, report, replace
# The MLPs of a model as polynomials: how good they are, what is left over, and the model with them in it. On the small
# trained model that ships in the package; a `TransformerBridge`, an nnsight or a Hugging Face model of yours goes in its place.

# %% tags=["skip-execution"]
# On Colab, these two lines install it; elsewhere it is installed already.
# !git clone -q https://github.com/polylens/polylens
# !pip install -q ./polylens

# %%
import polylens
from polylens import demo

model = demo.load_bridge()
training, held_out = demo.texts()
tokens = polylens.tokenize(training[:40_000], model)
test = polylens.tokenize(held_out[:10_000], model)
tokens.shape, test.shape

# %% [markdown]
# One forward pass over the tokens, then linear algebra. The model computes what it did before.

# %%
lens = polylens.attach(model, tokens)
lens

# %%
report = lens.report(test)
report

# %% [markdown]
# `R² deg k` is the share of the layer's variance that its polynomial of degree k explains on text it was not fitted to; `ΔCE` is
# what it costs, in nats per token, to put it in place of the MLP. The same as a figure, and as a table for pandas:

# %%
report.plot()

# %%
report.to_pandas()[["layer", "r2_1", "r2_2", "r2_3", "delta_ce"]]

# %% [markdown]
# The polynomials are hook points of the model, like its own. Their error is one, too.

# %%
logits, cache = model.run_with_cache(test)
cache["poly_error", 3, "mlp"].norm(dim=-1).mean() / cache["poly_out", 3, "mlp"].norm(dim=-1).mean()

# %% [markdown]
# Now the whole model with polynomials in place of every MLP, and what it writes:

# %%
prompt = demo.encode("The value of the expression is ")[None]


def written(model):
    options = {"max_new_tokens": 60, "do_sample": False, "verbose": False, "stop_at_eos": False}
    return demo.decode(model.generate(prompt, **options)[0])


true = written(model)
with lens.replaced():
    cubic = written(model)
with lens.replaced(degree=1):
    linear = written(model)
for name, text in {"true": true, "cubics": cubic, "linear": linear}.items():
    print(f"{name:>7}: {text!r}")

# %% [markdown]
# A lens is a small file, without the weights of the model; it loads on any framework that has the same weights.

# %%
import tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "demo.lens"
    lens.save(path, report)
    lens.detach()
    print(f"{path.stat().st_size / 1e3:.0f} kB")
    lens = polylens.load(path, demo.load_model())  # the Hugging Face model
lens
