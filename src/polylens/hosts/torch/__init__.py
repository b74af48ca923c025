"""Any torch module, Hugging Face's models among them."""
