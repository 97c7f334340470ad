"""One trainer for whatever follows gradients: finishing, methods that train, fine-tuning under a mask."""
