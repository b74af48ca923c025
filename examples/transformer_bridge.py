"""polylens on a TransformerBridge (TransformerLens 3.9 or 4): report, read, replace, open up.

Runs offline on the embedded model; put your own model and tokens in its place.
"""

import torch

import polylens
from polylens import demo

model = demo.load_bridge()  # or TransformerBridge.boot_transformers("gpt2")
training, held_out = demo.texts()
tokens, test = demo.batches(training, 32, 128), demo.batches(held_out, 16, 128)

with polylens.attach(model, tokens, degree=3) as lens:
    print(lens.report(test))

    # Hook points beside the true ones, in the cache and under run_with_hooks
    _, cache = model.run_with_cache(test[:1])
    true, error = cache["mlp_out", 2], cache["poly_error", 2, "mlp"]
    print(f"layer 2: |error| / |true| = {float(error.norm() / true.norm()):.3f}")
    for k in range(4):
        part = cache[f"poly_degree_{k}", 2, "mlp"]
        print(f"  degree {k}: |part| / |true| = {float(part.norm() / true.norm()):.3f}")

    # Every MLP a quadratic, for as long as the context lasts
    with torch.no_grad(), lens.replaced(degree=2):
        logits = model(test)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), test[:, 1:].flatten())
    print(f"all MLPs quadratic: {float(loss):.3f} nats per byte")

    # What linear algebra says about layer 1: its linear map, and the quadratic along one byte
    poly = lens[1]
    beta, _ = poly.linear()
    print("singular values of the linear part:", torch.linalg.svdvals(beta)[:4].tolist())
    direction = model.W_U[:, ord("e")]
    values = torch.linalg.eigvalsh(poly.quadratic_form(direction).to_dense())
    print(f"quadratic form towards 'e': eigenvalues {values[0]:.3f} ... {values[-1]:.3f}")
