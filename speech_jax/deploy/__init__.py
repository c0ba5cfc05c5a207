"""Using a trained model: everything here takes a bundle and knows nothing of training."""
