"""GPT-2 and Llama in Hugging Face's layout: read, made from a config, and written."""
