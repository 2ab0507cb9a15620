"""Looking at a model: a policy or a LoRA comes in; images, their scores and image grids go out."""
