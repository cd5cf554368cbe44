"""Moving through weight space: gradient flow and gradient descent."""
