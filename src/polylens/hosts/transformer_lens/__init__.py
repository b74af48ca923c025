"""HookedTransformer and TransformerBridge."""
