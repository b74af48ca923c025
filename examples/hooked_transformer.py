"""polylens on a HookedTransformer (TransformerLens 3.9): report, ablate one degree, replace.

Runs offline on the embedded model; put your own model and tokens in its place.
"""

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

import polylens
from polylens import demo

hf = demo.load_model()
config = HookedTransformerConfig(
    n_layers=hf.config.n_layer,
    d_model=hf.config.n_embd,
    d_head=hf.config.n_embd // hf.config.n_head,
    n_heads=hf.config.n_head,
    n_ctx=hf.config.n_positions,
    d_vocab=hf.config.vocab_size,
    act_fn="gelu",
    normalization_type="LN",
)
model = HookedTransformer(config)  # or HookedTransformer.from_pretrained("gpt2")
model.load_and_process_state_dict(convert_gpt2_weights(hf, config))
training, held_out = demo.texts()
tokens, test = demo.batches(training, 32, 128), demo.batches(held_out, 8, 128)
torch.set_grad_enabled(False)


def remove(value, hook):
    return torch.zeros_like(value)


with polylens.attach(model, tokens, degree=3) as lens:
    print(lens.report(test))

    # What each degree of layer 1 is worth: leave it out of the polynomial that flows on
    with lens.replaced(layers=1):
        print(f"layer 1 a cubic: {float(model(test, return_type='loss')):.4f} nats per byte")
        for k in range(4):
            hooks = [(f"blocks.1.mlp.hook_poly_degree_{k}", remove)]
            loss = model.run_with_hooks(test, return_type="loss", fwd_hooks=hooks)
            print(f"  without degree {k}: {float(loss):.4f}")

    # Generation with every MLP a cubic, at every step
    with lens.replaced():
        out = model.generate(test[:1, :32], 48, do_sample=False, verbose=False, stop_at_eos=False)
    print(repr(demo.decode(out[0])))
print(f"detached: {float(model(test, return_type='loss')):.4f}")
