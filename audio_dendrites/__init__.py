"""Fine-tune audio classifiers with Hugging Face and let dendrites grow in them."""
