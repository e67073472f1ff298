"""What MiLoRA buys: honest experiments on small models; see README.md in this folder."""
