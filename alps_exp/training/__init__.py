"""What is asked of a training, and one trainer for it: finishing, methods that train, fine-tuning under a mask."""
