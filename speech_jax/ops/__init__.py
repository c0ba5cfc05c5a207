"""Array functions that run inside the jitted step: features, augmentation, masks, losses."""
