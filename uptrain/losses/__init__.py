"""What is minimised: losses on predictions, and the error of each layer's attention."""
