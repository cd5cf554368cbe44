"""The pure mathematics of one problem: data, network, loss and their risk."""
