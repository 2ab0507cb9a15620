"""What the bundled models are pretrained with: images, lessons about them, and untrained networks."""
