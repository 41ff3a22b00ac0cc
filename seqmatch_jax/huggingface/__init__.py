"""GPT-2 and Llama as Hugging Face lays them out: read as ours, and ours written as theirs."""
