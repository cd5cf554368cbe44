"""What one looks at along a trajectory: observables, closed forms, theorems."""
