"""polylens on an nnsight model (0.8): the polynomial as a traceable child, and remotely.

Runs offline on the embedded model; put your own model and tokens in its place.
"""

import nnsight
import torch

import polylens
from polylens import demo

model = nnsight.NNsight(demo.load_model())  # or nnsight.TransformersModel("openai-community/gpt2")
training, held_out = demo.texts()
tokens, test = demo.batches(training, 32, 128), demo.batches(held_out, 8, 128)
mlp = model.transformer.h[1].mlp

lens = polylens.attach(model, tokens, degree=3)
print(lens.report(test))

# The true output stays mlp.output; the polynomial comes after it
with torch.no_grad(), model.trace(test):
    true = mlp.output.save()
    quadratic = mlp.poly.degree_2.output.save()
    cubic = mlp.poly.output.save()
    error = mlp.poly.error.output.save()
print(f"layer 1: |error| / |true| = {float(error.norm() / true.norm()):.3f}")
print(f"  degree 2 alone: {float(quadratic.norm() / true.norm()):.3f}")
assert torch.allclose(cubic + error, true, atol=1e-4)

# While replaced, what is written to mlp.poly.output is what flows on
with lens.replaced(layers=1), torch.no_grad(), model.trace(test):
    mlp.poly.output = 0.5 * mlp.poly.output
    halved = model.output.logits.save()


def loss(logits):
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].mT, test[:, 1:]))


print(f"half of layer 1's cubic: {loss(halved):.4f} nats per byte")

# A function that travels with a remote trace, where no lens can be attached
f = lens.inline(1)
lens.detach()
with torch.no_grad(), model.trace(test):  # remote=True
    mlp.output = f(mlp.input)
    logits = model.output.logits.save()
print(f"layer 1 a cubic: {loss(logits):.4f}")
