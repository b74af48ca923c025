"""polylens on a plain Hugging Face model, and on a torch classifier of feature vectors.

Runs offline on the embedded model; put your own model and tokens in its place.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import polylens
from polylens import demo

model = demo.load_model()  # or AutoModelForCausalLM.from_pretrained("gpt2"): any architecture
for site in polylens.find_mlps(model):
    print(site.layer, site.path, site.kind, site.activation.name, f"verified to {site.error:.0e}")

training, held_out = demo.texts()
tokens, test = demo.batches(training, 32, 128), demo.batches(held_out, 8, 128)
with polylens.attach(model, tokens, degree=3) as lens:
    print(lens.report(test))

    # what flows through the hook points, by name and layer
    with torch.no_grad():
        logits, cache = lens.run_with_cache(test, layers=1)
    share = cache["error", 1].norm() / cache["out", 1].norm()
    print(f"layer 1: |error| / |polynomial| = {float(share):.3f}")

    # generate with every MLP a cubic
    with lens.replaced():
        out = model.generate(test[:1, :32], max_new_tokens=48, do_sample=False, pad_token_id=0)
    print(repr(demo.decode(out[0])))

# A classifier reads floats instead of tokens; each hidden layer is a site
torch.manual_seed(0)
data = load_digits()
x, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10)]
classifier = nn.Sequential(*layers)
optimizer = torch.optim.Adam(classifier.parameters(), 1e-2)
for _ in range(100):
    optimizer.zero_grad()
    nn.functional.cross_entropy(classifier(x[:1200]), labels[:1200]).backward()
    optimizer.step()
with polylens.attach(classifier, x[:1200], degree=3) as lens:
    print(lens.report(x[1200:]))
    for name, context in (("true", torch.no_grad()), ("cubic", lens.replaced())):
        with context:
            right = (classifier(x[1200:]).argmax(-1) == labels[1200:]).float().mean()
        print(f"{name} layers: {float(right):.1%} of the held-out digits")
