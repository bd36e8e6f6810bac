"""Will it fit? The memory of training, as compiled, for devices that need not be there."""
